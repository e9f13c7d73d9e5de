"""Downloading one file: it goes on where it was interrupted, and takes its name once its checksum is right."""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from email.message import Message
from errno import ENOSPC
from pathlib import Path

from filelock import FileLock

from sequencer2d.data.web import (
    Attempts,
    Patience,
    Refused,
    Trouble,
    Unreachable,
    ask,
    content_length,
    content_range,
    pieces,
)
from sequencer2d.files import write_atomic

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes that are done, and the bytes that there are (0: unknown)."""

CHUNK = 1 << 18
PATIENCE = Patience(timeout_s=60, first_delay_s=1, max_delay_s=60)


def download(
    url: str,
    path: Path,
    *,
    checksum: str,
    next_step: str,
    progress: Progress | None = None,
    patience: Patience = PATIENCE,
) -> None:
    """Fetches a file, unless it is there already with the right checksum.

    What has come stands in `<name>.part`, with the server's mark of that version (ETag or date) in `<name>.part.mark`.
    The next attempt, in this call or in one after a kill, asks for the rest of this very version; where the server
    has another one by now, the file begins anew. Of two downloads to one path the second waits for the first.

    Args:
        url: `http:` or `https:`.
        path: Where the file goes. Its folder is made.
        checksum: `md5:` or `sha256:` and the hexadecimal digest.
        next_step: What to do where the download fails; it ends the message.
        progress: Called after every piece.
        patience: With the server. One that cannot be reached at all has a single attempt.

    Raises:
        ConnectionError: The file could not be fetched, or is not the one that the checksum is of.
        OSError: It could not be stored, say because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file() and has_checksum(path, checksum):
            return
        part = path.with_name(f"{path.name}.part")
        try:
            _fetch_patiently(url, part, progress, patience)
            if not has_checksum(part, checksum):
                _discard(part)
                raise Trouble("what came is not the whole official file")
        except (Trouble, Refused) as error:
            raise ConnectionError(f"{path.name}: cannot be downloaded from {url} ({error}). {next_step}") from error
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        _mark_of(part).unlink(missing_ok=True)


def has_checksum(path: Path, checksum: str) -> bool:
    """Whether a file has the checksum, given as `md5:` or `sha256:` and the hexadecimal digest."""
    algorithm, _, digest = checksum.partition(":")
    computed = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            computed.update(chunk)
    return computed.hexdigest() == digest


def _fetch_patiently(url: str, part: Path, progress: Progress | None, patience: Patience) -> None:
    """Attempts until `part` is complete. An attempt counts as failed unless the file got longer than ever before."""
    attempts, longest = Attempts(what=part.stem, patience=patience), _size(part)
    while True:
        try:
            return _fetch(url, part, progress, patience.timeout_s)
        except Trouble as error:
            size = _size(part)
            if isinstance(error, Unreachable) and not size:
                raise
            attempts.failed(error, progress=size > longest)
            longest = max(longest, size)


def _fetch(url: str, part: Path, progress: Progress | None, timeout_s: float) -> None:
    """One request for what is missing of `part`."""
    mark = _mark_of(part)
    have = _size(part) if mark.is_file() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": mark.read_text(encoding="latin-1")} if have else {}
    try:
        response = ask(url, headers, timeout_s)
    except Refused as error:
        if error.status != 416 or not have:
            raise
        if content_range(error.headers.get("Content-Range"))[1] == have:
            return
        _discard(part)
        raise Trouble("the file at the server is shorter than what has come") from error
    with closing(response):
        if response.status == 206 and content_range(response.headers.get("Content-Range"))[0] != have:
            _discard(part)
            raise Trouble("the server sent another range than it was asked for")
        if response.status != 206:  # all of it: the first request, no ranges here, or another version by now
            _discard(part)
            have = 0
            if version := _version(response.headers):
                write_atomic(mark, version.encode("latin-1"))
        length = content_length(response) or 0
        if length > shutil.disk_usage(part.parent).free:
            raise OSError(ENOSPC, os.strerror(ENOSPC), str(part))
        total = have + length if length else 0
        with open(part, "ab") as file:
            for piece in pieces(response):
                file.write(piece)
                have += len(piece)
                if progress is not None:
                    progress(f"downloading {part.stem}", have, total)


def _version(headers: Message) -> str | None:
    """What `If-Range` may compare: a strong ETag, or else the date."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _mark_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.mark")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _discard(part: Path) -> None:
    """The bytes first: without a mark they could not be told from another version's."""
    part.unlink(missing_ok=True)
    _mark_of(part).unlink(missing_ok=True)
