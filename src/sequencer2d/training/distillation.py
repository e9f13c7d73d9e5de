"""Knowledge distillation: a teacher, what it sees, and its part in the loss.

Shapes: `B` batch, `C` channels, `H` rows, `W` columns, `K` classes.
"""

import difflib
import logging
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

import sequencer2d.registry  # noqa: F401 - timm then knows our variants, and our models on the hub
from sequencer2d.errors import first_line
from sequencer2d.preprocessing import Preprocessing
from sequencer2d.training.finetune_config import DistillConfig
from sequencer2d.weights import load_model
from sequencer2d.zoo import packaged_file

log = logging.getLogger("sequencer2d")


class Teacher:
    """A trained model and its part in the loss. No module, so that it is in no checkpoint, average or optimiser.

    Args:
        model: Any classifier of images `[B, 3, H, W]`; it is put into evaluation mode and gets no gradients.
        mean, std: What it was trained with, in units of 0…1.
        size: Rows and columns of its images.
        config: The teacher's part.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: tuple[int, int],
        config: DistillConfig,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.mean = mean
        self.std = std
        self.size = size
        self.config = config

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "B 3 H W"], preprocessing: Preprocessing) -> Float[Tensor, "B K"]:
        """What the teacher says of images that were normalised for the student, by `preprocessing`."""
        own_mean, own_std, mean, std = (
            images.new_tensor(values).view(3, 1, 1)
            for values in (self.mean, self.std, preprocessing.mean, preprocessing.std)
        )
        images = (images * std + mean - own_mean) / own_std
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images).float()

    def blend(
        self,
        label_loss: Float[Tensor, ""],
        logits: Float[Tensor, "B K"],
        images: Float[Tensor, "B 3 H W"],
        preprocessing: Preprocessing,
    ) -> Float[Tensor, ""]:
        """The student's loss: the one by the labels, and the one by the teacher at its weight."""
        weight = self.config.weight
        return (1 - weight) * label_loss + weight * self.loss(logits, self.logits(images, preprocessing))

    def loss(self, logits: Float[Tensor, "B K"], own: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
        """How far the student's logits are from the teacher's own.

        Soft: the Kullback-Leibler divergence at the temperature, times its square, so that the gradient's size does
        not depend on it (Hinton et al. 2015, section 2).
        """
        if self.config.kind == "hard":
            return F.cross_entropy(logits, own.argmax(1))
        temperature = self.config.temperature
        student, teacher = (F.log_softmax(values / temperature, dim=1) for values in (logits, own))
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def load_teacher(
    config: DistillConfig, class_names: tuple[str, ...], class_ids: tuple[str, ...] = ()
) -> Teacher | None:
    """The teacher that a config asks for, on the CPU; None if it asks for none.

    Args:
        config: Names a run folder, a file or weights in the package (as `load_model` takes them), or a model of timm's,
            its hub's among them.
        class_names: The student's classes, which the teacher must know, in this order as far as it tells.
        class_ids: What it may call them instead (`ImageData.class_ids`).

    Raises:
        FileNotFoundError: The weights are missing or cannot be had.
        ValueError: timm has no such model, the file does not fit it, or the teacher has other classes.
    """
    if config.teacher is None:
        return None
    here = Path(config.teacher).exists() or packaged_file(config.teacher) is not None
    if here and config.teacher_file is None:
        teacher, names = _ours(config)
    else:
        teacher, names = _timms(config.teacher, len(class_names), config)
    count = teacher.model.num_classes
    if count != len(class_names):
        raise ValueError(
            f"the teacher {config.teacher} has {count} classes and the data have {len(class_names)}; "
            "fine-tune it on the same data first"
        )
    if names and names not in (class_names, class_ids):
        first = next(number for number, name in enumerate(class_names) if names[number] != name)
        raise ValueError(
            f"the teacher {config.teacher} has other classes than the data: its number {first} is {names[first]}, "
            f"theirs {class_names[first]}; fine-tune it on the same data first"
        )
    millions = sum(parameter.numel() for parameter in teacher.model.parameters()) / 1e6
    log.info("teacher %s: %.2f M parameters, %d×%d pixels", config.teacher, millions, *teacher.size)
    return teacher


def _ours(config: DistillConfig) -> tuple[Teacher, tuple[str, ...]]:
    """A Sequencer and its class names; none for weights of others, which do not tell."""
    model, card = load_model(str(config.teacher))
    seen = card.preprocessing
    size = (seen.image_size, seen.image_size)
    return Teacher(model, mean=seen.mean, std=seen.std, size=size, config=config), (
        card.class_names if card.training else ()
    )


def _timms(name: str, num_classes: int, config: DistillConfig) -> tuple[Teacher, tuple[str, ...]]:
    """A model of timm's and its class names, where it tells them."""
    file = config.teacher_file
    if not name.startswith(("hf-hub:", "local-dir:")) and not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise ValueError(f"no file, folder or model of timm's is named {name!r}: {hint}")
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"distill.teacher_file={file} does not exist; give a file of weights of {name}")
    options: dict[str, Any] = {"checkpoint_path": file, "num_classes": num_classes} if file else {"pretrained": True}
    try:
        model = timm.create_model(name, **options)
    except Exception as error:  # timm's own, the hub's, PyTorch's
        if file:
            raise ValueError(
                f"{file} does not fit the teacher {name} with {num_classes} classes: {first_line(error)}"
            ) from error
        raise FileNotFoundError(
            f"the weights of the teacher {name} cannot be had: {first_line(error)}; "
            "give a local file: --distill.teacher-file"
        ) from error
    described: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    _, height, width = described["input_size"]
    names = tuple(described.get("label_names") or ())
    mean, std = (tuple(described[key]) for key in ("mean", "std"))
    teacher = Teacher(model, mean=mean, std=std, size=(height, width), config=config)
    return teacher, names if len(names) == model.num_classes else ()
