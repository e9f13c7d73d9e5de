"""Opening one image: it comes out as upright 8-bit RGB, or as an `ImageError` that says why not."""

import os
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

IMAGE_EXTENSIONS = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""What counts as an image file in a folder, in lower case. Pillow reads AVIF from 11.3 on."""
UNREAD_EXTENSIONS = frozenset(
    {".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".orf", ".psd", ".raf", ".rw2", ".svg"}
)
"""Of pictures that are not read: of telephones and cameras, and of drawing programs."""

MIN_SIDE = 2
"""Pixels; an image that is thinner has nothing to classify."""
MAX_PIXELS = 80_000_000
"""Pixels of the largest image that is decoded: 240 MB as RGB. Below Pillow's own limit of 89 million."""
MAX_ASPECT = 8
"""Of a longer image the transforms take only the middle: resizing 2×20,000 pixels whole would take gigabytes."""


class ImageError(ValueError):
    """A file that is not a usable image; the message names the file and what is wrong."""


Reduction = Callable[[int, int], int]
"""From the width and height of an image to how many times smaller it may be decoded."""


Picture = Image.Image | UInt8[np.ndarray, "H W 3"]
"""A decoded image: Pillow's of mode RGB, or its pixels."""
Source = str | Path | BinaryIO | BytesIO
"""A path, or a stream opened for binary reading. (`BytesIO` is a `BinaryIO` to a type checker, not at run time.)"""


def open_image(source: Source, reduction: Reduction | None = None) -> Image.Image:
    """Opens and fully decodes an image.

    Transparency is laid on white; 16-bit, 32-bit and float grey is scaled to 8 bits; the EXIF orientation is applied;
    of an animation the first frame counts.

    Args:
        source: A path, or a stream, which stays open.
        reduction: Decode a JPEG at 1/2, 1/4 or 1/8 of its size, the smallest that this allows; a quarter of the time
            for large photographs. Other formats, and images that must be turned, come in full.

    Returns:
        An image of mode RGB, at least 2 pixels wide and high.

    Raises:
        ImageError: The file is missing, unreadable, empty, truncated, not an image, too small or too large. The
            message begins with the path.
    """
    picture = open_picture(source, reduction)
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def open_picture(source: Source, reduction: Reduction | None = None) -> Picture:
    """As `open_image`, without the copy that makes an array Pillow's: a tenth of the time for a photograph."""
    if not isinstance(source, str | Path):
        return _decode(source, reduction, label=str(getattr(source, "name", None) or "image"))
    try:
        status = os.stat(source)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # to open a pipe could take for ever
            raise ImageError(f"{source}: not a regular file")
        with open(source, "rb") as file:
            if status.st_size == 0:
                raise ImageError(f"{source}: the file is empty")
            return _decode(file, reduction, label=str(source))
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise ImageError(f"{source}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error


def _decode(file: BinaryIO | BytesIO, reduction: Reduction | None, label: str) -> Picture:
    try:
        # Pillow warns of large images, which are refused below, and of odd metadata in images that are fine. Where
        # threads race for the list of filters, no more than this one can be left in it.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with Image.open(file) as image:
                _check_size(image.size, label)
                if image.format == "JPEG" and orientation(image) == 1:
                    large = min(image.size) >= _JPEG_BLOCK
                    if reduction:
                        factor = reduction(*image.size)
                        image.draft(None, (image.width // factor, image.height // factor))
                    if large and image.mode in ("L", "RGB") and (pixels := _decode_jpeg(file, image.size)) is not None:
                        return pixels
                image.load()
                _turn_upright(image)
                return _to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{label}: not an image of a known format") from error
    except Image.DecompressionBombError as error:  # from twice Pillow's limit on, it does not tell width and height
        raise ImageError(f"{label}: too many pixels; scale it down to {MAX_PIXELS:,} ({error})") from error
    # Pillow's decoders answer damaged files with OSError, SyntaxError, ValueError, struct.error, IndexError and more
    except Exception as error:
        raise ImageError(f"{label}: cannot be decoded: {error or type(error).__name__}") from error


_JPEG_BLOCK = 8
"""Pixels; of a smaller JPEG, 3/8 may have the size of 1/2 and so on, so that its size does not tell the scale."""


def _decode_jpeg(file: BinaryIO | BytesIO, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"] | None:
    """Pillow's pixels in two thirds of the time, from the same libjpeg-turbo. None: damaged, so Pillow shall judge."""
    width, height = size
    file.seek(0)
    try:
        return simplejpeg.decode_jpeg(file.read(), "RGB", min_height=height, min_width=width)
    except ValueError:
        return None


def _check_size(size: tuple[int, int], label: str) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise ImageError(f"{label}: {width}×{height} pixels are too few; at least {MIN_SIDE}×{MIN_SIDE} are needed")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{label}: {width}×{height} pixels are too many; scale it down to {MAX_PIXELS:,}")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none or it cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as above
        return 1
    return value if value in range(2, 9) else 1


def _turn_upright(image: Image.Image) -> None:
    # As above for the exceptions; the pixels are whole, so a damaged EXIF block leaves them as they lie
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def _to_8_bits(grey: np.ndarray) -> UInt8[np.ndarray, "H W"]:
    """Scales grey levels of more than 8 bits, which Pillow's `convert` would clip to white.

    A file does not say which level is white. It is the lowest usual one that no pixel exceeds, or else the brightest
    pixel; for integers 65,535 is the first, since Pillow 10 also gives 16-bit files as 32-bit integers.
    """
    usual_whites = (1, 255, 65_535) if grey.dtype.kind == "f" else (65_535,)
    levels = np.nan_to_num(grey.astype(np.float32), posinf=0).clip(min=0)
    brightest = levels.max()
    white = next((white for white in usual_whites if brightest <= white), brightest)
    return np.rint(levels * (255 / white)).astype(np.uint8)
