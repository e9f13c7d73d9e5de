"""From what people have (official archives, unpacked folders, folders of their own) to one tree of class folders."""

import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path, PurePosixPath

from PIL import Image

from sequencer2d.data import cifar_batches, imagenet
from sequencer2d.data.archives import ArchiveError, Limits, open_archive, save
from sequencer2d.data.cifar import DATASETS, download_cifar
from sequencer2d.data.classes import CLASSES_FILE, distinct_names
from sequencer2d.data.download import Progress, download
from sequencer2d.data.folders import find_splits, image_files, is_hidden, load_folder, warn_of_unread
from sequencer2d.data.images import IMAGE_EXTENSIONS
from sequencer2d.data.sets import FileImages, ImageData
from sequencer2d.data.tiny_imagenet import ANNOTATIONS, FOLDER, is_tiny_imagenet, load_tiny_imagenet

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_CHECKSUM = "md5:90528d7ca1a48142e341f4ef8d21d0de"
OFFICIAL_SIZES = {"tiny-imagenet": (200, 100_000, 10_000), "imagenet": (1_000, 1_281_167, 50_000)}
"""Classes, training and validation images."""

CIFAR_LIMITS = Limits(max_bytes=1 << 29, max_members=1_000)
TINY_IMAGENET_LIMITS = Limits(max_bytes=1 << 31, max_members=200_000)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be laid out, and where."""

    name: str
    root: Path
    """Where downloads go."""
    source: Path | None
    """Archive or folder; only read. `None`: downloaded."""
    scratch: Path
    """Folder for what is needed on the way, on the disk of `tree`."""
    tree: Path
    """What becomes the data set."""
    val_fraction: float
    seed: int
    progress: Progress | None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What was laid out."""

    class_names: dict[str, str]
    """Human name of each class folder, in class order."""
    num_images: dict[str, int]
    """By split."""
    notes: tuple[str, ...] = ()
    """What the user should know."""


def lay_out_cifar(job: Job) -> Layout:
    """CIFAR-10 or CIFAR-100 as PNG files, pixel by pixel those of the official batches.

    Raises:
        ArchiveError: The archive is not the official one.
        FileNotFoundError: A folder holds neither the archive nor all of the batches.
        ConnectionError: The archive could not be downloaded.
    """
    splits = cifar_batches.batch_files(job.name)
    meta = cifar_batches.meta_file(job.name)
    source = job.source
    if source is None:
        source = job.root / DATASETS[job.name].filename
        download_cifar(job.name, source, job.progress)
    files: dict[str, bytes] = {}
    for file, content in _cifar_files(job, source, {*splits, meta}):
        files[file] = content
    missing = sorted({*splits, meta} - set(files))
    if missing:
        raise ArchiveError(f"{source}: not the official {job.name}: lacks {', '.join(missing)}")
    try:
        classes = cifar_batches.read_class_list(job.name, files[meta])
        counts = Counter[str]()
        done, total = 0, sum(len(files[file]) for file in splits)
        for file, split in splits.items():
            batch = cifar_batches.read_batch(job.name, file, files.pop(file))
            folders = [job.tree / split / class_name for class_name in classes]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            for number, (pixels, label) in enumerate(zip(batch.images, batch.labels.tolist(), strict=True)):
                Image.fromarray(pixels).save(folders[label] / f"{file}_{number:05d}.png")
                counts[split] += 1
                done += pixels.nbytes
                if job.progress is not None:
                    job.progress("writing images", done, total)
    except cifar_batches.BatchError as error:
        raise ArchiveError(f"{source}: {error}") from error
    names = {name: name.replace("_", " ") for name in sorted(classes)}
    return Layout(class_names=names, num_images=dict(counts))


