"""Folders of images, one sub-folder per class: split already (train/, val/, test/) or one tree that is split here."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from sequencer2d.data.classes import read_class_names
from sequencer2d.data.images import IMAGE_EXTENSIONS, UNREAD_EXTENSIONS
from sequencer2d.data.sets import FileImages, ImageData, split_off_val

log = logging.getLogger("sequencer2d")

VAL_NAMES = ("val", "valid", "validation")
SPLIT_NAMES = ("train", *VAL_NAMES, "test")
_SPELLINGS = (*SPLIT_NAMES, "training", "eval", "evaluation", "testing")
"""In lower case; others than `SPLIT_NAMES` are refused where they can only be splits."""


def load_folder(root: Path, *, val_fraction: float | None, seed: int, name: str | None = None) -> ImageData:
    """Reads the layout of an image folder: `train/` with `val/`, `test/` or both, or class folders alone.

    Every folder that holds images, however deep, belongs to the class folder above it. Validation images that are not
    given are split off `train/`, or off the one tree, class by class; `test/` is never touched. Classes are in the
    order of their folders, and called as these unless `classes.json` names them; `val/` and `test/` may lack some.

    Args:
        root: The folder. Nothing in it is changed.
        val_fraction: Share of validation images where none are given. None: all are for training.
        seed: Of that split.
        name: Name of the data set. Default: the folder's.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The layout, the classes or the number of images do not allow training. The message names the folder.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder")
    if not root.is_dir():
        raise ValueError(f"{root}: a file, where a folder of images is needed; unpack it first if it is an archive")
    splits = find_splits(root)
    train_folder = splits.get("train", root)
    train_files = scan_classes(root, train_folder)
    if len(train_files) < 2:
        raise ValueError(f"{train_folder}: only one class folder, {_listed(list(train_files))}; two or more are needed")
    classes = tuple(train_files)
    names = read_class_names(root, classes)
    if broken := [name for name in names if not _is_text(name)]:
        raise ValueError(f"{train_folder}: {_listed(list(map(ascii, broken)))}: not UTF-8; rename the class folders")
    train = _labelled(root, train_files, classes)
    test = _held_out(root, splits["test"], classes) if "test" in splits else None
    if "val" in splits:
        val, val_source = _held_out(root, splits["val"], classes), "given"
    else:
        if val_fraction is not None:
            _check_divisible(root, train_files)
        of = "train" if "train" in splits else "the images"
        train, val, val_source = split_off_val(train, val_fraction, seed, of=of)
    return ImageData(
        name=name or root.resolve().name,
        class_names=names,
        train=train,
        val=val,
        test=test,
        val_source=val_source,
        class_ids=classes,
    )


def scan_classes(root: Path, parent: Path) -> dict[str, list[str]]:
    """Files of each class folder in `parent`, relative to `root`; both in the order of their names."""
    folders = subfolders(parent)
    if not folders:
        hint = "; sort the images into one folder per class" if image_files(root, parent) else ""
        raise ValueError(f"{parent}: no class folders{hint}")
    below = {folder.name: files_below(root, folder) for folder in folders}
    warn_of_unread(parent, (file for found in below.values() for file in found))
    files = {class_name: [file for file in found if is_image_file(file)] for class_name, found in below.items()}
    empty = [class_name for class_name, found in files.items() if not found]
    if empty:
        raise ValueError(f"{parent}: no images in {_listed(empty)}; fill or remove the empty class folders")
    return files


def image_files(root: Path, folder: Path, on_error: Callable[[OSError], None] | None = None) -> list[str]:
    """Those of `files_below` that are images.

    Files are known by their extension alone: to ask the file system about each of ImageNet's would take minutes.
    """
    return [file for file in files_below(root, folder, on_error) if is_image_file(file)]


