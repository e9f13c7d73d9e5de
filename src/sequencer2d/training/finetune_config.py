"""Settings of fine-tuning, distillation and growing images. Plain data, free of torch, for the command line."""

import math
import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What training does to weights that it starts from: which of them it leaves, and how fast the others move."""

    freeze: str = "none"
    """Left as it is: none, stem, stages.N (the stem and the stages up to N, from 0), or backbone (all but the head)."""
    layer_decay: float = 1.0
    """Learning rate of a block as a fraction of the next one's, so that early ones move least; 0.75 is usual."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"none|stem|stages\.\d+|backbone", self.freeze):
            raise ValueError(f"finetune.freeze={self.freeze!r} must be none, stem, stages.N or backbone")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"finetune.layer_decay={self.layer_decay} must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Knowledge distillation: a teacher sees the same mixed images, and its answers are a part of the targets."""

    teacher: str | None = None
    """A run folder, file, name with weights in the package, hf-hub:user/name, or model of timm's with its weights."""
    teacher_file: str | None = None
    """Local weights for a teacher that is a model of timm's."""
    kind: Literal["soft", "hard"] = "soft"
    """The teacher's probabilities (Hinton et al. 2015), or its first choice as a label (DeiT, Touvron et al. 2021)."""
    weight: float = 0.5
    """The teacher's part in the loss; the labels have the rest."""
    temperature: float = 3.0
    """What the logits of both are divided by where the teacher is soft."""

    def __post_init__(self) -> None:
        if self.teacher_file is not None and self.teacher is None:
            raise ValueError("distill.teacher_file needs distill.teacher, the name of its architecture in timm")
        if not 0 < self.weight <= 1:
            raise ValueError(f"distill.weight={self.weight} must lie in (0, 1]")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"distill.temperature={self.temperature} must be a positive number")


@dataclass(frozen=True, kw_only=True)
class ProgressiveConfig:
    """Training images that grow to their full size; validation images have it from the start."""

    start_size: int | None = None
    """Side of the training images in the first epoch, in pixels; full size by default."""
    epochs: int | None = None
    """Epochs until they are full size. Default: half of them."""

    def __post_init__(self) -> None:
        for name in ("start_size", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"progressive.{name}={value} must be at least 1")
        if self.epochs is not None and self.start_size is None:
            raise ValueError(f"progressive.epochs={self.epochs} needs progressive.start_size")
