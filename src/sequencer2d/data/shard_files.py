"""Tar files of samples: what is known of each, and which members belong together."""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import PurePosixPath
from tarfile import TarInfo
from typing import NamedTuple

from sequencer2d.data.fetch import ShardError

SPLITS = ("train", "val", "test")
_FILE = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*\.tar", re.ASCII)  # nothing that a shell could take for something else


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A tar file and the images in it; the lists have an entry per image, in the order of the file."""

    file: str
    """Name, in a folder at most."""
    split: str
    """train, val or test."""
    first_key: int
    """Key of the first sample; the others count on from it."""
    num_images: int
    size: int
    """Bytes of the tar file."""
    sha256: str
    """Empty where no more was read of the file than its headers."""
    labels: list[int]
    offsets: list[int]
    """First byte of each image in the tar file."""
    sizes: list[int]
    """Bytes of each image."""
    keys: list[str] | None = None
    """Of the samples, where they do not count on from `first_key`."""

    def __post_init__(self) -> None:
        if not _FILE.fullmatch(self.file):
            raise ValueError(f"file={self.file!r} must be the plain name of a tar file")
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} of {self.file} must be one of {', '.join(SPLITS)}")
        lists = (self.labels, self.offsets, self.sizes, *([self.keys] if self.keys is not None else []))
        if {self.num_images} != set(map(len, lists)):
            raise ValueError(f"{self.file}: labels, offsets and sizes must be {self.num_images} each")
        ranges = zip(self.offsets, self.sizes, strict=True)
        if any(start < 0 or size < 0 or start + size > self.size for start, size in ranges):
            raise ValueError(f"{self.file}: images must lie within its {self.size} bytes")

    def key(self, position: int) -> str:
        """Of the sample at a position in the file."""
        return f"{self.first_key + position:09d}" if self.keys is None else self.keys[position]


class Sample(NamedTuple):
    """Neighbouring members of a tar file whose names differ only after the first dot."""

    key: str
    """Their common name, with the folders in it."""
    members: dict[str, TarInfo]
    """By what follows: `.jpg`, `.cls`."""


def samples(file: BufferedReader | BytesIO, name: str) -> Iterator[Sample]:
    """The samples of an uncompressed tar file in their order. Only headers are read.

    Args:
        file: Can be sought.
        name: What messages call it.

    Raises:
        ShardError: A header is damaged, or the file is cut short.
    """
    key, found = "", dict[str, TarInfo]()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.partition(".")
                if not member.isreg() or not stem:
                    continue
                if found and key != str(path.with_name(stem)):
                    yield Sample(key, found)
                    found = {}
                key = str(path.with_name(stem))
                found[f".{ending.lower()}"] = member
            end = tar.offset
    except tarfile.TarError as error:
        raise ShardError(f"{name}: damaged ({error}); copy it again, or write the shards again") from error
    file.seek(end)
    while block := file.read(1 << 16):  # to tarfile, a damaged header is the end
        if block.strip(b"\0"):
            raise ShardError(f"{name}: damaged tar header at byte {end:,}; copy it again, or write the shards again")
    if found:
        yield Sample(key, found)