def files_below(root: Path, folder: Path, on_error: Callable[[OSError], None] | None = None) -> list[str]:
    """Files in a folder and below, sorted, as POSIX paths relative to `root`.

    Hidden files and folders, and those of systems, are left out. Links to folders are followed, but no folder is read
    twice, so that a link to a folder above ends there. A folder that cannot be read is an error, unless `on_error`
    takes it.
    """
    found = []
    visited = {os.path.realpath(folder)}

    def is_new(path: str) -> bool:
        real = os.path.realpath(path)
        new = real not in visited
        visited.add(real)
        return new

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=on_error or _raise):
        prefix = "" if Path(parent) == root else f"{Path(parent).relative_to(root).as_posix()}/"
        found += [f"{prefix}{file}" for file in files if not is_hidden(file)]
        folders[:] = [f for f in sorted(folders) if not is_hidden(f) and is_new(os.path.join(parent, f))]
    return sorted(found)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: hidden, or what systems put between them."""
    return name.startswith(".") or name in _OF_SYSTEMS


_OF_SYSTEMS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
"""What macOS adds to zips, Synology's thumbnails and waste bin, and the roots of disks under Windows and Linux."""


def is_image_file(file: str) -> bool:
    """Whether a file counts as an image, by its extension."""
    return _extension(file) in IMAGE_EXTENSIONS


def warn_of_unread(where: Path, files: Iterable[str]) -> None:
    """Says so, once, where some of the files are pictures of a format that is not read."""
    extensions = Counter(extension for extension in map(_extension, files) if extension in UNREAD_EXTENSIONS)
    if extensions:
        _warn_once(where, ", ".join(f"{count:,} {extension}" for extension, count in extensions.most_common()))


@cache
def _warn_once(where: Path, formats: str) -> None:
    log.warning("%s: left out, since their format is not read: %s; convert them to JPEG or PNG", where, formats)


def find_splits(root: Path) -> dict[str, Path]:
    """The folders of the splits under `train`, `val` and `test`; empty for one tree of class folders.

    A split is a folder of folders: a class may well be called "train" or "test".
    """
    folders = {folder.name: folder for folder in subfolders(root)}
    splits = {name: folders[name] for name in SPLIT_NAMES if name in folders}
    nested = [name for name, folder in splits.items() if subfolders(folder)]
    if "train" not in nested:
        if nested or (splits and len(splits) == len(folders)):
            raise ValueError(f"{root}: has {_listed(list(splits))}, but no train folder with class folders in it")
        if folders and all(name.lower() in _SPELLINGS and subfolders(folder) for name, folder in folders.items()):
            raise ValueError(f"{root}: {_listed(list(folders))}: call the folders of the splits train, val and test")
        return {}
    vals = [name for name in VAL_NAMES if name in splits]
    if len(vals) > 1:
        raise ValueError(f"{root}: {_listed(vals)} are all validation folders; keep one of them")
    return {"val" if name in VAL_NAMES else name: folder for name, folder in splits.items()}


def _held_out(root: Path, parent: Path, class_names: tuple[str, ...]) -> FileImages:
    files = scan_classes(root, parent)
    unknown = sorted(set(files) - set(class_names))
    if unknown:
        raise ValueError(f"{parent}: {_listed(unknown)} not among the classes of the train folder")
    return _labelled(root, files, class_names)


def _labelled(root: Path, files: dict[str, list[str]], class_names: tuple[str, ...]) -> FileImages:
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    labels = np.repeat([label_of[class_name] for class_name in files], [len(found) for found in files.values()])
    return FileImages(root, [file for found in files.values() for file in found], labels)


def _check_divisible(root: Path, files: dict[str, list[str]]) -> None:
    single = [class_name for class_name, found in files.items() if len(found) < 2]
    if single:
        raise ValueError(
            f"{root}: only one image in {_listed(single)}; splitting off validation images takes two or more per class"
        )


def subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)]
    return [folder / name for name in sorted(names)]


def _extension(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _is_text(name: str) -> bool:
    """Whether the bytes of a file's name are UTF-8, as what a model file holds must be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _raise(error: OSError) -> None:
    raise error