def _cifar_files(job: Job, source: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    dataset = DATASETS[job.name]
    archive = source / dataset.filename if source.is_dir() else source
    if archive.is_file():
        with open_archive(archive, CIFAR_LIMITS, job.progress) as members:
            for member in members:
                if PurePosixPath(member.name).name in wanted:
                    yield PurePosixPath(member.name).name, member.file.read()
        return
    folder = source / dataset.base_folder if (source / dataset.base_folder).is_dir() else source
    for file in sorted(wanted):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{source}: holds neither {dataset.filename} nor {dataset.base_folder}/{file}")
        yield file, (folder / file).read_bytes()


def lay_out_tiny_imagenet(job: Job) -> Layout:
    """Tiny-ImageNet-200: folders are WordNet ids; the official test images, which have no labels, stay behind.

    Raises:
        ArchiveError: The archive is damaged, or of another set.
        FileNotFoundError, ValueError: A piece is missing or makes no sense; the message names it.
        ConnectionError: The archive could not be downloaded.
    """
    source, official = job.source, None
    if source is not None and source.is_dir():
        official = next((folder for folder in (source, source / FOLDER) if is_tiny_imagenet(folder)), None)
        if official is None and (source / f"{FOLDER}.zip").is_file():
            source = source / f"{FOLDER}.zip"
    elif source is None:
        source = job.root / f"{FOLDER}.zip"
        next_step = f"Run again to go on, or name {FOLDER}.zip, or the folder that it unpacks to, as the source"
        download(TINY_IMAGENET_URL, source, checksum=TINY_IMAGENET_CHECKSUM, next_step=next_step, progress=job.progress)
    if official is not None or source.is_dir():
        return _lay_out_official_tiny(job, official or source, move=False)
    unpacked = _unpack(job, source, TINY_IMAGENET_LIMITS, _is_labelled_tiny)
    try:
        return _lay_out_official_tiny(job, unpacked, move=True)
    except (FileNotFoundError, ValueError) as error:
        raise ArchiveError(str(error).replace(str(unpacked), str(source))) from error


def _is_labelled_tiny(path: PurePosixPath) -> bool:
    return "test" not in path.parts[:2] and not path.name.endswith("_boxes.txt")


def _lay_out_official_tiny(job: Job, official: Path, *, move: bool) -> Layout:
    data = load_tiny_imagenet(official)
    assert isinstance(data.train, FileImages)
    assert isinstance(data.val, FileImages)
    wnids = sorted({PurePosixPath(file).parts[1] for file in data.train.files})
    listed = {entry.name for entry in (official / "train").iterdir() if entry.is_dir()}
    if listed != set(wnids) or set(data.val.labels.tolist()) != set(range(len(wnids))):
        raise ValueError(f"{official}: wnids.txt, train and val do not have the same classes; fetch it again")
    if sorted(data.val.files) != image_files(official, official / "val/images"):
        raise ValueError(f"{official}/val: images and val_annotations.txt are not the same ones; fetch it again")
    for split, images in (("train", data.train), ("val", data.val)):
        counts = Counter(images.labels.tolist())
        usual = counts.most_common(1)[0][1]
        odd = [wnids[label] for label, count in counts.items() if count != usual]
        if odd:
            raise ValueError(f"{official}/{split}: {odd[0]} has not {usual} images as others have; fetch it again")
    plan = {
        official / file: PurePosixPath(split, wnids[label], PurePosixPath(file).name)
        for split, images in (("train", data.train), ("val", data.val))
        for file, label in zip(images.files, images.labels.tolist(), strict=True)
    }
    _place(job, plan, move=move)
    return Layout(
        class_names=dict(zip(wnids, data.class_names, strict=True)),
        num_images={"train": len(data.train), "val": len(data.val)},
        notes=(
            "the official test images have no labels and are left out",
            *size_notes("tiny-imagenet", len(wnids), len(data.train), len(data.val)),
        ),
    )


def lay_out_imagenet(job: Job) -> Layout:
    """ImageNet from the three official archives in the folder `job.source`: every class and image the devkit names.

    Raises:
        FileNotFoundError: An archive is missing.
        ArchiveError: An archive is damaged, or does not hold what the devkit says.
    """
    assert job.source is not None
    archives = imagenet.find_archives(job.source)
    devkit = imagenet.read_devkit(archives[imagenet.DEVKIT])
    images = [archives[imagenet.TRAIN], archives[imagenet.VAL]]
    require_space(job.root, sum(archive.stat().st_size for archive in images))
    train = imagenet.unpack_train(images[0], devkit, job.tree, job.progress)
    val = imagenet.unpack_val(images[1], devkit, job.tree, job.progress)
    return Layout(
        class_names=distinct_names(devkit.synonyms),
        num_images={"train": train, "val": val},
        notes=size_notes("imagenet", len(devkit.synonyms), train, val),
    )


def lay_out_folder(job: Job) -> Layout:
    """A folder of images, or an archive of one, in a layout that `load_folder` reads; without `val`, one is split off.

    Raises:
        ValueError: The layout is none, or the folder changed while it was read.
        ArchiveError: The archive is damaged or dangerous.
    """
    assert job.source is not None
    if job.source.is_dir():
        return _lay_out_folder(job, job.source, move=False)
    limits = Limits(max_bytes=(1 << 30) + 100 * job.source.stat().st_size)
    unpacked = _unpack(job, job.source, limits, _is_image_or_list)
    try:
        return _lay_out_folder(job, unpacked, move=True)
    except (FileNotFoundError, ValueError) as error:
        raise ArchiveError(str(error).replace(str(unpacked), str(job.source))) from error


def _is_image_or_list(path: PurePosixPath) -> bool:
    if any(map(is_hidden, path.parts)):
        return False
    return path.suffix.lower() in IMAGE_EXTENSIONS or path.name in _LISTS


_LISTS = (CLASSES_FILE, "wnids.txt", PurePosixPath(ANNOTATIONS).name)
"""Of classes, and those by which Tiny-ImageNet is known."""


def _lay_out_folder(job: Job, folder: Path, *, move: bool) -> Layout:
    def load() -> ImageData:
        return load_folder(folder, val_fraction=job.val_fraction, seed=job.seed)

    if is_tiny_imagenet(folder):
        raise ValueError(f"{folder}: Tiny-ImageNet as it is published; prepare it by its name, tiny-imagenet")
    data, depth = load(), 1 if find_splits(folder) else 0
    splits = {"train": data.train, "val": data.val, "test": data.test}
    plan, names, counts = dict[Path, PurePosixPath](), dict[str, str](), dict[str, int]()
    for split, images in splits.items():
        if images is None:
            continue
        assert isinstance(images, FileImages)
        counts[split] = len(images)
        for file, label in zip(images.files, images.labels.tolist(), strict=True):
            below = PurePosixPath(*PurePosixPath(file).parts[depth:])
            names[below.parts[0]] = data.class_names[label]
            plan[folder / file] = split / below
    _place(job, plan, move=move)
    if not move and _file_names(load()) != _file_names(data):
        raise _changed(folder)
    notes = () if data.val_source == "given" else (f"validation images: {data.val_source}",)
    return Layout(class_names=dict(sorted(names.items())), num_images=counts, notes=notes)


def _file_names(data: ImageData) -> list[str]:
    sets = [images for images in (data.train, data.val, data.test) if images is not None]
    return sorted(images.name(i) for images in sets for i in range(len(images)))


def size_notes(name: str, num_classes: int, num_train: int, num_val: int) -> tuple[str, ...]:
    """What to say of a set that is whole in itself, but not of the official size."""
    if (num_classes, num_train, num_val) == OFFICIAL_SIZES[name]:
        return ()
    classes, train, val = OFFICIAL_SIZES[name]
    return (
        f"only a part of {name}, consistent in itself: {num_classes:,} of {classes:,} classes, {num_train:,} of "
        f"{train:,} training and {num_val:,} of {val:,} validation images",
    )


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises OSError (ENOSPC) where so many bytes do not fit, before hours are spent on finding out."""
    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(ENOSPC, f"{os.strerror(ENOSPC)}, {num_bytes:,} bytes are needed", str(folder))


def _unpack(job: Job, archive: Path, limits: Limits, wanted: Callable[[PurePosixPath], bool]) -> Path:
    """Unpacks the wanted members into the scratch folder; returns the folder that holds them, without one around it."""
    require_space(job.root, archive.stat().st_size)
    unpacked = job.scratch / "unpacked"
    unpacked.mkdir()
    others = list[str]()
    with open_archive(archive, limits, job.progress) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if wanted(path):
                save(member.file, unpacked / member.name)
            elif not any(map(is_hidden, path.parts)):
                others.append(member.name)
    warn_of_unread(archive, others)
    inside = list(unpacked.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else unpacked


def _place(job: Job, plan: dict[Path, PurePosixPath], *, move: bool) -> None:
    """Copies files to their place in the tree, or moves them there from the scratch folder.

    Raises:
        ValueError: A file is not a regular one, or changed before all were copied.
    """
    if move:
        for source, target in plan.items():
            (job.tree / target).parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, job.tree / target)
        return
    before = {source: _fingerprint(source) for source in plan}
    total, done = sum(size for size, _ in before.values()), 0
    require_space(job.root, total)
    for source, target in plan.items():
        try:
            with open(source, "rb") as content:
                save(content, job.tree / target)
        except FileNotFoundError as error:
            raise _changed(source) from error
        done += before[source][0]
        if job.progress is not None:
            job.progress("copying", done, total)
    for source, target in plan.items():
        copied = (job.tree / target).stat().st_size
        if _fingerprint(source) != before[source] or copied != before[source][0]:
            raise _changed(source)


def _changed(path: Path) -> ValueError:
    return ValueError(f"{path}: changed while it was read; run again when nothing writes to it")


def _fingerprint(path: Path) -> tuple[int, int]:
    """Size and time of change of a regular file."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise _changed(path) from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not a regular file; remove it")
    return status.st_size, status.st_mtime_ns
