"""What evaluation does to an image before the model sees it; saved with the weights. Plain data, free of torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize the shorter side to `image_size / crop_pct`, cut out the centre, normalise."""

    image_size: int
    """Side of the square that the model sees, in pixels."""
    crop_pct: float = 1.0
    """Part of the resized image's side that the centre is."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of red, green and blue, in units of 0…1; ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Likewise."""
    interpolation: str = "bicubic"
    """Or bilinear."""

    def __post_init__(self) -> None:
        if self.image_size < 1 or not 0 < self.crop_pct <= 1 or min(self.std) <= 0:
            raise ValueError(f"{self} needs image_size ≥ 1, crop_pct in (0, 1] and std > 0")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation={self.interpolation!r} must be bicubic or bilinear")
