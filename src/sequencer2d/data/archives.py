"""Reading archives that may be damaged or malicious: members one by one, checked before anything is written."""

import gzip
import io
import lzma
import os
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from sequencer2d.data.download import CHUNK, Progress

TAR_HEADERS_THAT_CARRY_TEXT = frozenset({tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"x", b"g", b"X"})
MAX_HEADER_BYTES = 1 << 20
MAX_PADDING_BYTES = 1 << 22
"""After the end of a tar; GNU tar pads to 10 KiB, other writers to more."""


class ArchiveError(ValueError):
    """An archive that is damaged, not what it should be, or dangerous to unpack; the message names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an archive may unpack to, so that a small one cannot fill the disk."""

    max_bytes: int
    """Of all members together."""
    max_members: int = 2_000_000
    """ImageNet has 1.3 million."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A regular file in an archive."""

    name: str
    """Relative POSIX path: not absolute, no `..`, and no other member's, not even in other case."""
    size: int
    """Bytes."""
    file: io.BufferedIOBase
    """Its content, readable until the next member is asked for."""


@contextmanager
def open_archive(path: Path, limits: Limits, progress: Progress | None = None) -> Iterator[Iterator[Member]]:
    """Opens a zip, or a tar as it is, gzipped or xz-compressed, and gives its regular files.

    Everything is checked that can be: the names, the kinds (no links, no devices), the sizes, the checksums inside
    the archive, its end, and that nobody changed it in the meantime.

    Args:
        path: The archive. It is only read.
        limits: What it may unpack to.
        progress: Called after every member with the bytes of the archive that are done.

    Raises:
        FileNotFoundError: There is no such file.
        ArchiveError: It cannot be trusted or read to its end; also for what the caller reads of a member.

    Example:
        with open_archive(path, Limits(max_bytes=10**9)) as members:
            sizes = {member.name: member.size for member in members}
    """
    with _damage_named(str(path)), open(path, "rb") as file:
        before = os.fstat(file.fileno())
        if zipfile.is_zipfile(file):
            yield _zip_members(file, path, limits, progress)
        else:
            yield _tar_members(file, path, limits, progress)
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ArchiveError(f"{path}: changed while it was read; run again when nothing writes to it")


def tar_members(file: io.BufferedIOBase, label: str, limits: Limits) -> Iterator[Member]:
    """The regular files of an uncompressed tar, such as one within a tar.

    Raises:
        ArchiveError: The tar cannot be trusted.
        tarfile.ReadError: It is cut short or damaged; `open_archive`, around it, makes an `ArchiveError` of that.
    """
    check = _Checks(label, limits)
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_StrictTarInfo) as tar:
        for info in tar:
            regular = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse()
            if not regular and not info.isdir():
                raise ArchiveError(
                    f"{label}: {info.name!r} is a link or a device, which no data set needs; not unpacked"
                )
            check(info.name, info.size)
            if regular:
                content = tar.extractfile(info)
                assert isinstance(content, io.BufferedIOBase)
                yield Member(name=_normal(info.name), size=info.size, file=content)


def _tar_members(file: io.BufferedReader, path: Path, limits: Limits, progress: Progress | None) -> Iterator[Member]:
    size = os.fstat(file.fileno()).st_size
    plain = _decompressed(file)
    for member in tar_members(plain, str(path), limits):
        yield member
        if progress is not None:
            progress(f"reading {path.name}", file.tell(), size)
    padding = 0
    while chunk := plain.read(1 << 16):  # to the end, where the checksum of a compressed file is
        padding += len(chunk)
        if padding > MAX_PADDING_BYTES:
            raise ArchiveError(f"{path}: goes on after its end; fetch it again")


def _decompressed(file: io.BufferedReader) -> io.BufferedIOBase:
    file.seek(0)
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file, mode="rb")
    return lzma.LZMAFile(file) if start == b"\xfd7zXZ\0" else file


