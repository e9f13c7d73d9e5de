"""The official batch files of CIFAR, read without running what they contain.

They are pickles of Python 2. A pickle may name any function and have it called, so the checksum of a file is compared
first, and then an unpickler reads it that knows three names, those that NumPy arrays are stored with. Even these stand
for a class of ours that only keeps what the file says; no code of NumPy's sees the file before its sizes are checked.
"""

import hashlib
import io
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from sequencer2d.data.cifar import DATASETS

SIDE = 32
"""Pixels."""


class BatchError(ValueError):
    """A file that is not the official one; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one file."""

    images: UInt8[np.ndarray, "N 32 32 3"]
    labels: Int64[np.ndarray, "N"]


def batch_files(name: str) -> dict[str, str]:
    """The split, "train" or "test", of each batch file of "cifar10" or "cifar100", in the official order."""
    dataset = DATASETS[name]
    splits = {"train": dataset.train_list, "test": dataset.test_list}
    return {file: split for split, files in splits.items() for file, _md5 in files}


def meta_file(name: str) -> str:
    """The file that names the classes."""
    return DATASETS[name].meta["filename"]


def read_batch(name: str, file: str, content: bytes) -> Batch:
    """Reads a batch file of "cifar10" or "cifar100".

    Args:
        name: The data set.
        file: Name of the file, as in the official archive.
        content: Of the file.

    Raises:
        BatchError: The checksum is not the official one, or the file does not hold what it should.
    """
    given = _unpickle(name, file, content)
    stored, labels = given.get(b"data"), given.get(b"labels", given.get(b"fine_labels"))
    pixels = stored.state[-1] if isinstance(stored, _Stored) and stored.state else None
    classes = 100 if name == "cifar100" else 10
    if (
        not isinstance(pixels, bytes)
        or not isinstance(labels, list)
        or len(pixels) != len(labels) * 3 * SIDE * SIDE
        or not all(type(label) is int and 0 <= label < classes for label in labels)
    ):
        raise BatchError(f"{file}: not images of 32×32 pixels with a label of {name} each")
    planes = np.frombuffer(pixels, dtype=np.uint8).reshape(-1, 3, SIDE, SIDE)
    return Batch(images=np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels=np.array(labels, dtype=np.int64))


def read_class_list(name: str, content: bytes) -> list[str]:
    """Reads the names of the classes from the content of `meta_file(name)`; the errors are those of `read_batch`."""
    file = meta_file(name)
    names = _unpickle(name, file, content).get(DATASETS[name].meta["key"].encode())
    if not isinstance(names, list) or not all(isinstance(word, bytes) for word in names):
        raise BatchError(f"{file}: names no classes")
    return [word.decode() for word in names]


class _Stored:
    """Stands in for an array, its type and its constructor: keeps what the file says of it, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ArrayUnpickler(pickle.Unpickler):
    """Lists, dictionaries, numbers, strings, and arrays as `_Stored`; anything else is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) in _ARRAY_NAMES:
            return _Stored
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no official file does")


_ARRAY_NAMES = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


def _unpickle(name: str, file: str, content: bytes) -> dict[bytes, Any]:
    dataset = DATASETS[name]
    official = [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], dataset.meta["md5"]]]
    if [file, hashlib.md5(content, usedforsecurity=False).hexdigest()] not in official:
        raise BatchError(f"{file}: not the official file of {name}: damaged, cut short, or of another set")
    return unpickle_arrays(file, content)


def unpickle_arrays(file: str, content: bytes) -> dict[bytes, Any]:
    """The dictionary in a pickle of Python 2, with its byte strings as they are.

    Raises:
        BatchError: It is no such pickle, or names anything but an array.
    """
    try:
        given = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    # the unpickler answers damaged input with EOFError, ValueError, KeyError, IndexError, TypeError and more
    except Exception as error:
        raise BatchError(f"{file}: cannot be read: {error or type(error).__name__}") from error
    if not isinstance(given, dict):
        raise BatchError(f"{file}: holds no dictionary")
    return given
