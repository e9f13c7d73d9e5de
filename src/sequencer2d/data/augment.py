"""Settings of what training does to images. Plain data, free of torch, so that the command line has them at once."""

import math
import re
from dataclasses import dataclass
from typing import Literal

SMALL_IMAGE_SIZE = 96
"""Up to this side in pixels images count as small: gentle augmentation, decoded once and kept in memory."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What training does to images. `None` follows the image size: what suits 224 pixels ruins 32."""

    crop: Literal["random-resized", "padded"] | None = None
    """Random-resized crop (the paper's), or a shift within a reflected border (small images)."""
    shift: float = 1 / 8
    """Width of that border, as a fraction of the image's side; at least one pixel."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random-resized crop, as a fraction of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of a random-resized crop."""
    hflip: float | None = None
    """Probability of a horizontal flip. Default: 0.5, and 0 for digits."""
    auto_augment: str | None = None
    """timm's RandAugment policy, such as rand-m9-mstd0.5-inc1; 'none' for none."""
    random_erasing: float | None = None
    """Probability of filling a random rectangle with noise."""
    mixup_alpha: float | None = None
    """Beta parameter of mixup; 0 for none."""
    cutmix_alpha: float | None = None
    """Beta parameter of CutMix; 0 for none. With both, each batch takes one of them."""
    mix_prob: float = 1.0
    """Share of the batches that mixup or CutMix touches."""
    mixing_off_epochs: int = 0
    """Epochs at the end without mixup and CutMix."""
    label_smoothing: float = 0.1
    """Probability mass that targets give to all classes alike. Applied once, to the (mixed) targets."""
    interpolation: Literal["random", "bicubic", "bilinear"] = "random"
    """How training resamples; 'random' takes bilinear or bicubic per image."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"augment.scale={self.scale} must be two fractions in (0, 1], smallest first")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"augment.ratio={self.ratio} must be two positive numbers, smallest first")
        for name in ("shift", "hflip", "random_erasing", "mix_prob"):
            check_range(f"augment.{name}", getattr(self, name), 0, 1)
        for name in ("mixup_alpha", "cutmix_alpha"):
            check_range(f"augment.{name}", getattr(self, name), 0, math.inf)
        if self.mixing_off_epochs < 0:
            raise ValueError(f"augment.mixing_off_epochs={self.mixing_off_epochs} must be at least 0")
        if self.auto_augment is not None and not re.fullmatch(_POLICY, self.auto_augment):
            raise ValueError(f"augment.auto_augment={self.auto_augment!r} must be none or like rand-m9-mstd0.5-inc1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"augment.label_smoothing={self.label_smoothing} must lie in [0, 1)")


_POLICY = r"none|rand(-(m|n|inc|mmax)\d+|-(p|mstd)\d+(\.\d+)?|-mstdinf|-t)*"
"""`none`, or what timm's `rand_augment_transform` takes."""


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """Raises ValueError, naming the field, unless the value is None or a finite number in [low, high]."""
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name}={value} must be a finite number in [{low}, {high}]")
