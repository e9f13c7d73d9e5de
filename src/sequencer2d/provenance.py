"""What did a model learn from? No image that it was trained on may measure it without a word."""

import json
import logging
from pathlib import Path

from sequencer2d.data.catalog import ImageData, ImageSet, is_same_data, split_names
from sequencer2d.weights import training_of
from sequencer2d.zoo import find_model_file

log = logging.getLogger("sequencer2d")


def check_split(run_dir: Path, data: ImageData) -> None:
    """Raises ValueError if the images are no longer those that the run split, since then its parts would mix."""
    saved = json.loads((run_dir / "split.json").read_text(encoding="utf-8"))
    now = split_names(data)
    if saved != now:
        before, after = ({name for names in split.values() for name in names} for split in (saved, now))
        raise ValueError(
            f"the images of {data.name} are not those that {run_dir} was trained on: {len(after - before)} are new and "
            f"{len(before - after)} are gone; restore them, or name other data for an evaluation, or another --run-dir"
        )


def learnt_images(run_dir: Path) -> set[str] | None:
    """Names of the images that a run's weights were learnt from; None where the folder is no run's."""
    file = run_dir / "split.json"
    return set(json.loads(file.read_text(encoding="utf-8"))["train"]) if file.exists() else None


def warn_of_seen(run_dir: Path, images: ImageSet, *, data: str, split: str) -> None:
    """Says so where images of other data than the training's may be the training's all the same.

    Args:
        run_dir: Where the model lies.
        images: What it is evaluated on.
        data: Name of the data set that they are of.
        split: Their part of it, which is not one that the data set was given with.
    """
    learnt = learnt_images(run_dir) or set()
    seen = sum(images.name(i) in learnt for i in range(len(images)))
    if seen:
        log.warning(
            "%s of these %s images are called as images that the model was trained on; if they are these, accuracy on "
            "them says too much",
            *(f"{seen:,}", f"{len(images):,}"),
        )
    elif split == "val":
        log.warning(
            "%s has no validation images: these %s are split off its training images, on which the model may have been "
            "trained; without --split all are evaluated",
            *(data, f"{len(images):,}"),
        )


def warn_of_other_split(weights: str, data: ImageData, *, source: str, seed: int, fraction: float) -> None:
    """Says so where the weights to start from were trained on images that validate them now.

    Args:
        weights: The model file, run or name that they come from.
        data: As loaded and split.
        source: Data set or folder that they were loaded from.
        seed: Of the split.
        fraction: Of the training images, for validation.
    """
    file = find_model_file(weights)
    before = training_of(file)
    if data.val_source == "given" or not is_same_data(source, before.get("data", "")):
        return
    its_seed, its_fraction = before.get("split_seed", before.get("seed")), before.get("val_fraction")
    learnt = learnt_images(file.parent)
    if learnt is None:
        overlaps = (its_seed, its_fraction) != (seed, fraction)
    else:
        overlaps = not learnt.isdisjoint(split_names(data)["val"])
    if overlaps:
        log.warning(
            "%s was trained on images that are for validation now, so that accuracy on these says too much; of the "
            "same images --split-seed %s --val-fraction %s makes its own split",
            *(weights, its_seed, its_fraction),
        )
