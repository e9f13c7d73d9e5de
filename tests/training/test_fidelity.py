"""The official command lines, run by our task and by a plain loop after timm's `train.py`: the same numbers.

Random numbers are shared: both seed the global generators alike before every batch. Each test says how exactly its
numbers agree.
"""

import re
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from timm.data.constants import IMAGENET_DEFAULT_STD
from timm.data.loader import PrefetchLoader
from timm.data.mixup import FastCollateMixup
from torch import Tensor, nn
from torch.utils.data import DataLoader

from official import (
    COMMANDS,
    Trace,
    create_optimizer,
    create_scheduler,
    flags,
    mixup_options,
    official,
    train_as_timm,
)
from sequencer2d.data.loaders import Batch, as_it_is
from sequencer2d.data.mixing import BatchMixing, seed_generators
from sequencer2d.data.transforms import normalize
from sequencer2d.model import Sequencer2D, SequencerConfig
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.training.config import TrainConfig, resolve
from sequencer2d.training.recipes import config_from_yaml, find_recipe
from sequencer2d.training.schedule import Clock, learning_rate
from sequencer2d.training.task import SequencerTask

SHORT: dict[str, dict[str, int]] = {
    "imagenet": {"epochs": 5, "warmup_epochs": 2, "cooldown_epochs": 2},
    "imagenet-392": {"epochs": 7},
    "transfer": {"epochs": 5, "warmup_epochs": 2, "cooldown_epochs": 2},
}
"""Seven epochs, which are 21 updates at three in each."""

PREPROCESSING = Preprocessing(image_size=16, crop_pct=1.0)


def recipe(name: str) -> TrainConfig:
    config = config_from_yaml(find_recipe(name))
    assert config.image_size is not None
    assert config.crop_pct is not None
    return resolve(config, model=config.model, image_size=config.image_size, crop_pct=config.crop_pct)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_says_what_the_official_command_says(name: str) -> None:
    config, args = recipe(name), official(COMMANDS[name])
    augment, optim = config.augment, config.optim
    ours = {
        "model": config.model, "drop_path": config.model_args["drop_path_rate"],
        "img_size": config.image_size, "crop_pct": config.crop_pct,
        "epochs": config.epochs, "batch_size": config.batch_size, "num_processes": config.accumulate,
        "opt": optim.optimizer, "opt_betas": optim.betas, "weight_decay": optim.weight_decay,
        "clip_grad": optim.clip_grad_norm, "model_ema": optim.ema_decay is not None,
        "lr": optim.learning_rate, "min_lr": optim.min_learning_rate, "warmup_lr": optim.warmup_learning_rate,
        "warmup_epochs": optim.warmup_epochs, "cooldown_epochs": optim.cooldown_epochs,
        "scale": augment.scale, "ratio": augment.ratio, "hflip": augment.hflip, "aa": augment.auto_augment,
        "train_interpolation": augment.interpolation, "reprob": augment.random_erasing,
        "mixup": augment.mixup_alpha, "cutmix": augment.cutmix_alpha, "mixup_prob": augment.mix_prob,
        "smoothing": augment.label_smoothing,
    }  # fmt: skip
    if not args.warmup_epochs:
        del ours["warmup_lr"]  # used by neither
    assert ours == {option: getattr(args, option) for option in ours}
    assert augment.crop == "random-resized"
    assert optim.schedule_per_epoch


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_the_official_commands_has_its_row_in_the_docs(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    first_columns = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    missing = [flag for flag in flags(COMMANDS[name]) if not re.search(rf"`{flag}[ `]", first_columns)]
    assert not missing


@pytest.mark.parametrize("name", COMMANDS)
def test_every_epoch_of_the_whole_run_has_the_learning_rate_of_timm(name: str) -> None:
    """To the twelfth digit."""
    config, args = recipe(name), official(COMMANDS[name])
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=args.lr)
    scheduler, num_epochs = create_scheduler(args, optimizer)
    clock = Clock(num_epochs * 7, max_minutes=None)
    assert num_epochs == config.epochs + config.optim.cooldown_epochs
    for epoch in range(num_epochs):
        for update in range(epoch * 7, epoch * 7 + 7):
            ours = learning_rate(clock.progress(update) * num_epochs, config.epochs, config.optim)
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), f"epoch {epoch}"
        scheduler.step(epoch + 1)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_optimiser_treats_every_parameter_as_timms(name: str, tiny_config: SequencerConfig) -> None:
    """Exactly. (A decay of 1e-8 does not show in the weights.)"""
    model, args = Sequencer2D(tiny_config), official(COMMANDS[name])
    task = SequencerTask(model, recipe(name), PREPROCESSING, batches_per_epoch=1)
    task.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    ours, timms = settings(model, task.configure_optimizers()), settings(model, create_optimizer(args, model))
    assert ours == timms
    assert {group[0] for group in ours.values()} == {0.0, args.weight_decay}
    assert next(iter(ours.values()))[1:] == (args.opt_betas, args.opt_eps, False)


