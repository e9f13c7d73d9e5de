"""Every file below a data set's folder with its split and class, whatever is wrong with the layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sequencer2d.data.folders import (
    SPLIT_NAMES,
    VAL_NAMES,
    files_below,
    find_splits,
    image_files,
    is_image_file,
    load_folder,
)
from sequencer2d.data.folders import subfolders as subfolders_of
from sequencer2d.data.tiny_imagenet import ANNOTATIONS, FOLDER, is_tiny_imagenet, load_tiny_imagenet

ONE_TREE = "all"
"""Split of a tree of class folders without `train/`, which training divides itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """An image file. Whether it can be read is another matter."""

    file: str
    """POSIX path relative to the folder of the data set."""
    split: str | None
    """`train`, `val`, `test` or `ONE_TREE`; `None`: outside the splits."""
    class_name: str | None
    """Name of the class folder, or WordNet id; `None`: outside the class folders, or without a label."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies in the folder of a data set."""

    root: Path
    entries: tuple[Entry, ...]
    empty_classes: tuple[str, ...]
    """Class folders without images, relative to `root`."""
    other_files: tuple[str, ...]
    """Files that are no images by their extension; hidden ones are not among them."""
    unreadable_folders: tuple[str, ...]
    """One message for each folder that could not be listed."""
    layout_problem: str | None
    """Why training would refuse the layout."""


def list_folder(root: Path) -> Listing:
    """Lists an image folder, as `load_folder` reads it, or Tiny-ImageNet in its official layout.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: It is a file, or there is no image in it.
    """
    if not is_tiny_imagenet(root) and is_tiny_imagenet(root / FOLDER):
        root = root / FOLDER
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder")
    if not root.is_dir():
        raise ValueError(f"{root}: a file, where a folder of images is needed; unpack it first if it is an archive")
    errors: list[OSError] = []
    everything = files_below(root, root, errors.append)
    tiny = is_tiny_imagenet(root)
    splits = _splits(root)
    in_classes = _classes_of_tiny_imagenet(root, everything) if tiny else _classes(root, splits)
    entries = [Entry(file=file, split=split, class_name=name) for split, name, files in in_classes for file in files]
    listed = {entry.file for entry in entries}
    split_of_folder = {folder.name: split for split, folder in splits.items()}
    for file in everything:
        if is_image_file(file) and file not in listed:
            entries.append(Entry(file=file, split=split_of_folder.get(file.partition("/")[0]), class_name=None))
    if not entries:
        raise ValueError(f"{root}: no images; sort some into one folder per class")
    return Listing(
        root=root,
        entries=tuple(entries),
        empty_classes=tuple(f"{splits.get(split, root).name}/{name}" for split, name, files in in_classes if not files),
        other_files=tuple(
            file for file in everything if not is_image_file(file) and not (tiny and file.endswith(".txt"))
        ),
        unreadable_folders=tuple(f"{error.filename}: {error.strerror}" for error in errors),
        layout_problem=_layout_problem(root, tiny=tiny),
    )


ClassFiles = tuple[str, str, list[str]]
"""Split, class, and its image files."""


def _splits(root: Path) -> dict[str, Path]:
    """The folders of the splits; also of those that training refuses."""
    try:
        return find_splits(root)
    except ValueError:
        folders = {name: root / name for name in SPLIT_NAMES if (root / name).is_dir()}
        return {"val" if name in VAL_NAMES else name: folder for name, folder in folders.items()}


def _classes(root: Path, splits: dict[str, Path]) -> list[ClassFiles]:
    def in_order() -> Iterator[ClassFiles]:
        for split, parent in (splits or {ONE_TREE: root}).items():
            for folder in subfolders_of(parent):
                files = image_files(root, folder, on_error=lambda _: None)  # the walk of everything has noted it
                yield split, folder.name, files

    return list(in_order())


def _classes_of_tiny_imagenet(root: Path, everything: list[str]) -> list[ClassFiles]:
    """Labels of training images from their folders, of validation images from the annotations; test has none."""
    wnids = (root / "wnids.txt").read_text(encoding="utf-8", errors="replace").split()
    files: dict[tuple[str, str], list[str]] = {("train", wnid): [] for wnid in wnids}
    lines = (root / ANNOTATIONS).read_text(encoding="utf-8", errors="replace").splitlines()
    label_of = {f"val/images/{fields[0]}": fields[1] for line in lines if len(fields := line.split("\t")) > 1}
    for file in filter(is_image_file, everything):
        split, _, rest = file.partition("/")
        if split == "train" and "/" in rest:
            files.setdefault((split, rest.partition("/")[0]), []).append(file)
        elif file in label_of:
            files.setdefault((split, label_of[file]), []).append(file)
    return [(split, name, found) for (split, name), found in files.items()]


def _layout_problem(root: Path, *, tiny: bool) -> str | None:
    try:
        load_tiny_imagenet(root) if tiny else load_folder(root, val_fraction=0.5, seed=0)
    except (ValueError, OSError) as error:
        return str(error)
    return None
