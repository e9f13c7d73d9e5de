"""Tiny-ImageNet-200 in its official layout, read where it lies: nothing is moved, renamed or written."""

from pathlib import Path

import numpy as np

from sequencer2d.data.classes import distinct_names
from sequencer2d.data.folders import image_files
from sequencer2d.data.sets import FileImages, ImageData

FOLDER = "tiny-imagenet-200"
ANNOTATIONS = "val/val_annotations.txt"


def is_tiny_imagenet(root: Path) -> bool:
    """Whether a folder has the official layout."""
    return (root / "wnids.txt").is_file() and (root / ANNOTATIONS).is_file()


def load_tiny_imagenet(root: Path) -> ImageData:
    """Reads `wnids.txt`, `words.txt`, `train/<wnid>/images/` and `val/images/` with `val/val_annotations.txt`.

    Classes are in the order of their WordNet ids. The official validation set is `val`; the official test images have
    no labels, so `test` is `None`.

    Args:
        root: The folder `tiny-imagenet-200`, or the one that contains it.

    Raises:
        FileNotFoundError: A piece of the layout is missing; the message names it.
        ValueError: A piece cannot be understood; the message names file and line.
    """
    if not is_tiny_imagenet(root) and (root / FOLDER).is_dir():
        root = root / FOLDER
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; unpack {FOLDER}.zip and give the folder that it makes")
    wnids = sorted(set(_read(root, "wnids.txt").split()))
    if len(wnids) < 2:
        raise ValueError(f"{root / 'wnids.txt'}: {len(wnids)} classes; two or more are needed")
    return ImageData(
        name="tiny-imagenet",
        class_names=_class_names(root, wnids),
        train=_train(root, wnids),
        val=_val(root, wnids),
        test=None,
        val_source="given",
    )


def _train(root: Path, wnids: list[str]) -> FileImages:
    files, labels = [], []
    for label, wnid in enumerate(wnids):
        found = image_files(root, _existing(root, f"train/{wnid}/images"))
        if not found:
            raise FileNotFoundError(f"{root}/train/{wnid}/images: no images; unpack {FOLDER}.zip again")
        files += found
        labels += [label] * len(found)
    return FileImages(root, files, np.array(labels))


def _val(root: Path, wnids: list[str]) -> FileImages:
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    existing = set(image_files(root, _existing(root, "val/images")))
    files, labels = [], []
    for number, line in enumerate(_read(root, ANNOTATIONS).splitlines(), start=1):
        file, wnid, *_box = line.split("\t") if "\t" in line else (line, "")
        if wnid not in label_of:
            raise ValueError(f"{root / ANNOTATIONS}:{number}: no class of wnids.txt in {line!r}")
        if f"val/images/{file}" not in existing:
            raise FileNotFoundError(f"{root}/val/images/{file}: missing; unpack {FOLDER}.zip again")
        files.append(f"val/images/{file}")
        labels.append(label_of[wnid])
    if not files:
        raise ValueError(f"{root / ANNOTATIONS}: the file is empty; unpack {FOLDER}.zip again")
    return FileImages(root, files, np.array(labels))


def _class_names(root: Path, wnids: list[str]) -> tuple[str, ...]:
    lines = (line.partition("\t") for line in _read(root, "words.txt").splitlines())
    wanted = set(wnids)
    synonyms = {wnid: [word.strip() for word in words.split(",")] for wnid, _, words in lines if wnid in wanted}
    missing = [wnid for wnid in wnids if wnid not in synonyms]
    if missing:
        raise ValueError(f"{root / 'words.txt'}: no line for {missing[0]}; unpack {FOLDER}.zip again")
    return tuple(distinct_names({wnid: synonyms[wnid] for wnid in wnids}).values())


def _read(root: Path, file: str) -> str:
    return _existing(root, file).read_text(encoding="utf-8")


def _existing(root: Path, piece: str) -> Path:
    path = root / piece
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; unpack {FOLDER}.zip again")
    return path
