"""From a PIL image to the numbers a model sees.

Transforms give uint8 `[B, H, W, 3]`; `normalize` turns it into floats on the device.
"""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Integer, UInt8, UInt64
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from sequencer2d.data.augment import AugmentConfig
from sequencer2d.data.images import MAX_ASPECT, Picture, Reduction
from sequencer2d.data.rand_augment import RandAugment
from sequencer2d.preprocessing import Preprocessing


@runtime_checkable
class BatchTransform(Protocol):
    """What happens to images on their way into a batch."""

    def __call__(self, images: Sequence[Picture], seeds: Sequence[int]) -> UInt8[np.ndarray, "B H W C"]:
        """A batch of images; what is random about an image follows from its seed."""
        ...

    def reduction(self, seed: int) -> Reduction | None:
        """How much smaller the image of that seed may be decoded without loss for the batch."""
        ...


class EvalTransform:
    """Resize the shorter side, cut out the centre (timm's `transforms_imagenet_eval`); nothing is random."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        size = preprocessing.image_size
        interpolation = InterpolationMode(preprocessing.interpolation)
        resize = transforms.Resize(int(size / preprocessing.crop_pct), interpolation)
        self.steps = transforms.Compose([limit_aspect, resize, transforms.CenterCrop(size)])

    def reduction(self, seed: int) -> Reduction | None:
        return None  # so that accuracies are those of other implementations to the last digit

    def __call__(self, images: Sequence[Picture], seeds: Sequence[int]) -> UInt8[np.ndarray, "B S S 3"]:
        return np.stack([np.asarray(self.steps(_pillow(image))) for image in images])


class TrainTransform:
    """Random crop, flip and RandAugment of a batch (timm's `transforms_imagenet_train`; erasing and mixing come later).

    What happens to an image is a function of its seed alone, whatever the batch it is in.

    Args:
        augment: Resolved, that is without `None`.
        preprocessing: Size and mean; the mean fills the corners of rotated images.
    """

    def __init__(self, augment: AugmentConfig, preprocessing: Preprocessing) -> None:
        self.augment = augment
        self.size = preprocessing.image_size
        self.resize = transforms.Resize(self.size, InterpolationMode(preprocessing.interpolation))
        self.rand_augment = None
        if augment.auto_augment not in (None, "none"):
            self.rand_augment = RandAugment(
                augment.auto_augment,
                fill=tuple(round(255 * channel) for channel in preprocessing.mean),
                interpolation=augment.interpolation,
            )

    def reduction(self, seed: int) -> Reduction | None:
        """So much that the part to be cut out has no fewer pixels than it is resized to."""
        if self.augment.crop == "padded":
            return None

        def times(width: int, height: int) -> int:
            if min(width, height) < 2 * self.size:
                return 1
            randoms = uniforms(np.array([seed]), _CROP_RANDOMS)
            left, upper, right, lower = self.boxes(np.array([[width, height]]), randoms)[0].tolist()
            return max(1, min(right - left, lower - upper) // self.size)

        return times

    def __call__(self, images: Sequence[Picture], seeds: Sequence[int]) -> UInt8[np.ndarray, "B S S 3"]:
        count = self.rand_augment.num_randoms if self.rand_augment else 0
        randoms = uniforms(np.asarray(seeds), _CROP_RANDOMS + 1 + count)
        if self.augment.crop == "padded":
            parts = (self._shift(_pillow(image), random) for image, random in zip(images, randoms, strict=True))
        else:
            boxes = self.boxes(np.array([picture_size(image) for image in images]), randoms)
            cuts = zip(images, boxes.tolist(), randoms[:, 2].tolist(), strict=True)
            parts = (self._resized(image, box, random) for image, box, random in cuts)
        flipped = randoms[:, _CROP_RANDOMS] < (self.augment.hflip or 0)
        batch = np.stack(list(parts))
        batch[flipped] = torch.from_numpy(batch[flipped]).flip(2).numpy()  # ten times as fast as NumPy's [:, :, ::-1]
        if self.rand_augment:
            self.rand_augment(batch, randoms[:, _CROP_RANDOMS + 1 :])
        return batch

    def _shift(self, image: Image.Image, random: Float64[np.ndarray, "R"]) -> UInt8[np.ndarray, "S S 3"]:
        """A square cut out of the image with a reflected border."""
        size = self.size
        if image.size != (size, size):
            image = self.resize(limit_aspect(image))
        border = max(1, int(size * self.augment.shift))
        rows, columns = (
            _reflected(int(number * (side + 2 * border - size + 1)) - border, size, side)
            for number, side in zip(random, (image.height, image.width), strict=False)
        )
        return np.asarray(image)[rows[:, None], columns]

    def _resized(self, picture: Picture, box: list[int], random: float) -> UInt8[np.ndarray, "S S 3"]:
        """A box of the picture, resized."""
        interpolation = self.augment.interpolation
        if interpolation == "random":
            interpolation = "bilinear" if random < 0.5 else "bicubic"
        left, upper, right, lower = box
        if isinstance(picture, Image.Image):
            part = picture.crop((left, upper, right, lower))
        else:
            part = picture[upper:lower, left:right]
        side = (self.size, self.size)
        if self.size <= _PILLOW_SIZE:
            return np.asarray(_pillow(part).resize(side, Image.Resampling[interpolation.upper()]))
        # PyTorch's resampling of uint8 is Pillow's but for rounding.
        pixels = np.array(part).reshape(1, lower - upper, right - left, 3)
        channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return interpolate(channels_first, side, mode=interpolation, antialias=True).permute(0, 2, 3, 1)[0].numpy()

    def boxes(self, sizes: Integer[np.ndarray, "B 2"], randoms: Float64[np.ndarray, "B R"]) -> Int64[np.ndarray, "B 4"]:
        """What of each image is resized (torchvision's `RandomResizedCrop.get_params`).

        Left, upper, right and lower edge, of the first of ten tries that fits, else of the largest centre.

        Args:
            sizes: Width and height of each image.
            randoms: Uniform in [0, 1).
        """
        (small, large), (narrow, wide) = self.augment.scale, self.augment.ratio
        tries = randoms[:, 3:_CROP_RANDOMS]
        areas = sizes.prod(axis=1, keepdims=True) * (small + (large - small) * tries[:, :_TRIES])
        ratios = np.exp(math.log(narrow) + math.log(wide / narrow) * tries[:, _TRIES:])
        cuts = np.rint(np.sqrt(np.stack([areas * ratios, areas / ratios], axis=-1)))
        fits = np.all((cuts > 0) & (cuts <= sizes[:, None]), axis=-1)
        chosen = cuts[np.arange(len(sizes)), fits.argmax(axis=1)]
        starts = np.floor(randoms[:, :2] * (sizes - chosen + 1))
        ratio = np.clip(sizes[:, :1] / sizes[:, 1:], narrow, wide)
        centre = np.minimum(sizes, np.rint(sizes[:, ::-1] * np.concatenate([ratio, 1 / ratio], axis=1)))
        some = np.any(fits, axis=1, keepdims=True)
        starts = np.where(some, starts, (sizes - centre) // 2)
        return np.concatenate([starts, starts + np.where(some, chosen, centre)], axis=1).astype(np.int64)


_PILLOW_SIZE = 48
"""Up to this side Pillow resizes faster than PyTorch, which is three times as fast at 224."""
_TRIES = 10
_CROP_RANDOMS = 3 + 2 * _TRIES
"""Of an image: place across and down, interpolation, and area and aspect ratio of each try."""


def _reflected(start: int, count: int, length: int) -> Int64[np.ndarray, "C"]:
    """Indices `start … start + count`, those outside `0 … length` reflected at the border."""
    indices = np.abs(np.arange(start, start + count))
    return length - 1 - np.abs(length - 1 - indices)


def uniforms(seeds: Integer[np.ndarray, "B"], count: int) -> Float64[np.ndarray, "B R"]:
    """Random numbers in [0, 1), a row for each seed: SplitMix64 (Steele et al. 2014), where none needs another."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = _mixed(seeds.astype(np.uint64))[:, None] + steps
        return (_mixed(z) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(z: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _pillow(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])


def limit_aspect(image: Image.Image) -> Image.Image:
    """The image, or the middle of one that is more than `MAX_ASPECT` times as long as wide."""
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    return transforms.CenterCrop((min(height, longest), min(width, longest)))(image)


def normalize(images: UInt8[Tensor, "B H W C"], preprocessing: Preprocessing) -> Float[Tensor, "B C H W"]:
    """Floats with the data set's mean and standard deviation, channels first, on the images' device."""
    mean, std = (
        255 * torch.tensor(values, device=images.device).view(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    count, height, width, channels = images.shape
    floats = torch.empty((count, channels, height, width), device=images.device)
    # A few images at a time stay in the cache of a CPU.
    few = max(1, _CACHED_PIXELS // (height * width) if images.device.type == "cpu" else count)
    for some, pixels in zip(floats.split(few), images.split(few), strict=True):
        some.copy_(pixels.permute(0, 3, 1, 2)).sub_(mean).div_(std)
    return floats


_CACHED_PIXELS = 2**16
"""Of that many, bytes and floats are a megabyte."""
