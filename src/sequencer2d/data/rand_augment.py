"""RandAugment (Cubuk et al. 2020) as timm does it, for a batch of images at once, with random numbers that are given.

Which operations, how often and how strong is timm's (timm/data/auto_augment.py), which parses the policy. What the
operations do is Pillow's (`ImageOps`, `ImageEnhance`), to the bit. Those that map levels to levels become tables, those
that blend small images with plainer ones become one blend. Shears and shifts of images that are not tiny are Pillow's
to one grey level (`shear.py`); rotations are Pillow's own.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from sequencer2d.data.augment import SMALL_IMAGE_SIZE
from sequencer2d.data.shear import shear

Images = UInt8[np.ndarray, "B H W 3"]
Pixels = UInt8[np.ndarray, "H W 3"]

_MAX_LEVEL = 10.0
_RANDOMS_PER_LAYER = 6


class RandAugment:
    """A policy of timm's such as `rand-m9-mstd0.5-inc1`.

    Args:
        policy: As of timm's `rand_augment_transform`, with its plain or its increasing operations.
        fill: Colour of what shears, shifts and rotations leave empty.
        interpolation: "bilinear", "bicubic", or "random": one of them per image and operation.
    """

    def __init__(self, policy: str, *, fill: tuple[int, ...], interpolation: str) -> None:
        transform: Any = rand_augment_transform(policy, {"img_mean": fill})
        self.names = np.array([op.name for op in transform.ops])
        self.functions = {op.name: op.aug_fn for op in transform.ops}
        self.num_layers = transform.num_layers
        op = transform.ops[0]
        self.probability, self.magnitude = op.prob, float(op.magnitude)
        self.magnitude_std, self.magnitude_max = float(op.magnitude_std), float(op.magnitude_max or _MAX_LEVEL)
        self.fill = fill
        self.interpolation = interpolation

    @property
    def num_randoms(self) -> int:
        """Random numbers that one image needs."""
        return self.num_layers * _RANDOMS_PER_LAYER

    def __call__(self, images: Images, randoms: Float64[np.ndarray, "B R"]) -> None:
        """Augments images in place.

        Args:
            images: Of one size.
            randoms: Uniform in [0, 1), `num_randoms` of them per image.
        """
        for layer in range(self.num_layers):
            columns = randoms[:, layer * _RANDOMS_PER_LAYER : (layer + 1) * _RANDOMS_PER_LAYER]
            choice, applied, radius, angle, negate, interpolate = columns.T
            names = self.names[(choice * len(self.names)).astype(np.int64)]
            levels = self._levels(radius, angle) / _MAX_LEVEL
            signed = np.where(negate > 0.5, -levels, levels)
            arguments = [
                (_ARGUMENTS[name](level, sign) if on else None)
                for name, on, level, sign in zip(names, applied <= self.probability, levels, signed, strict=True)
            ]
            self.apply(images, names, arguments, interpolate)

    def _levels(self, radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
        """Magnitudes 0 … 10: all the same, or from a normal or, with an infinite deviation, a uniform distribution."""
        if np.isinf(self.magnitude_std):
            return np.clip(radius * self.magnitude, 0, self.magnitude_max)
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
        return np.clip(self.magnitude + self.magnitude_std * normal, 0, self.magnitude_max)

    def apply(
        self, images: Images, names: np.ndarray, arguments: list[tuple[Any, ...] | None], interpolate: np.ndarray
    ) -> None:
        """Does one operation to each image, or none where its arguments are None."""
        chosen = np.array([argument is not None for argument in arguments])
        small = max(images.shape[1:3]) <= SMALL_IMAGE_SIZE  # else Pillow's own loops are faster
        for kind, plainer in _BLENDS.items() if small else ():
            blended = np.flatnonzero(chosen & np.isin(names, [kind, f"{kind}Increasing"]))
            if len(blended):
                factors = np.array([arguments[i] for i in blended], dtype=np.float32)
                images[blended] = _blend(plainer(images[blended]), images[blended], factors)
            chosen[blended] = False
        for i in np.flatnonzero(chosen).tolist():
            self._apply_to_one(images[i], str(names[i]), arguments[i] or (), self._resample(float(interpolate[i])))

    def _apply_to_one(self, image: Pixels, name: str, arguments: tuple[Any, ...], resample: Image.Resampling) -> None:
        if name in _TABLES:
            _look_up(image, _TABLES[name](image, *arguments))
        elif name in _OFFSETS and min(image.shape[:2]) > _PILLOW_SIZE:
            axis, offsets = _OFFSETS[name](image, *arguments)
            cubic = resample == Image.Resampling.BICUBIC
            image[:] = shear(image, offsets, axis=axis, cubic=cubic, fill=self.fill)
        else:
            options = {"resample": resample, "fillcolor": self.fill}
            image[:] = self.functions[name](_pillow(image), *arguments, **options)

    def _resample(self, random: float) -> Image.Resampling:
        if self.interpolation == "random":
            return Image.Resampling.BILINEAR if random < 0.5 else Image.Resampling.BICUBIC
        return Image.Resampling[self.interpolation.upper()]


_ARGUMENTS: dict[str, Callable[[float, float], tuple[Any, ...]]] = {
    "AutoContrast": lambda level, signed: (),
    "Equalize": lambda level, signed: (),
    "Invert": lambda level, signed: (),
    "Rotate": lambda level, signed: (signed * 30.0,),
    "Posterize": lambda level, signed: (int(level * 4),),
    "PosterizeIncreasing": lambda level, signed: (4 - int(level * 4),),
    "Solarize": lambda level, signed: (min(256, int(level * 256)),),
    "SolarizeIncreasing": lambda level, signed: (256 - min(256, int(level * 256)),),
    "SolarizeAdd": lambda level, signed: (min(128, int(level * 110)),),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), lambda level, signed: (level * 1.8 + 0.1,)),
    **dict.fromkeys(
        ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"),
        lambda level, signed: (max(0.1, 1.0 + signed * 0.9),),
    ),
    **dict.fromkeys(("ShearX", "ShearY"), lambda level, signed: (signed * 0.3,)),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), lambda level, signed: (signed * 0.45,)),
}
"""What timm's functions are called with at a level of 0 … 1, whose sign is drawn for those that go both ways."""


