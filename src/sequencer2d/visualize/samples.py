"""A few images of a run with what its model makes of them, for the report and as files to try `predict` on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sequencer2d.data.sets import ImageSet
from sequencer2d.evaluation import Answers

NUM_SAMPLES = 24
MAX_SIDE = 256  # pixels
MAX_LABEL = 50  # characters of a file's name, which may have 255 bytes


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and what the model makes of it."""

    image: np.ndarray
    """uint8 `[H, W, 3]`."""
    name: str
    """File name or index, to find the image again."""
    label: str
    """Name of the true class."""
    predictions: tuple[tuple[str, float], ...]
    """Class names with their probabilities, best first."""

    @property
    def is_right(self) -> bool:
        """Whether the first prediction is the true class."""
        return self.predictions[0][0] == self.label


def draw_samples(images: ImageSet, answers: Answers, class_names: tuple[str, ...], seed: int) -> list[Sample]:
    """Up to 24 images, wrong answers first, then right ones, half and half where there are so many; the seed draws."""
    right = answers.probabilities.argmax(1) == images.labels[answers.indices]
    generator = np.random.default_rng(seed)
    wrong_rows, right_rows = (generator.permutation(np.flatnonzero(chosen)) for chosen in (~right, right))
    wrong_rows = wrong_rows[: max(NUM_SAMPLES // 2, NUM_SAMPLES - len(right_rows))]
    samples = []
    for row in [*wrong_rows, *right_rows[: NUM_SAMPLES - len(wrong_rows)]]:
        index = int(answers.indices[row])
        image = images.image(index)
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        best = np.argsort(-answers.probabilities[row])[:3]
        samples.append(
            Sample(
                image=np.asarray(image),
                name=images.name(index),
                label=class_names[images.labels[index]],
                predictions=tuple((class_names[k], float(answers.probabilities[row, k])) for k in best),
            )
        )
    return samples


def write_samples(folder: Path, samples: list[Sample]) -> None:
    """Writes the images as PNG files that are named after their number and class."""
    folder.mkdir(exist_ok=True)
    for number, sample in enumerate(samples):
        label = "".join(character if character.isalnum() else "_" for character in sample.label)[:MAX_LABEL]
        Image.fromarray(sample.image).save(folder / f"{number:02d}-{label}.png")
