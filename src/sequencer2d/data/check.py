"""Checking a data set before it is trained on: what is wrong with it, and what is worth knowing."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sequencer2d.data.duplicates import MIN_CONTRAST, THUMBNAIL_BYTES, contrast, near_duplicates
from sequencer2d.data.images import MAX_ASPECT
from sequencer2d.data.inspection import Inspected, Picture, inspect_files
from sequencer2d.data.listing import Entry, Listing, list_folder
from sequencer2d.data.verdicts import load_verdicts, save_verdicts

KINDS: dict[str, tuple[bool, str]] = {
    "layout": (True, "training refuses the folder"),
    "unreadable": (True, "cannot be decoded; training leaves them out"),
    "empty class": (True, "class folders without images"),
    "leak": (True, "the same picture in two splits: accuracy is overstated"),
    "near leak": (True, "nearly the same picture in two splits: accuracy is overstated"),
    "conflict": (True, "the same picture in two classes"),
    "near conflict": (True, "nearly the same picture in two classes"),
    "duplicate": (False, "the same picture more than once in a class; a split may divide them"),
    "near duplicate": (False, "nearly the same picture more than once in a class; a split may divide them"),
    "imbalance": (False, "classes of very different size"),
    "missing class": (False, "classes of train without images in another split"),
    "unlabelled": (False, "images without a class or outside the splits, not trained on"),
    "extension": (False, "another format than the extension says; read all the same"),
    "mode": (False, "not 8-bit RGB in the file; converted"),
    "turned": (False, "stored turned or mirrored; set upright by their EXIF orientation"),
    "frames": (False, "more than one frame or page; the first is used"),
    "size": (False, "of an unusual size"),
    "blank": (False, "hardly any contrast; compared for equality only"),
}
"""What is found, whether it is wrong or just worth knowing, and what it means. The worst first."""

IMBALANCE = 3.0
"""The largest class has more than so many times the images of the smallest."""
COMMON_SIZE_SHARE = 0.9
"""If so many images share a size, the others are unusual."""
SMALL_SHARE = 0.25
"""Otherwise those are whose shorter side is below this part of the median, or which are longer than `MAX_ASPECT`."""

_FORMATS = {
    ".avif": {"AVIF"},
    ".bmp": {"BMP", "DIB"},
    ".gif": {"GIF"},
    ".jfif": {"JPEG", "MPO"},
    ".jpe": {"JPEG", "MPO"},
    ".jpeg": {"JPEG", "MPO"},  # MPO: a JPEG with further pictures behind it, as telephones write
    ".jpg": {"JPEG", "MPO"},
    ".pgm": {"PPM"},
    ".png": {"PNG"},
    ".ppm": {"PPM"},
    ".tif": {"TIFF"},
    ".tiff": {"TIFF"},
    ".webp": {"WEBP"},
}
_MODES = {
    "1": "black and white becomes grey RGB",
    "L": "grey becomes RGB",
    "LA": "grey becomes RGB, transparency is laid on white",
    "P": "palette becomes RGB, transparency is laid on white",
    "PA": "palette becomes RGB, transparency is laid on white",
    "RGBA": "transparency is laid on white",
    "CMYK": "inks become RGB",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something about a file, or about several together."""

    kind: str
    """One of `KINDS`."""
    files: tuple[str, ...]
    """Relative to the folder; for a class its folder, for the layout none."""
    reason: str

    @property
    def wrong(self) -> bool:
        """Whether it should be mended before training."""
        return KINDS[self.kind][0]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is known of a folder of images after a check."""

    root: Path
    num_images: int
    """Image files, unreadable ones included."""
    num_cached: int
    """Of these, how many were known from an earlier check."""
    class_counts: dict[str, dict[str, int]]
    """Image files of each class in each split."""
    formats: dict[str, int]
    modes: dict[str, int]
    sizes: dict[str, int]
    """How many images have each format, mode and `width×height`, the commonest first."""
    findings: tuple[Finding, ...]
    """In the order of `KINDS`."""
    other_files: tuple[str, ...]
    """Files that are no images by their extension."""

    @property
    def wrong(self) -> bool:
        """Whether there is anything that should be mended before training."""
        return any(finding.wrong for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, complete."""
        findings = [{"wrong": finding.wrong, **asdict(finding)} for finding in self.findings]
        return {**asdict(self), "root": str(self.root), "wrong": self.wrong, "findings": findings}


