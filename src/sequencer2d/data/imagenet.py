"""ImageNet (ILSVRC2012) from its official archives: two tars of images, and the devkit that says what is in them."""

import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sequencer2d.data.archives import ArchiveError, Limits, open_archive, save, tar_members
from sequencer2d.data.download import Progress

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
META = "data/meta.mat"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"

DEVKIT_LIMITS = Limits(max_bytes=1 << 28, max_members=10_000)
IMAGE_LIMITS = Limits(max_bytes=1 << 39)


@dataclass(frozen=True, kw_only=True)
class Devkit:
    """What the archives of images must hold."""

    synonyms: dict[str, list[str]]
    """Names of each class by WordNet id; the ids are sorted."""
    num_train_images: dict[str, int]
    """By WordNet id."""
    val_wnids: list[str]
    """Class of each validation image; the first is that of `ILSVRC2012_val_00000001.JPEG`."""


def find_archives(source: Path) -> dict[str, Path]:
    """The three archives in a folder, by their official names.

    Raises:
        FileNotFoundError: Some are missing.
    """
    missing = [name for name in (DEVKIT, TRAIN, VAL) if not (source / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source}: lacks {', '.join(missing)}; download them from image-net.org with an account of yours"
        )
    return {name: source / name for name in (DEVKIT, TRAIN, VAL)}


def read_devkit(archive: Path) -> Devkit:
    """Reads `ILSVRC2012_devkit_t12.tar.gz`.

    Raises:
        ArchiveError: It is damaged, or does not hold what it should.
    """
    from scipy.io import loadmat  # takes a while to import

    found: dict[str, bytes] = {}
    with open_archive(archive, DEVKIT_LIMITS) as members:
        for member in members:
            piece = "/".join(PurePosixPath(member.name).parts[-2:])
            if piece in (META, GROUND_TRUTH):
                found[piece] = member.file.read()
    for piece in (META, GROUND_TRUTH):
        if piece not in found:
            raise ArchiveError(f"{archive}: lacks {piece}; it is not the devkit of ILSVRC2012, tasks 1 and 2")
    try:
        synsets: Any = np.atleast_1d(loadmat(io.BytesIO(found[META]), squeeze_me=True)["synsets"])
        leaves = sorted((row for row in synsets if int(row["num_children"]) == 0), key=lambda row: str(row["WNID"]))
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        val_wnids = [wnid_of[int(line)] for line in found[GROUND_TRUTH].split()]
        synonyms = {str(row["WNID"]): [word.strip() for word in str(row["words"]).split(",")] for row in leaves}
        counts = {str(row["WNID"]): int(row["num_train_images"]) for row in leaves}
    # a MATLAB file of another making fails in many ways
    except Exception as error:
        raise ArchiveError(f"{archive}: {META} or {GROUND_TRUTH} makes no sense ({error!r})") from error
    if len(synonyms) < 2 or set(val_wnids) != set(synonyms) or not all(map(_is_wnid, synonyms)):
        raise ArchiveError(f"{archive}: the classes of {META} and of {GROUND_TRUTH} are not the same")
    return Devkit(synonyms=synonyms, num_train_images=counts, val_wnids=val_wnids)


def unpack_train(archive: Path, devkit: Devkit, tree: Path, progress: Progress | None) -> int:
    """Unpacks the tar of one tar per class to `tree/train/<wnid>/`; returns the number of images.

    Raises:
        ArchiveError: Classes or images are missing, or there are others.
    """
    counts = Counter[str]()
    with open_archive(archive, IMAGE_LIMITS, progress) as members:
        for member in members:
            wnid = PurePosixPath(member.name).stem
            if wnid not in devkit.synonyms or not member.name.endswith(".tar"):
                raise ArchiveError(f"{archive}: {member.name} is not the tar of a class of the devkit")
            for image in tar_members(member.file, f"{archive}: {member.name}", IMAGE_LIMITS):
                if not re.fullmatch(rf"(.*/)?{wnid}_\d+\.JPEG", image.name):
                    raise ArchiveError(f"{archive}: {image.name} in {member.name} is not an image of that class")
                save(image.file, tree / "train" / wnid / PurePosixPath(image.name).name)
                counts[wnid] += 1
    for wnid, wanted in devkit.num_train_images.items():
        if counts[wnid] != wanted:
            raise ArchiveError(
                f"{archive}: {counts[wnid]:,} images of {wnid}, where the devkit counts {wanted:,}; fetch it again"
            )
    return counts.total()


def unpack_val(archive: Path, devkit: Devkit, tree: Path, progress: Progress | None) -> int:
    """Unpacks the flat tar to `tree/val/<wnid>/`, by the devkit's labels; returns the number of images.

    Raises:
        ArchiveError: Images are missing, or there are others.
    """
    seen = 0
    with open_archive(archive, IMAGE_LIMITS, progress) as members:
        for member in members:
            match = re.fullmatch(r"(?:.*/)?(ILSVRC2012_val_(\d{8})\.JPEG)", member.name)
            number = int(match[2]) if match else 0
            if match is None or not 1 <= number <= len(devkit.val_wnids):
                raise ArchiveError(f"{archive}: {member.name} is not a validation image that the devkit labels")
            save(member.file, tree / "val" / devkit.val_wnids[number - 1] / match[1])
            seen += 1
    if seen != len(devkit.val_wnids):
        raise ArchiveError(f"{archive}: {seen:,} images, where the devkit labels {len(devkit.val_wnids):,}")
    return seen


def _is_wnid(text: str) -> bool:
    return re.fullmatch(r"n\d+", text) is not None
