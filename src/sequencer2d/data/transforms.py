"""From a PIL image to the numbers a model sees.

Transforms are per image and give uint8 `[H, W, 3]`; `normalize` turns a batch of them into floats on the device.
Randomness comes from Python's, NumPy's and PyTorch's global generators, which the loader seeds per image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from sequencer2d.training.config import AugmentConfig

ImageTransform = Callable[[Image.Image], UInt8[np.ndarray, "H W C"]]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What evaluation does to an image; saved with the weights."""

    image_size: int
    """Side of the square that the model sees, in pixels."""
    crop_pct: float = 1.0
    """The shorter side is resized to `image_size / crop_pct`, then the centre is cut out."""
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    """Of red, green and blue, in units of 0…1."""
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.image_size < 1 or not 0 < self.crop_pct <= 1 or min(self.std) <= 0:
            raise ValueError(f"{self} needs image_size ≥ 1, crop_pct in (0, 1] and std > 0")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation={self.interpolation!r} must be bicubic or bilinear")


def eval_transform(preprocessing: Preprocessing) -> ImageTransform:
    """Resize the shorter side, cut out the centre (timm's `transforms_imagenet_eval`)."""
    size = preprocessing.image_size
    resize = transforms.Resize(int(size / preprocessing.crop_pct), InterpolationMode(preprocessing.interpolation))
    crop = transforms.CenterCrop(size)

    def transform(image: Image.Image) -> UInt8[np.ndarray, "H W C"]:
        return np.asarray(crop(resize(image)))

    return transform


def train_transform(augment: AugmentConfig, preprocessing: Preprocessing) -> ImageTransform:
    """Random crop, flip and RandAugment (timm's `transforms_imagenet_train`; erasing and mixing act on batches).

    Args:
        augment: Resolved, that is without `None`.
        preprocessing: Size and mean; the mean fills the corners of rotated images.
    """
    size = preprocessing.image_size
    steps: list[Callable[[Image.Image], Image.Image]] = []
    if augment.crop == "padded":
        steps.append(transforms.Resize(size, InterpolationMode(preprocessing.interpolation)))
        steps.append(transforms.RandomCrop(size, padding=max(1, size // 8), padding_mode="reflect"))
    else:
        steps.append(
            RandomResizedCropAndInterpolation(
                size, scale=augment.scale, ratio=augment.ratio, interpolation=augment.interpolation
            )
        )
    if augment.hflip:
        steps.append(transforms.RandomHorizontalFlip(augment.hflip))
    if augment.auto_augment not in (None, "none"):
        fill = tuple(round(255 * channel) for channel in preprocessing.mean)
        options = {"translate_const": int(size * 0.45), "img_mean": fill}
        if augment.interpolation != "random":
            options["interpolation"] = str_to_pil_interp(augment.interpolation)
        steps.append(rand_augment_transform(augment.auto_augment, options))

    def transform(image: Image.Image) -> UInt8[np.ndarray, "H W C"]:
        for step in steps:
            image = step(image)
        return np.asarray(image)

    return transform


def normalize(images: UInt8[Tensor, "B H W C"], preprocessing: Preprocessing) -> Float[Tensor, "B C H W"]:
    """Floats with the data set's mean and standard deviation, channels first, on the images' device."""
    mean = torch.tensor(preprocessing.mean, device=images.device) * 255
    std = torch.tensor(preprocessing.std, device=images.device) * 255
    return ((images.float() - mean) / std).permute(0, 3, 1, 2).contiguous()
