"""Rows and columns go where Pillow's transform takes them, in colours that are Pillow's to one grey level."""

import numpy as np
import pytest
from PIL import Image

from sequencer2d.data.shear import shear

FILL = (10, 200, 90)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (33, 64), (120, 50)])
@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_shears_and_shifts_are_pillows(axis: int, cubic: bool, shape: tuple[int, int]) -> None:
    """Of noise, where every error of place or weight shows. Halves, whole pixels and far outside among the shifts."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    before = image.copy()
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    differences = []
    for slope in (0.0, 0.27, -0.3, 1.0, -1.7):
        for shift in (0.0, 0.5, -0.5, 3.0, -7.3, 0.31 * shape[axis], 1.4 * shape[axis], -300.0):
            matrix = (1, slope, shift, 0, 1, 0) if axis == 1 else (1, 0, 0, slope, 1, shift)
            size = (shape[1], shape[0])
            pillow = Image.fromarray(image).transform(
                size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=FILL
            )
            offsets = slope * (np.arange(shape[1 - axis]) + 0.5) + shift
            ours = shear(image, offsets, axis=axis, cubic=cubic, fill=FILL)
            differences.append((ours.astype(int) - np.asarray(pillow)).ravel())
    assert np.abs(np.concatenate(differences)).max() <= 1
    assert abs(np.concatenate(differences).mean()) < 0.02  # no brighter, no darker
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_image_of_one_colour_keeps_it(axis: int, cubic: bool) -> None:
    for level in (0, 1, 254, 255):
        image = np.full((40, 40, 3), level, np.uint8)
        moved = shear(image, 0.29 * np.arange(40), axis=axis, cubic=cubic, fill=(level,) * 3)
        np.testing.assert_array_equal(moved, image)
