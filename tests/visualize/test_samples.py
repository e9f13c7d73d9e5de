"""The images that a report shows: wrong answers first, up to half, then right ones, drawn by the seed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sequencer2d.data.sets import ArrayImages
from sequencer2d.evaluation import Answers
from sequencer2d.visualize.samples import NUM_SAMPLES, Sample, draw_samples, write_samples

CLASS_NAMES = ("a cat", "dog/wolf")


def drawn(num_right: int, num_wrong: int, seed: int = 0) -> list[Sample]:
    """Of images of label 0 and 1 in turn, each all of its index in grey; the last one could not be read."""
    total = num_right + num_wrong
    labels = np.arange(total + 1) % 2
    pixels = np.broadcast_to(np.arange(total + 1, dtype=np.uint8)[:, None, None, None], (total + 1, 4, 4, 3))
    images = ArrayImages(pixels.copy(), labels, [f"{index}.png" for index in range(total + 1)])
    rows = np.arange(total)
    predicted = np.where(rows < num_right, labels[rows], 1 - labels[rows])
    answers = Answers(probabilities=np.eye(2, dtype=np.float32)[predicted] * 0.5 + 0.25, indices=rows)
    return draw_samples(images, answers, CLASS_NAMES, seed)


@pytest.mark.parametrize(
    ("num_right", "num_wrong", "shown_right", "shown_wrong"),
    [
        (60, 60, 12, 12), (50, 50, 12, 12), (60, 5, 19, 5), (50, 3, 21, 3), (5, 60, 5, 19), (5, 50, 5, 19),
        (3, 2, 3, 2), (0, 40, 0, 24), (0, 50, 0, 24), (40, 0, 24, 0), (0, 0, 0, 0),
    ],
)  # fmt: skip
def test_wrong_answers_come_first(num_right: int, num_wrong: int, shown_right: int, shown_wrong: int) -> None:
    samples = drawn(num_right, num_wrong)
    assert len(samples) <= NUM_SAMPLES
    assert [sample.is_right for sample in samples] == [False] * shown_wrong + [True] * shown_right
    assert len({sample.name for sample in samples}) == len(samples)


def test_a_sample_is_of_its_image() -> None:
    for sample in drawn(30, 30):
        index = int(sample.name.removesuffix(".png"))
        assert (sample.image == index).all()
        assert sample.label == CLASS_NAMES[index % 2]
        said = CLASS_NAMES[index % 2 if index < 30 else 1 - index % 2]
        assert sample.predictions[0] == (said, 0.75)


def test_the_seed_draws() -> None:
    first, again, other = ([sample.name for sample in drawn(60, 60, seed)] for seed in (1, 1, 2))
    assert first == again != other


def test_files_bear_number_and_class(tmp_path: Path) -> None:
    samples = drawn(1, 1)
    write_samples(tmp_path / "samples", samples)
    names = [path.name for path in sorted((tmp_path / "samples").iterdir())]
    assert names == ["00-dog_wolf.png", "01-a_cat.png"]
    write_samples(tmp_path / "long", [replace(samples[0], label="狗" * 200)])
    assert len(list((tmp_path / "long").iterdir())) == 1
    assert (np.asarray(Image.open(tmp_path / "samples" / names[0])) == samples[0].image).all()