def settings(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[Any, ...]]:
    """What the optimiser is told of each parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    options = ("weight_decay", "betas", "eps", "amsgrad")
    return {names[p]: tuple(group[o] for o in options) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "both"])
def test_batches_are_those_of_timms_loader(kind: str) -> None:
    """Of the loader that the commands use, which mixes levels and then erases.

    Targets are equal exactly, images to the last digit, but for those of mixup, which it rounds to whole levels.
    """
    args = official(COMMANDS["imagenet"], **{"mixup": {"cutmix": 0.0}, "cutmix": {"mixup": 0.0}}.get(kind, {}))
    config = recipe("imagenet")
    augment = replace(config.augment, mixup_alpha=args.mixup, cutmix_alpha=args.cutmix)
    mixing = BatchMixing(augment, num_classes=5)
    batches = make_batches(num_batches=12, batch_size=8)
    mix = FastCollateMixup(**mixup_options(args, num_classes=5))

    def collate(index: int) -> tuple[Tensor, Tensor]:
        seed_generators(index)
        images = batches[index].images.permute(0, 3, 1, 2).numpy()
        return mix(list(zip(images, batches[index].labels.tolist(), strict=True)))

    loader = PrefetchLoader(
        DataLoader(range(len(batches)), batch_size=None, collate_fn=collate),  # type: ignore[arg-type]
        device=torch.device("cpu"),
        re_prob=args.reprob,
        re_mode=args.remode,
    )
    tolerance = 1e-6 if kind == "cutmix" else 0.5 / 255 / min(IMAGENET_DEFAULT_STD) + 1e-6
    for index, (images, targets) in enumerate(loader):
        seed_generators(index)
        our_images, our_targets = mixing(normalize(batches[index].images, PREPROCESSING), batches[index].labels)
        our_images = mixing.random_erasing(our_images)
        assert torch.equal(our_targets, targets)
        torch.testing.assert_close(our_images, images, rtol=0, atol=tolerance)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command, changed so that something shows in 21 updates of a tiny model."""

    recipe: str
    processes: int = 1
    """Of the official code, each with a batch of its own; steps per update of ours."""
    clip_grad: float | None = None
    ema_decay: float | None = None
    ema_warmup: bool = False


