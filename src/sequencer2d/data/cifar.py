"""CIFAR-10 and CIFAR-100: torchvision's files and checksums, fetched so that an interruption does no harm."""

import logging
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, extract_archive

from sequencer2d.data.download import Progress, download
from sequencer2d.data.sets import ArrayImages, ImageData, split_off_val

DATASETS: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}

logger = logging.getLogger(__name__)


def load_cifar(name: str, root: Path, *, val_fraction: float | None, seed: int, download: bool) -> ImageData:
    """Loads CIFAR into memory, after downloading, verifying and unpacking it where that is still to be done.

    Validation images are split off the official training set; `test` is the official test set.

    Args:
        name: "cifar10" or "cifar100".
        root: Folder that contains, or will contain, the official archive and what it unpacks to.
        val_fraction: Share of validation images.
        seed: Of that split.
        download: Whether to download a missing archive.

    Raises:
        FileNotFoundError: The data are not there and `download` is off.
        ConnectionError: The download failed; the next call goes on where it ended.
        OSError: The data could not be written, say because the disk is full.
    """
    dataset = DATASETS[name]
    if not _is_whole(dataset, root):
        archive = root / dataset.filename
        if not check_integrity(archive, dataset.tgz_md5):
            if not download:
                raise FileNotFoundError(
                    f"{name}: not found in {root}; allow the download, or put {dataset.filename} there"
                )
            download_cifar(name, archive)
        _unpack(name, archive)

    with warnings.catch_warnings():  # NumPy 2.4.0 to 2.4.4 about the age of the official files
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
        given, test = (dataset(root, train=train) for train in (True, False))
    train, val, val_source = split_off_val(_images(given, f"{name}/train"), val_fraction, seed, of="train")
    return ImageData(
        name=name,
        class_names=tuple(given.classes),
        train=train,
        val=val,
        test=_images(test, f"{name}/test"),
        val_source=val_source,
        class_ids=tuple(name.replace("_", " ") for name in given.classes),  # as `prepare` has them
    )


def _images(dataset: CIFAR10, prefix: str) -> ArrayImages:
    names = [f"{prefix}/{i:05d}" for i in range(len(dataset))]
    return ArrayImages(np.ascontiguousarray(dataset.data), np.array(dataset.targets), names)


def _is_whole(dataset: type[CIFAR10], root: Path) -> bool:
    files = [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], dataset.meta["md5"]]]
    return all(check_integrity(root / dataset.base_folder / file, md5) for file, md5 in files)


def download_cifar(name: str, archive: Path, progress: Progress | None = None) -> None:
    """Fetches the official archive. An interrupted download leaves `<archive>.part`, and the next goes on there.

    torchvision's own download has no timeout, falls back to plain HTTP and begins anew each time.

    Raises:
        ConnectionError: The download failed.
        OSError: The archive could not be written.
    """
    dataset = DATASETS[name]
    logger.info("Downloading %s to %s", dataset.url, archive)
    next_step = f"Run again to go on, put {dataset.filename} into {archive.parent}, or train on an image folder"
    try:
        checksum = f"md5:{dataset.tgz_md5}"
        download(dataset.url, archive, checksum=checksum, next_step=next_step, progress=progress)
    except ConnectionError:
        raise
    except OSError as error:
        raise _write_error(name, archive.parent, error) from error


def _unpack(name: str, archive: Path) -> None:
    """Unpacks into a temporary folder, then moves the files one by one: each appears whole or not at all."""
    folder = archive.parent / DATASETS[name].base_folder
    try:
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=archive.parent) as temporary:
            extract_archive(archive, temporary)
            folder.mkdir(exist_ok=True)
            for file in Path(temporary, folder.name).iterdir():
                os.replace(file, folder / file.name)
    except OSError as error:
        raise _write_error(name, archive.parent, error) from error


def _write_error(name: str, folder: Path, error: OSError) -> OSError:
    return OSError(
        f"{name}: cannot be written to {folder}: {error.strerror or error}. Free some space or choose another folder"
    )
