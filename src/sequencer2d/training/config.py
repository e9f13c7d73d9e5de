"""What a run is: frozen, typed, validated once. Every field is an option of `sequencer2d train` and a key of a recipe.

Fields that default to `None` follow from the data, the image size or the machine; `resolve` fills them in, and the
resolved config is what a run saves. (No `slots=True`: jsonargparse reads defaults from an instance's `__dict__`.)
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sequencer2d.cores import num_cores
from sequencer2d.data.augment import SMALL_IMAGE_SIZE, AugmentConfig, check_range
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.training.finetune_config import DistillConfig, FinetuneConfig, ProgressiveConfig


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its learning rate: linear warm-up, a fall to the minimum, cool-down there."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """The paper's, or Muon for the matrices and AdamW for the rest: slower steps, of which far fewer are needed."""
    learning_rate: float | None = None
    """Peak. Default: the paper's 2e-3 at 2,048 images per update, by the square root."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls from its peak to its minimum."""
    min_learning_rate: float = 1e-6
    """Where the fall ends and the cool-down stays."""
    warmup_learning_rate: float = 1e-6
    """Where the warm-up begins."""
    warmup_epochs: float | None = None
    """Default: a fifteenth of the epochs (20 of 300 in the paper)."""
    cooldown_epochs: float = 0.0
    """Added after the epochs of the fall."""
    schedule_per_epoch: bool = False
    """Hold the learning rate through each epoch, as the official code does, rather than set it at every update."""
    weight_decay: float = 0.05
    """Of matrices and kernels; norms and biases are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    momentum: float = 0.95
    """Muon's."""
    keep_norms: bool = False
    """Muon's: convolutions before batch norms keep the norm that they began with; only their direction matters."""
    clip_grad_norm: float | None = None
    """Largest norm of the gradient; none by default."""
    ema_decay: float | None = None
    """Decay per update of the averaged weights that are then evaluated and saved; none by default."""
    ema_warmup: bool = True
    """Let that decay grow from 0, so that the average forgets the initial weights; the official code has it fixed."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "min_learning_rate", "warmup_learning_rate", "clip_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"optim.{name}={value} must be a finite number ≥ 0")
        for name in ("warmup_epochs", "cooldown_epochs", "weight_decay"):
            check_range(f"optim.{name}", getattr(self, name), 0, math.inf)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay={self.ema_decay} must lie in (0, 1)")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum={self.momentum} must lie in [0, 1)")
        if self.keep_norms and self.optimizer != "muon":
            raise ValueError("optim.keep_norms is Muon's; add --optim.keep_norms false, or take --optim.optimizer muon")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains a Sequencer2D, or timm/NAME to compare it with. Without any option: the embedded digits."""

    model: str = "auto"
    """A name from `sequencer2d models`, timm/NAME, or auto: that of --weights, or else by the size of the images."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Changes to the architecture, such as --model-args.drop_path_rate 0.1; of timm/NAME those of timm's."""
    weights: str | None = None
    """Start from this run folder or file (ours, timm's, the official code's), hf-hub:user/name, or published name."""
    data: str = "digits"
    """digits, cifar10, cifar100, tiny-imagenet, imagenet, a folder of images, or shards: folder, URL, s3://, pipe:."""
    data_root: str | None = None
    """Where a named data set lies or is downloaded to."""
    val_fraction: float = 0.1
    """Part of the training images that is held out for validation where the data bring no validation set."""
    image_size: int | None = None
    """Side of the square that the model sees, in pixels. Default: the model's."""
    crop_pct: float | None = None
    """Part of the resized image's side that evaluation looks at. Default: the model's."""
    epochs: int = 100
    """Passes over the training images, warm-up included, cool-down not."""
    max_minutes: float | None = None
    """Wall-clock budget, validation included; the schedule anneals over it if the epochs would take longer."""
    batch_size: int | Literal["auto"] = 128
    """Images per step, of all processes together; auto: the largest that fits a GPU, the smallest fast one on a CPU."""
    accumulate: int = 1
    """Steps per update of the weights."""
    augment: AugmentConfig = AugmentConfig()  # noqa: RUF009 - frozen
    optim: OptimConfig = OptimConfig()
    finetune: FinetuneConfig = FinetuneConfig()  # noqa: RUF009
    distill: DistillConfig = DistillConfig()  # noqa: RUF009
    progressive: ProgressiveConfig = ProgressiveConfig()  # noqa: RUF009
    early_stopping: int | None = None
    """Stop after so many validations without a better one; never by default."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward and backward pass; auto: bf16 where a CPU is faster in it, on a GPU bf16 or fp16."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work: each has the whole model, or (fsdp) a part of its weights."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, slower."""
    compile: bool = False
    """Compile norms, MLPs, stem and head with torch.compile: for GPUs; on CPUs it gains nothing and takes a minute."""
    deterministic: bool = False
    """Refuse operations that give other digits when repeated; on a CPU there are none."""
    skip_nonfinite: int = 0
    """Updates of a run that may be skipped because their loss or gradient is no number; one more ends the run."""
    backend: Literal["auto", "native", "torch"] = "auto"
    """What runs the LSTMs: our CPU kernels, PyTorch, or auto, the kernels where they are and fit."""
    seed: int = 0
    """Of the split, the initial weights, the order and the augmentation."""
    split_seed: int | None = None
    """Of the split alone. Default: the seed."""
    num_workers: int | None = None
    """Processes that decode and augment, per machine. Default: by the size of the images and the number of cores."""
    run_dir: str | None = None
    """Folder of the run. Default: runs/<data>-<model>, with a number where that exists."""
    resume: str = "auto"
    """auto: continue the run in --run-dir if it was stopped; never: refuse a folder that is in use; or a checkpoint."""
    checkpoint_minutes: float = 10.0
    """A checkpoint to go on from is written after every validation and so often in between."""
    keep_checkpoints: int = 2
    """How many of them are kept."""
    log_every: int = 10
    """Updates between two rows of metrics."""
    loggers: tuple[Literal["csv", "wandb", "mlflow"], ...] = ()
    """Records of the metrics besides metrics.jsonl and TensorBoard: [csv,wandb,mlflow]."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every", "keep_checkpoints"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} must be at least 1")
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise ValueError(f"max_minutes={self.max_minutes} must be positive")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct} must lie in (0, 1]")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must lie in (0, 1)")
        if self.skip_nonfinite < 0:
            raise ValueError(f"skip_nonfinite={self.skip_nonfinite} must be at least 0")
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise ValueError(f"checkpoint_minutes={self.checkpoint_minutes} must be a finite number ≥ 0")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must be at least 0")
        for name in ("seed", "split_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**32:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 2**32)")
        if self.early_stopping is not None and self.early_stopping < 1:
            raise ValueError(f"early_stopping={self.early_stopping} must be at least 1")
        if self.finetune.freeze != "none" and self.weights is None:
            raise ValueError(f"finetune.freeze={self.finetune.freeze} needs weights that are worth it; give --weights")
        if (self.progressive.epochs or 0) > self.epochs:
            raise ValueError(f"progressive.epochs={self.progressive.epochs} is longer than epochs={self.epochs}")
        warmup_epochs = self.optim.warmup_epochs or 0
        if warmup_epochs > self.epochs:
            raise ValueError(f"optim.warmup_epochs={warmup_epochs} is longer than epochs={self.epochs}")

    @property
    def images_per_step(self) -> int:
        """The batch size of a resolved config."""
        assert self.batch_size != "auto"
        return self.batch_size

    @property
    def preprocessing(self) -> Preprocessing:
        """What a resolved config's model does with an image."""
        assert self.image_size is not None
        assert self.crop_pct is not None
        return Preprocessing(image_size=self.image_size, crop_pct=self.crop_pct)

    @property
    def seed_of_split(self) -> int:
        """What the validation images are drawn with, where the data bring none."""
        return self.seed if self.split_seed is None else self.split_seed

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for YAML and JSON."""
        return _plain(asdict(self))


def resolve(
    config: TrainConfig, *, model: str, image_size: int, crop_pct: float, cores: int | None = None
) -> TrainConfig:
    """Fills in every `None` that follows from the model, the image size, the schedule and the machine.

    The batch size must be a number by now. `cores` are those of all processes on this machine; default: of this one.
    """
    small = image_size <= SMALL_IMAGE_SIZE
    augment, optim = config.augment, config.optim
    images_per_update = config.images_per_step * config.accumulate
    progressive = config.progressive
    if progressive.start_size is not None:
        if progressive.start_size > image_size:
            raise ValueError(f"progressive.start_size={progressive.start_size} is larger than image_size={image_size}")
        progressive = replace(progressive, epochs=_default(progressive.epochs, max(1, config.epochs // 2)))
    return replace(
        config,
        model=model,
        image_size=image_size,
        crop_pct=crop_pct,
        augment=replace(
            augment,
            hflip=_default(augment.hflip, 0.0 if config.data == "digits" else 0.5),
            crop=_default(augment.crop, "padded" if small else "random-resized"),
            auto_augment=_default(augment.auto_augment, "none" if small else "rand-m9-mstd0.5-inc1"),
            random_erasing=_default(augment.random_erasing, 0.0 if small else 0.25),
            mixup_alpha=_default(augment.mixup_alpha, 0.0 if small else 0.8),
            cutmix_alpha=_default(augment.cutmix_alpha, 0.0 if small else 1.0),
        ),
        optim=replace(
            optim,
            learning_rate=_default(optim.learning_rate, 2e-3 * math.sqrt(images_per_update / 2048)),
            warmup_epochs=_default(optim.warmup_epochs, config.epochs / 15),
        ),
        progressive=progressive,
        num_workers=_default(config.num_workers, 0 if small else max(1, (cores or num_cores()) - 1)),
    )


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
