"""Shears and shifts of images, as Pillow's `Image.transform` does them, in a third of its time.

Pillow interpolates in two dimensions in floating point; along a row or a column that moves as a whole one dimension
and integers do.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64, Int64, UInt8

Pixels = UInt8[np.ndarray, "H W 3"]


def shear(image: Pixels, offsets: Float64[np.ndarray, "L"], *, axis: int, cubic: bool, fill: tuple[int, ...]) -> Pixels:
    """Moves each row along itself (`axis=1`), or each column (`axis=0`).

    Pillow's result to one grey level: weights are rounded to 1/256 (bilinear) or 1/4096 (bicubic).

    Args:
        image: What is moved; it stays as it is.
        offsets: In pixels, of each row or column; what lies there in the image comes to its beginning.
        axis: Along which axis pixels move.
        cubic: Bicubic rather than bilinear interpolation.
        fill: Colour of what is left empty.
    """
    lines = image if axis == 1 else image.swapaxes(0, 1)
    length = lines.shape[1]
    whole = np.floor(offsets)
    weights = _cubic_weights(offsets - whole) if cubic else _linear_weights(offsets - whole)
    first = np.clip(whole, -length - 1, length + 1).astype(np.int64) - (1 if cubic else 0)
    source = _moved(lines, first, length + len(weights) - 1, weights.dtype)
    # Of columns the weights are repeated for each colour, since NumPy is slow where its innermost loop is short.
    weights = weights[..., None, None] if axis == 1 else weights.repeat(3, axis=1).reshape(len(weights), -1, 1, 3)
    total = source[:, :length] * weights[0]
    product = np.empty_like(total)
    for tap in range(1, len(weights)):
        total += np.multiply(source[:, tap : tap + length], weights[tap], out=product)
    total >>= _CUBIC_BITS if cubic else _LINEAR_BITS
    sheared = (np.clip(total, 0, 255, out=total) if cubic else total).astype(np.uint8)
    left = np.clip(np.ceil(-offsets - 0.5), 0, length).astype(np.int64)
    right = np.clip(np.ceil(length - offsets - 0.5), 0, length).astype(np.int64)
    colour = np.array(fill, np.uint8)
    for start, stop in _runs(left):
        if low := int(left[start]):
            sheared[start:stop, :low] = colour
    for start, stop in _runs(right):
        if (high := int(right[start])) < length:
            sheared[start:stop, high:] = colour
    return sheared if axis == 1 else sheared.swapaxes(0, 1)


_LINEAR_BITS = 8  # so that 255 times the weight of one still fits 16 bits
_CUBIC_BITS = 12


def _linear_weights(x: Float64[np.ndarray, "L"]) -> np.ndarray:
    """Of two neighbours, `[2, L]`, at a place between them of 0 … 1."""
    second = np.rint(2**_LINEAR_BITS * x).astype(np.uint16)
    return np.stack([2**_LINEAR_BITS - second, second]).astype(np.uint16)


def _cubic_weights(x: Float64[np.ndarray, "L"]) -> np.ndarray:
    """Of four neighbours, `[4, L]`, at a place between the middle ones: cubic convolution with a = -1, as Pillow's."""
    others = np.stack([-x + 2 * x**2 - x**3, x + x**2 - x**3, x**3 - x**2])
    before, third, fourth = np.rint(2**_CUBIC_BITS * others).astype(np.int32)
    return np.stack([before, 2**_CUBIC_BITS - before - third - fourth, third, fourth])


def _moved(lines: Pixels, first: Int64[np.ndarray, "L"], count: int, dtype: np.dtype) -> np.ndarray:
    """`count` pixels of each line from its `first` on; outside, those at the edge go on."""
    length = lines.shape[1]
    moved = np.empty_like(lines, dtype, shape=(len(lines), count, 3))
    for start, stop in _runs(first):
        begin = int(first[start])
        low = min(max(0, -begin), count)
        high = min(max(low, length - begin), count)
        moved[start:stop, low:high] = lines[start:stop, begin + low : begin + high]
        if low:
            moved[start:stop, :low] = lines[start:stop, :1]
        if high < count:
            moved[start:stop, high:] = lines[start:stop, -1:]
    return moved


def _runs(values: Int64[np.ndarray, "L"]) -> Iterator[tuple[int, int]]:
    """Where a value stays the same: start and stop."""
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    return itertools.pairwise([0, *changes.tolist(), len(values)])