def _pillow(image: Pixels) -> Image.Image:
    return Image.frombuffer("RGB", image.shape[1::-1], image, "raw", "RGB", 0, 1)  # a view where Pillow can


# Operations that map levels to levels: from the image and the arguments to a table [256], or one of each channel.

_RAMP = np.arange(256)


def _autocontrast(image: Pixels) -> np.ndarray:
    rows = image.reshape(len(image), -1)  # NumPy is slow where its innermost loop is short
    low, high = (f(f(rows, axis=0).reshape(-1, 3), axis=0).astype(np.int64)[:, None] for f in (np.min, np.max))
    wide = high > low
    scale = np.where(wide, 255.0 / np.maximum(high - low, 1), 1.0)
    offset = np.where(wide, -low * scale, 0.0)
    return np.clip((_RAMP * scale + offset).astype(np.int64), 0, 255)


def _equalize(image: Pixels) -> np.ndarray:
    counts = np.array(_pillow(image).histogram()).reshape(3, 256)
    brightest = 255 - np.argmax(counts[:, ::-1] > 0, axis=1)
    step = (counts.sum(axis=1) - counts[np.arange(3), brightest])[:, None] // 255
    before = np.cumsum(counts, axis=1) - counts
    return np.where(step > 0, np.minimum((step // 2 + before) // np.maximum(step, 1), 255), _RAMP)


def _posterize(image: Pixels, bits: int) -> np.ndarray:
    return _RAMP & ~(2 ** (8 - min(bits, 8)) - 1)


def _solarize(image: Pixels, threshold: int) -> np.ndarray:
    return np.where(threshold > _RAMP, _RAMP, 255 - _RAMP)


def _brighten(image: Pixels, factor: float) -> np.ndarray:
    return np.clip(factor * _RAMP, 0, 255).astype(np.int64)


_TABLES: dict[str, Callable[..., np.ndarray]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": lambda image: 255 - _RAMP,
    "Posterize": _posterize,
    "PosterizeIncreasing": _posterize,
    "Solarize": _solarize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": lambda image, more: np.where(_RAMP < 128, np.minimum(255, _RAMP + more), _RAMP),
    "Brightness": _brighten,
    "BrightnessIncreasing": _brighten,
}


def _look_up(image: Pixels, tables: np.ndarray) -> None:
    tables = tables.astype(np.uint8)
    parts = [(image, tables)] if tables.ndim == 1 else [(image[..., i], table) for i, table in enumerate(tables)]
    for part, table in parts:
        levels = part.tobytes().translate(table.tobytes())  # several times as fast as NumPy's indexing
        part[:] = np.frombuffer(levels, np.uint8).reshape(part.shape)


# Operations that move each row along itself, or each column: which axis pixels move along, and how far.


def _sheared(image: Pixels, axis: int, factor: float) -> tuple[int, np.ndarray]:
    return axis, factor * (np.arange(image.shape[1 - axis]) + 0.5)


def _shifted(image: Pixels, axis: int, share: float) -> tuple[int, np.ndarray]:
    return axis, np.full(image.shape[1 - axis], share * image.shape[axis])


_OFFSETS: dict[str, Callable[..., tuple[int, np.ndarray]]] = {
    "ShearX": lambda image, factor: _sheared(image, 1, factor),
    "ShearY": lambda image, factor: _sheared(image, 0, factor),
    "TranslateXRel": lambda image, share: _shifted(image, 1, share),
    "TranslateYRel": lambda image, share: _shifted(image, 0, share),
}
_PILLOW_SIZE = 48
"""Up to this side Pillow moves pixels faster."""


# Operations that blend an image with a plainer one, or go beyond it: Pillow's `ImageEnhance`.


def _blend(plainer: Images, images: Images, factors: Float32[np.ndarray, "B 1"]) -> Images:
    low = plainer.astype(np.float32)
    mixed = low + factors[:, :, None, None] * (images.astype(np.float32) - low)
    return np.clip(mixed, 0, 255).astype(np.uint8)


def _grey(images: Images) -> np.ndarray:
    """Pillow's conversion to `L`, `[B, H, W]`."""
    red, green, blue = (images[..., channel].astype(np.int32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)


def _greyed(images: Images) -> Images:
    return np.repeat(_grey(images)[..., None], 3, axis=-1)


def _mean_grey(images: Images) -> Images:
    means = (_grey(images).mean(axis=(1, 2)) + 0.5).astype(np.uint8)
    return np.broadcast_to(means[:, None, None, None], images.shape)


def _smoothed(images: Images) -> Images:
    """Pillow's filter `SMOOTH`: the neighbours once, the centre five times; a border of one pixel stays."""
    smooth = images.copy()
    if min(images.shape[1:3]) > 2:
        wide = images.astype(np.int32)
        rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
        box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
        smooth[:, 1:-1, 1:-1] = (2 * (box + 4 * wide[:, 1:-1, 1:-1]) + 13) // 26
    return smooth


_BLENDS: dict[str, Callable[[Images], Images]] = {"Color": _greyed, "Contrast": _mean_grey, "Sharpness": _smoothed}
"""What an image is blended with; in timm these go by a second name, too, with another range."""
