"""Copies are found whatever became of them; different pictures, noise and blank ones are not."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from sequencer2d.data.duplicates import contrast, near_duplicates, thumbnail


def scene(seed: int, side: int = 48) -> Image.Image:
    """As in photographs, the finer the details are, the fainter they are."""
    random = np.random.RandomState(seed)
    pixels = np.full((side, side, 3), 128.0)
    for cells, strength in ((3, 200), (6, 120), (12, 80), (side, 20)):
        details = Image.fromarray(random.randint(0, 256, (cells, cells, 3)).astype(np.uint8))
        pixels += strength * (np.asarray(details.resize((side, side), Image.Resampling.BICUBIC)) / 255 - 0.5)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.frombuffer(thumbnail(image), np.uint8) for image in images])


def members(images: list[Image.Image]) -> list[tuple[int, ...]]:
    return [group.members for group in near_duplicates(thumbnails(images))]


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image,
        lambda image: as_jpeg(image, 85),
        lambda image: as_jpeg(image, 50),
        lambda image: scaled(image, 0.9),
        lambda image: scaled(image, 1.2),
        lambda image: as_jpeg(scaled(image, 1.1), 75),
        lambda image: image.point(lambda level: min(255, level + 3)),
    ],
    ids=["same", "jpeg85", "jpeg50", "smaller", "larger", "larger jpeg", "brighter"],
)
def test_copies_are_found_and_nothing_else(change: Callable[[Image.Image], Image.Image]) -> None:
    images = [scene(seed) for seed in range(200)]
    found = members([*images, *map(change, images)])
    assert set(found) <= {(i, i + 200) for i in range(200)}
    assert len(found) >= 198


def test_different_pictures_are_not_duplicates() -> None:
    assert members([scene(seed) for seed in range(1000)]) == []


def test_a_group_joins_all_copies_and_tells_the_largest_difference() -> None:
    images = [scene(1), scene(2), as_jpeg(scene(1), 70), as_jpeg(scene(1), 40)]
    (group,) = near_duplicates(thumbnails(images))
    assert group.members == (0, 2, 3)
    assert 0 < group.difference < 8


@pytest.mark.parametrize("side", [8, 32, 224])
def test_noise_is_not_a_duplicate_of_other_noise(side: int) -> None:
    random = np.random.RandomState(0)
    pixels = random.randint(0, 256, (300 if side > 32 else 2000, side, side, 3), dtype=np.uint8)
    assert members([Image.fromarray(image) for image in pixels]) == []


def test_blank_and_faint_pictures_are_not_compared() -> None:
    random = np.random.RandomState(0)
    shade = np.linspace(195, 201, 32)[None, :, None]
    blank = [Image.fromarray((shade + random.randint(0, 2, (32, 32, 3))).astype(np.uint8)) for _ in range(200)]
    assert contrast(thumbnails(blank)).max() < 4
    assert members(blank) == []


def test_strokes_on_one_background_are_told_apart() -> None:
    """As digits are: most of the picture is alike, so only a difference relative to the contrast tells."""

    def stroke(column: int) -> Image.Image:
        pixels = np.zeros((28, 28, 3), dtype=np.uint8)
        pixels[4:24, column : column + 2] = 60
        return Image.fromarray(pixels)

    assert members([stroke(column) for column in range(4, 24, 2)]) == []


def test_another_colour_is_another_picture() -> None:
    pixels = np.asarray(scene(3))
    assert members([Image.fromarray(pixels), Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))]) == []


def test_a_film_of_one_scene_is_one_group() -> None:
    still = thumbnails([scene(4)])[0].astype(int)
    random = np.random.RandomState(0)
    film = (still + random.randint(-2, 3, (3000, len(still)))).clip(0, 255).astype(np.uint8)
    assert [len(group.members) for group in near_duplicates(film)] == [3000]


@pytest.mark.parametrize("count", [0, 1])
def test_few_pictures(count: int) -> None:
    assert near_duplicates(np.zeros((count, 304), dtype=np.uint8)) == []
    assert near_duplicates(thumbnails([scene(0)])[:count]) == []
