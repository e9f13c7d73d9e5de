"""Making a data set ready for training: fetched, verified and laid out, or not there at all (see `scratch`)."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sequencer2d.data.classes import CLASSES_FILE, write_class_names
from sequencer2d.data.download import Progress
from sequencer2d.data.folders import scan_classes
from sequencer2d.data.layouts import (
    Job,
    Layout,
    lay_out_cifar,
    lay_out_folder,
    lay_out_imagenet,
    lay_out_tiny_imagenet,
)
from sequencer2d.data.scratch import made_whole

LAYOUTS: dict[str, Callable[[Job], Layout]] = {
    "cifar10": lay_out_cifar,
    "cifar100": lay_out_cifar,
    "imagenet": lay_out_imagenet,
    "tiny-imagenet": lay_out_tiny_imagenet,
}
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A data set that is ready."""

    folder: Path
    """`<root>/<name>`, an image folder with `classes.json`."""
    num_classes: int
    num_images: dict[str, int]
    """By split."""
    made: bool
    """Whether this call made it; it was there before otherwise, and was not touched."""
    notes: tuple[str, ...]
    """What the user should know, such as what was left out."""


def prepare(
    name: str,
    root: str | Path,
    source: str | Path | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Prepared:
    """Makes `<root>/<name>/{train,val,test}/<class>/<file>` and `classes.json`, unless they are there already.

    Interrupted at any instant it leaves nothing there or all of it; called again it finishes, or does nothing.

    Args:
        name: `cifar10`, `cifar100`, `tiny-imagenet`, `imagenet`, or any other name for images of yours.
        root: Folder that the data set, and downloads, go to. It is made.
        source: Only read. CIFAR, Tiny-ImageNet: the official archive, or what it unpacks to; they are downloaded
            without. ImageNet: the folder of its three archives. Other names: a folder of images (see `load_folder`), or
            a zip or tar of one.
        val_fraction: Share of the training images that become validation images in a folder of yours that has none.
        seed: Of that split.
        progress: Called with what is being done, the bytes that are done, and those that there are (0: unknown).

    Raises:
        ValueError: The name, the source or an option cannot be used; archives that are damaged or dangerous, too.
        FileNotFoundError: The source, or a piece of it, is missing.
        FileExistsError: Something else is at `<root>/<name>`.
        BlockingIOError: Another process is at it.
        ConnectionError: A download failed.
        OSError: Something could not be read or written.

    Example: `prepare("pets", "data", "downloads/pets.zip").num_images`
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 1")
    root = Path(root).expanduser()
    given = None if source is None else Path(source).expanduser()
    target = root / name
    _check_name(name, given)
    if given is not None:
        _check_source(given, target, is_tree=name not in LAYOUTS)
    with made_whole(target) as scratch:
        if scratch is None:
            return _ready(target)
        job = Job(
            name=name,
            root=root,
            source=given,
            scratch=scratch,
            tree=scratch / name,
            val_fraction=val_fraction,
            seed=seed,
            progress=progress,
        )
        layout = LAYOUTS.get(name, lay_out_folder)(job)
        write_class_names(job.tree, layout.class_names)
        _verify(job.tree, layout)
    return Prepared(
        folder=target,
        num_classes=len(layout.class_names),
        num_images=layout.num_images,
        made=True,
        notes=layout.notes,
    )


def _check_name(name: str, source: Path | None) -> None:
    if name == "digits":
        raise ValueError("digits: embedded, there is nothing to prepare; train on it as it is")
    if not re.fullmatch(r"\w[\w.+ -]*", name):
        raise ValueError(f"name={name!r} must be a plain name, such as pets; it becomes a folder in the root")
    if source is None and name == "imagenet":
        raise ValueError("imagenet: cannot be downloaded without an account; name the folder of its archives as source")
    if source is None and name not in LAYOUTS:
        near = difflib.get_close_matches(name.lower(), LAYOUTS, n=1, cutoff=0.4)
        guess = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"unknown data set {name!r}{guess} Known: {', '.join(LAYOUTS)}; images of yours need a source")


def _check_source(source: Path, target: Path, *, is_tree: bool) -> None:
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such archive or folder")
    if is_tree and source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target}: lies in the source, which is not to be changed; choose another root")


def _ready(target: Path) -> Prepared:
    """What an earlier call has made."""
    if not (target / CLASSES_FILE).is_file() or not (target / "train").is_dir():
        raise FileExistsError(f"{target}: there already, and not made by prepare; choose another root or name")
    found = {split: scan_classes(target, target / split) for split in SPLITS if (target / split).is_dir()}
    num_images = {split: sum(map(len, files.values())) for split, files in found.items()}
    return Prepared(
        folder=target,
        num_classes=len(found["train"]),
        num_images=num_images,
        made=False,
        notes=("it was there already and is unchanged; to make it anew, remove it first",),
    )


def _verify(tree: Path, layout: Layout) -> None:
    """Compares the tree on disk with what was to be laid out."""
    found = {split: scan_classes(tree, tree / split) for split in layout.num_images}
    assert list(found["train"]) == list(layout.class_names), "class folders"
    assert {split: sum(map(len, files.values())) for split, files in found.items()} == layout.num_images