def _zip_members(file: io.BufferedReader, path: Path, limits: Limits, progress: Progress | None) -> Iterator[Member]:
    check = _Checks(str(path), limits)
    size, done = os.fstat(file.fileno()).st_size, 0
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ArchiveError(
                    f"{path}: {info.filename!r} is a link or a device, which no data set needs; not unpacked"
                )
            name = _name_in_zip(info)
            check(name, info.file_size)
            if not name.endswith("/"):
                if info.flag_bits & 1:
                    raise ArchiveError(
                        f"{path}: {info.filename!r} is encrypted; unpack it yourself and give the folder"
                    )
                with archive.open(info) as content:
                    assert isinstance(content, io.BufferedIOBase)
                    yield Member(name=_normal(name), size=info.file_size, file=content)
            done += info.compress_size
            if progress is not None:
                progress(f"reading {path.name}", min(done, size), size)


def _name_in_zip(info: zipfile.ZipInfo) -> str:
    """The name as it was meant: macOS does not say that it writes UTF-8, Windows PowerShell parts folders by `\\`."""
    name, says_utf8 = info.filename, info.flag_bits & 0x800
    if not says_utf8 and not name.isascii():
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()  # from what zipfile took it for
    return name if "/" in name else name.replace("\\", "/")


class _StrictTarInfo(tarfile.TarInfo):
    """Without it, tarfile takes a damaged or missing header for the end, and reads headers of any length at once."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tarfile)
        except _END_OF_TAR:
            raise
        except _HEADER_ERROR as error:
            raise _TAR_ERROR(str(error)) from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> "_StrictTarInfo":
        info = super().frombuf(buf, encoding, errors)  # pyright: ignore[reportArgumentType]
        if info.type in TAR_HEADERS_THAT_CARRY_TEXT and info.size > MAX_HEADER_BYTES:
            raise _TAR_ERROR(f"a header of {info.size:,} bytes")
        return info


_TAR_ERROR, _HEADER_ERROR = tarfile.ReadError, tarfile.HeaderError
_END_OF_TAR = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue]


class _Checks:
    """Refuses members by their name, and too many or too large ones."""

    def __init__(self, label: str, limits: Limits) -> None:
        self.label, self.limits = label, limits
        self.names: set[str] = set()
        self.bytes = self.members = 0

    def __call__(self, name: str, size: int) -> None:
        self.bytes += size
        self.members += 1
        if self.bytes > self.limits.max_bytes or self.members > self.limits.max_members:
            raise ArchiveError(
                f"{self.label}: unpacks to more than {self.limits.max_bytes:,} bytes or {self.limits.max_members:,} "
                "files, which the data set does not have; not unpacked"
            )
        windows = PureWindowsPath(name)
        unsafe = name.startswith("/") or windows.drive or ".." in windows.parts or "\\" in name or "\0" in name
        if unsafe or not name:
            raise ArchiveError(f"{self.label}: {name!r} leads out of the folder it is unpacked to; not unpacked")
        folded = unicodedata.normalize("NFC", _normal(name)).casefold()
        if folded in self.names and not (name.endswith("/") or folded == "."):
            raise ArchiveError(f"{self.label}: {name!r} is there twice, or in other case; not unpacked")
        self.names.add(folded)


def _normal(name: str) -> str:
    return PurePosixPath(name).as_posix()


@contextmanager
def _damage_named(label: str) -> Iterator[None]:
    """Makes an `ArchiveError` of what Python's decoders say about damaged input."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError) as error:
        raise ArchiveError(f"{label}: not a zip or tar, cut short or damaged ({error}); fetch it again") from error
    except OSError as error:
        if error.errno is not None:  # not gzip's, but the disk's
            raise
        raise ArchiveError(f"{label}: damaged ({error}); fetch it again") from error


def save(content: io.BufferedIOBase, path: Path) -> None:
    """Writes what is left of a stream to a new file, in a folder that is made.

    Raises:
        FileExistsError: There is such a file already; nothing is ever overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        shutil.copyfileobj(content, file, CHUNK)
