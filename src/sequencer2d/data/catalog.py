"""Data sets by name: what `--data` accepts, from the catalogue or a folder."""

import difflib
import os
from pathlib import Path
from typing import Any

import numpy as np

from sequencer2d.data.classes import CLASSES_FILE
from sequencer2d.data.folders import load_folder
from sequencer2d.data.sets import ArrayImages, FileImages, ImageData, ImageSet, split_names, split_off_val
from sequencer2d.data.shards import is_shards, load_shards
from sequencer2d.data.splits import stratified_split
from sequencer2d.data.tiny_imagenet import is_tiny_imagenet, load_tiny_imagenet

__all__ = [
    "DATA_NAMES",
    "ArrayImages",
    "FileImages",
    "ImageData",
    "ImageSet",
    "find_folder",
    "is_same_data",
    "load_data",
    "split_names",
]

DATA_NAMES = ("cifar10", "cifar100", "digits", "imagenet", "tiny-imagenet")
DEFAULT_ROOT = Path("data")
DIGITS_TEST_SEED = 0  # the test images stay the same whatever the seed of a run


def load_data(
    name: str,
    *,
    root: str | Path | None = None,
    val_fraction: float | None = 0.1,
    seed: int = 0,
    download: bool = True,
) -> ImageData:
    """Loads a data set: its class names and its train, validation and test images.

    Validation images that the data do not bring are split off the training images, class by class.

    Args:
        name: One of `DATA_NAMES`, or the path of an image folder (see `load_folder`) or of Tiny-ImageNet, or shards by
            path, URL or command (see `load_shards`).
        root: Folder of a data set of the catalogue, or the one that `prepare` was given. Default: `data` in the current
            folder; `imagenet` has none unless it was prepared there.
        val_fraction: Share of the training images that become validation images where none are given. None: none do.
        seed: Of that split.
        download: Whether CIFAR may be downloaded where it is missing.

    Raises:
        ValueError: An unknown name, a fraction outside (0, 1), or data that cannot be trained on.
        FileNotFoundError: The data, or a piece of them, are missing.
        ConnectionError: A download failed.
        ImportError: Shards in s3:// without the extra `shards`.
        OSError: A download could not be stored.

    Example: `load_data("digits").class_names[:3] == ("0", "1", "2")`
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 1")
    folder = DEFAULT_ROOT if root is None else Path(root).expanduser()
    match name:
        case "digits":
            return _load_digits(val_fraction, seed)
        case "cifar10" | "cifar100":
            from sequencer2d.data.cifar import load_cifar  # imports torchvision

            return load_cifar(name, folder, val_fraction=val_fraction, seed=seed, download=download)
        case "imagenet" | "tiny-imagenet" if prepared := _prepared(name, folder):
            return load_folder(prepared, val_fraction=val_fraction, seed=seed, name=name)
        case "imagenet":
            return _load_imagenet(None if root is None else folder, val_fraction, seed)
        case "tiny-imagenet":
            return load_tiny_imagenet(folder)
        case _:
            return _load_path(name, root, val_fraction, seed)


def is_same_data(name: str, other: str) -> bool:
    """Whether two names, given as for `load_data`, mean the same data set, wherever a catalogue's may lie; "": none."""
    return bool(other) and Path(name).expanduser().resolve() == Path(other).expanduser().resolve()


def find_folder(name: str, *, root: str | Path | None = None) -> Path:
    """The folder that holds the image files of a data set, given as for `load_data`. It need not exist.

    Raises:
        ValueError: An unknown name, or a data set that is not made of image files.
    """
    if name in ("tiny-imagenet", "imagenet"):
        folder = DEFAULT_ROOT if root is None else Path(root).expanduser()
        if prepared := _prepared(name, folder):
            return prepared
        if root is None and name == "imagenet":
            raise ValueError("imagenet: name its folder as root")
        return folder
    if name in DATA_NAMES:
        raise ValueError(
            f"{name}: not made of image files, and verified by its checksum; a folder of that name is ./{name}"
        )
    return _find_path(name, root)


def _prepared(name: str, root: Path) -> Path | None:
    """The folder of a data set as `prepare` made it, if it did."""
    return root / name if (root / name / CLASSES_FILE).is_file() else None


def _load_digits(val_fraction: float | None, seed: int) -> ImageData:
    """scikit-learn's handwritten digits: 1,797 images of 8×8, a fixed fifth of them for testing."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits: Any = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # levels 0 to 16
    names = [f"digits/{i:04d}" for i in range(len(grey))]
    images = ArrayImages(np.repeat(grey[..., None], 3, axis=-1), digits.target, names)
    rest, test = stratified_split(images.labels, 0.2, DIGITS_TEST_SEED)
    train, val, val_source = split_off_val(images.subset(rest), val_fraction, seed, of="train")
    return ImageData(
        name="digits",
        class_names=tuple(str(digit) for digit in digits.target_names),
        train=train,
        val=val,
        test=images.subset(test),
        val_source=val_source,
    )


def _load_imagenet(root: Path | None, val_fraction: float | None, seed: int) -> ImageData:
    layout = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG"
    if root is None:
        raise ValueError(f"imagenet: cannot be downloaded; name its folder, which holds {layout}, as root")
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        raise FileNotFoundError(f"{root}: not ImageNet, which holds {layout}")
    return load_folder(root, val_fraction=val_fraction, seed=seed, name="imagenet")


def _load_path(name: str, root: str | Path | None, val_fraction: float | None, seed: int) -> ImageData:
    if is_shards(name):
        if root is not None:
            raise ValueError(f"root={str(root)!r} is for the data sets of the catalogue; {name} are shards")
        return load_shards(name, val_fraction=val_fraction, seed=seed)
    path = _find_path(name, root)
    if is_tiny_imagenet(path):
        return load_tiny_imagenet(path)
    return load_folder(path, val_fraction=val_fraction, seed=seed)


def _find_path(name: str, root: str | Path | None) -> Path:
    path = Path(name).expanduser()
    if not name or (not path.exists() and os.sep not in name):
        near = difflib.get_close_matches(name.lower(), DATA_NAMES, cutoff=0.4)
        guess = f"; did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(f"unknown data set {name!r}{guess} Known: {', '.join(DATA_NAMES)}; or give a folder's path")
    if root is not None:
        raise ValueError(f"root={str(root)!r} is for the data sets of the catalogue; {name} is a folder of its own")
    return path