def check_folder(
    path: str | Path,
    *,
    workers: int | None = None,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Decodes every image of a folder and reports what is wrong and what is worth knowing; changes nothing in it.

    Wrong are files that cannot be decoded, empty classes, a layout that training refuses, and pictures that are in two
    splits or in two classes: equal in every pixel, or near duplicates (within the limits of `duplicates`: copies that
    were encoded again or slightly resized). Everything else is worth knowing.

    What was found is kept in the user's cache folder, also when Ctrl-C interrupts it, so that the next check looks at
    new and changed files only, and training leaves out the unreadable ones (see `verdicts.known_bad`).

    Args:
        path: Any folder of images, in a layout that `load_folder` reads or not, or Tiny-ImageNet in its official one.
        workers: Processes that decode; default: one per core. See `inspect_files` on scripts.
        cache: Whether to use and keep what was found out about each file.
        progress: Called with the number of images done and in all.

    Raises:
        FileNotFoundError, ValueError: There is no such folder, or no image in it.
        RuntimeError: A process died, say because the memory is full.

    Example: `check_folder("pets").wrong`
    """
    listing = list_folder(Path(path).expanduser())
    files = list(dict.fromkeys(entry.file for entry in listing.entries))
    known = load_verdicts(listing.root) if cache else {}
    verdicts = {file: known[file] for file in files if file in known}
    num_cached = len(verdicts)

    def advance(count: int = 0) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, len(files))

    done = num_cached
    advance()
    new = [file for file in files if file not in verdicts]
    try:
        for verdict in inspect_files(listing.root, new, workers=workers, progress=advance):
            verdicts[verdict.file] = verdict
    finally:  # Ctrl-C, too
        if cache and new:
            save_verdicts(listing.root, list(verdicts.values()))
    return _report(listing, verdicts, num_cached)


def _report(listing: Listing, verdicts: dict[str, Inspected], num_cached: int) -> Report:
    pictures = {file: found for file, v in verdicts.items() if isinstance(found := v.found, Picture)}
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for entry in listing.entries:
        if entry.split and entry.class_name:
            counts[entry.split][entry.class_name] = counts[entry.split].get(entry.class_name, 0) + 1
    findings = [
        *_of_layout(listing),
        *_of_classes(counts),
        *(
            f
            for v in verdicts.values()
            if isinstance(v.found, str)
            for f in [_finding("unreadable", [v.file], v.found)]
        ),
        *(finding for file, picture in pictures.items() for finding in _of_picture(file, picture)),
        *_of_sizes(pictures),
        *_of_duplicates(listing.entries, pictures),
    ]
    order = list(KINDS)
    return Report(
        root=listing.root,
        num_images=len(verdicts),
        num_cached=num_cached,
        class_counts=dict(counts),
        formats=_counted(picture.format for picture in pictures.values()),
        modes=_counted(picture.mode for picture in pictures.values()),
        sizes=_counted(f"{picture.width}×{picture.height}" for picture in pictures.values()),
        findings=tuple(sorted(findings, key=lambda finding: (order.index(finding.kind), finding.files))),
        other_files=listing.other_files,
    )


def _finding(kind: str, files: Sequence[str], reason: str) -> Finding:
    return Finding(kind=kind, files=tuple(files), reason=reason)


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _of_layout(listing: Listing) -> Iterator[Finding]:
    if listing.layout_problem:
        yield _finding("layout", [], listing.layout_problem)
    for message in listing.unreadable_folders:
        yield _finding("layout", [], message)
    for folder in listing.empty_classes:
        yield _finding("empty class", [folder], "no images; fill or remove it")
    for entry in listing.entries:
        if not entry.split or not entry.class_name:
            where = f"in {entry.split}, but without a class" if entry.split else "outside the splits"
            yield _finding("unlabelled", [entry.file], where)


def _of_classes(counts: dict[str, dict[str, int]]) -> Iterator[Finding]:
    for split, of_class in counts.items():
        (most, largest), (least, smallest) = (pick(of_class.items(), key=lambda item: item[1]) for pick in (max, min))
        if largest > IMBALANCE * smallest:
            yield _finding("imbalance", [split], f"{largest:,} images of {most}, {smallest:,} of {least}")
        for name in sorted(set(counts.get("train", {})) - set(of_class)):
            yield _finding("missing class", [split], f"no images of {name}")


def _of_picture(file: str, picture: Picture) -> Iterator[Finding]:
    extension = Path(file).suffix.lower()
    if picture.format not in _FORMATS[extension]:
        yield _finding("extension", [file], f"{picture.format} inside")
    if picture.mode != "RGB":
        what = _MODES.get(picture.mode, "scaled to 8 bits" if picture.mode[0] in "IF" else "becomes RGB")
        yield _finding("mode", [file], f"{picture.mode}: {what}")
    if picture.turned:
        yield _finding("turned", [file], f"{picture.width}×{picture.height} when upright")
    if picture.frames > 1:
        yield _finding("frames", [file], f"{picture.frames} frames")


def _of_sizes(pictures: dict[str, Picture]) -> Iterator[Finding]:
    if not pictures:
        return
    sizes = Counter((picture.width, picture.height) for picture in pictures.values())
    common, count = sizes.most_common(1)[0]
    median = float(np.median([min(picture.width, picture.height) for picture in pictures.values()]))
    for file, picture in pictures.items():
        size = picture.width, picture.height
        shown = f"{picture.width}×{picture.height}"
        if max(size) > MAX_ASPECT * min(size):
            yield _finding("size", [file], f"{shown}: only the middle is used")
        elif count >= COMMON_SIZE_SHARE * len(pictures):
            if size != common:
                yield _finding("size", [file], f"{shown}, where {common[0]}×{common[1]} is usual")
        elif min(size) < SMALL_SHARE * median:
            yield _finding("size", [file], f"{shown}, where the median of the shorter sides is {median:g}")


def _of_duplicates(entries: Sequence[Entry], pictures: dict[str, Picture]) -> Iterator[Finding]:
    """Groups of equal pictures, then groups of similar ones, of which each brings its equals along."""
    equal: dict[bytes, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.file in pictures:
            equal[pictures[entry.file].pixel_digest].append(entry)
    for group in equal.values():
        if len(group) > 1:
            same_bytes = len({pictures[entry.file].file_digest for entry in group}) == 1
            yield _of_group("", group, "the same file" if same_bytes else "the same pixels")
    distinct = list(equal.values())
    joined = b"".join(pictures[group[0].file].thumbnail for group in distinct)
    thumbnails = np.frombuffer(joined, np.uint8).reshape(-1, THUMBNAIL_BYTES)
    for near in near_duplicates(thumbnails):
        group = [entry for member in near.members for entry in distinct[member]]
        yield _of_group("near ", group, f"differ by {near.difference:.1f} of 255 levels in a small view")
    for index in np.flatnonzero(contrast(thumbnails) < MIN_CONTRAST):
        for entry in distinct[index]:
            yield _finding("blank", [entry.file], "nearly one level of grey all over")


def _of_group(near: str, group: list[Entry], reason: str) -> Finding:
    splits = sorted({entry.split for entry in group if entry.split})
    names = sorted({entry.class_name for entry in group if entry.class_name})
    kind = "leak" if len(splits) > 1 else "conflict" if len(names) > 1 else "duplicate"
    if len(splits) > 1:
        reason += f", in {' and '.join(splits)}"
    if len(names) > 1:
        reason += f", as {' and '.join(names)}"
    return _finding(near + kind, [entry.file for entry in group], reason)