CASES = {
    "training": Case(recipe="imagenet"),
    "fine-tuning at 392": Case(recipe="imagenet-392"),
    "transfer": Case(recipe="transfer"),
    "many processes": Case(recipe="imagenet", processes=2),
    "clipping": Case(recipe="transfer", clip_grad=0.05),
    "averages": Case(recipe="imagenet-392", ema_decay=0.9),
    "averages of a newer timm": Case(recipe="imagenet", ema_decay=0.9, ema_warmup=True),
    "all at once": Case(recipe="transfer", processes=2, clip_grad=0.05, ema_decay=0.9),
}


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:Found .* module\\(s\\) in eval mode")  # the averaged weights
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_twenty_updates_are_those_of_timms_train_py(case: Case, tiny_config: SequencerConfig) -> None:
    """Targets exactly, rates to twelve digits, weights to 2.5e-7 and averages to 1e-6.

    Norms have weights of about 1, whose last binary place is 1.2e-7; with a fixed decay timm's `ModelEmaV2` rounds
    otherwise than its `ModelEmaV3`, which we use.
    """
    short = SHORT[case.recipe]
    args = official(
        COMMANDS[case.recipe],
        **short,
        num_processes=case.processes,
        model_ema=case.ema_decay is not None,
        model_ema_decay=case.ema_decay,
        model_ema_warmup=case.ema_warmup,
    )
    config = recipe(case.recipe)
    optim = replace(
        config.optim,
        ema_decay=case.ema_decay,
        ema_warmup=case.ema_warmup,
        **{name: float(value) for name, value in short.items() if name != "epochs"},
    )
    if case.clip_grad is not None:
        args.clip_grad = case.clip_grad
        optim = replace(optim, clip_grad_norm=case.clip_grad)
    config = replace(config, epochs=short["epochs"], accumulate=case.processes, optim=optim)

    torch.manual_seed(0)
    model = Sequencer2D(replace(tiny_config, drop_path_rate=args.drop_path))
    batches = make_batches(num_batches=3 * case.processes - (case.processes > 1), batch_size=4)
    theirs = train_as_timm(deepcopy(model), args, batches)
    ours = train_as_ours(model, config, batches)

    assert len(ours.rates) == len(ours.weights) == 21
    assert ours.rates == pytest.approx(theirs.rates, rel=1e-12)
    assert all(map(torch.equal, ours.targets, theirs.targets))
    assert len(ours.targets) == len(theirs.targets) == 7 * len(batches)
    assert len(ours.averages) == len(theirs.averages) == (21 if case.ema_decay else 0)
    assert_close(ours.weights, theirs.weights, 2.5e-7)
    assert_close(ours.averages, theirs.averages, 1e-6)


def assert_close(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], tolerance: float) -> None:
    for update, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our.keys() == their.keys()
        for name in our:
            difference = (our[name] - their[name]).abs().max().item()
            assert difference <= tolerance, f"{name} after update {update}"


def make_batches(*, num_batches: int, batch_size: int) -> list[Batch]:
    """Noise of 16×16 pixels and five classes."""
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randint(256, (batch_size, 16, 16, 3), generator=generator, dtype=torch.uint8),
            torch.randint(5, (batch_size,), generator=generator),
            torch.arange(batch_size),
            [],
        )
        for _ in range(num_batches)
    ]


class Traced(pl.Callback):
    """Writes down what our task does."""

    def __init__(self, task: SequencerTask) -> None:
        self.trace = trace = Trace()

        class TracedMixing(BatchMixing):
            def __call__(self, images: Tensor, labels: Tensor, *, mix: bool = True) -> tuple[Tensor, Tensor]:
                images, targets = super().__call__(images, labels, mix=mix)
                trace.targets.append(targets)
                return images, targets

        task.mixing = TracedMixing(task.config.augment, task.model.config.num_classes)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, SequencerTask)
        if trainer.global_step > len(self.trace.rates):
            self.trace.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            self.trace.weights.append(deepcopy(dict(pl_module.model.state_dict())))
            if pl_module.ema:
                self.trace.averages.append(deepcopy(dict(pl_module.ema.module.state_dict())))


def train_as_ours(model: Sequencer2D, config: TrainConfig, batches: list[Batch]) -> Trace:
    task = SequencerTask(model, config, PREPROCESSING, len(batches))
    traced = Traced(task)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=task.clock.total_updates,
        accumulate_grad_batches=config.accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        callbacks=[traced],
    )
    loader = DataLoader(batches, batch_size=None, collate_fn=as_it_is)  # type: ignore[arg-type]
    trainer.fit(task, loader, loader)
    return traced.trace
