"""From a PIL image to the numbers a model sees.

Transforms are per image and give uint8 `[H, W, 3]`; `normalize` turns a batch of them into floats on the device.
Randomness comes from Python's, NumPy's and PyTorch's global generators, which the loader seeds per image.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from sequencer2d.data.augment import AugmentConfig
from sequencer2d.data.images import MAX_ASPECT
from sequencer2d.preprocessing import Preprocessing

ImageTransform = Callable[[Image.Image], UInt8[np.ndarray, "H W C"]]


def eval_transform(preprocessing: Preprocessing) -> ImageTransform:
    """Resize the shorter side, cut out the centre (timm's `transforms_imagenet_eval`)."""
    size = preprocessing.image_size
    interpolation = InterpolationMode(preprocessing.interpolation)
    return transforms.Compose(
        [
            limit_aspect,
            transforms.Resize(int(size / preprocessing.crop_pct), interpolation),
            transforms.CenterCrop(size),
            np.asarray,
        ]
    )


def train_transform(augment: AugmentConfig, preprocessing: Preprocessing) -> ImageTransform:
    """Random crop, flip and RandAugment (timm's `transforms_imagenet_train`; erasing and mixing act on batches).

    Args:
        augment: Resolved, that is without `None`.
        preprocessing: Size and mean; the mean fills the corners of rotated images.
    """
    size = preprocessing.image_size
    steps: list[Any] = []
    if augment.crop == "padded":
        steps.append(limit_aspect)
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
    return transforms.Compose([*steps, np.asarray])


def limit_aspect(image: Image.Image) -> Image.Image:
    """The image, or the middle of one that is more than `MAX_ASPECT` times as long as wide."""
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    return transforms.CenterCrop((min(height, longest), min(width, longest)))(image)


def normalize(images: UInt8[Tensor, "B H W C"], preprocessing: Preprocessing) -> Float[Tensor, "B C H W"]:
    """Floats with the data set's mean and standard deviation, channels first, on the images' device."""
    mean = torch.tensor(preprocessing.mean, device=images.device) * 255
    std = torch.tensor(preprocessing.std, device=images.device) * 255
    return ((images.float() - mean) / std).permute(0, 3, 1, 2).contiguous()
