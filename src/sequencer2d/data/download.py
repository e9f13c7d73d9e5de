"""Downloading one file: it goes on where it was interrupted, and takes its name once its checksum is right."""

import hashlib
import http.client
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from errno import ENOSPC
from pathlib import Path

from filelock import FileLock

from sequencer2d.files import write_atomic

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes that are done, and the bytes that there are (0: unknown)."""

CHUNK = 1 << 18
PASSING_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT_S = 60.0

logger = logging.getLogger(__name__)


class _DownloadError(Exception):
    """Trouble that another attempt would meet again."""

    def __init__(self, reason: object, wait_s: float = 0.0) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.wait_s = wait_s


class _PassingError(_DownloadError):
    """Trouble that may be over at the next attempt, after the `wait_s` that the server asks for."""


def download(
    url: str,
    path: Path,
    *,
    checksum: str,
    next_step: str,
    progress: Progress | None = None,
    timeout_s: float = 60.0,
    attempts: int = 6,
    backoff_s: float = 1.0,
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
        timeout_s: How long the server may be silent.
        attempts: How often in a row no byte more may come. A server that cannot be reached at all has one.
        backoff_s: Pause before the second attempt; it doubles with each.

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
            _fetch_patiently(url, part, progress, timeout_s, attempts, backoff_s)
            if not has_checksum(part, checksum):
                _discard(part)
                raise _DownloadError("what came is not the whole official file")
        except _DownloadError as error:
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


def _fetch_patiently(
    url: str, part: Path, progress: Progress | None, timeout_s: float, attempts: int, backoff_s: float
) -> None:
    """Attempts until `part` is complete. An attempt counts as failed unless the file got longer than ever before."""
    failed, longest = 0, _size(part)
    while True:
        try:
            return _fetch(url, part, progress, timeout_s)
        except _PassingError as error:
            size = _size(part)
            failed = 0 if size > longest else failed + 1
            longest = max(longest, size)
            if failed >= attempts:
                raise
            wait_s = min(max(backoff_s * 2 ** max(failed - 1, 0), error.wait_s), LONGEST_WAIT_S)
            logger.info("%s: %s; next attempt in %.0f s", part.stem, error, wait_s)
        time.sleep(wait_s)


def _fetch(url: str, part: Path, progress: Progress | None, timeout_s: float) -> None:
    """One request for what is missing of `part`."""
    mark = _mark_of(part)
    have = _size(part) if mark.is_file() else 0
    headers = {"User-Agent": "sequencer2d"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": mark.read_text(encoding="latin-1")}
    response = _open(urllib.request.Request(url, headers=headers), part, timeout_s)
    if response is None:
        return
    with response:
        if response.status == 206 and _content_range(response.headers)[0] != str(have):
            _discard(part)
            raise _PassingError("the server sent another range than it was asked for")
        if response.status != 206:  # all of it: the first request, no ranges here, or another version by now
            _discard(part)
            have = 0
            if version := _version(response.headers):
                write_atomic(mark, version.encode("latin-1"))
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else 0
        if total - have > shutil.disk_usage(part.parent).free:
            raise OSError(ENOSPC, os.strerror(ENOSPC), str(part))
        with open(part, "ab") as file:
            while chunk := _read(response):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(f"downloading {part.stem}", have, total)
    if have < total:
        raise _PassingError(f"the connection ended after {have:,} of {total:,} bytes")


def _open(request: urllib.request.Request, part: Path, timeout_s: float) -> http.client.HTTPResponse | None:
    """The answer of the server; `None` where it says that `part` is complete already.

    A server that cannot be reached fails at once, unless something has come from it before.
    """
    try:
        return urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and request.has_header("Range"):
                if _content_range(error.headers)[1] == str(_size(part)):
                    return None
                _discard(part)
                raise _PassingError("the file at the server is shorter than what has come") from error
            wait = error.headers.get("Retry-After") or ""
            if error.code in PASSING_STATUSES:
                reason = f"{error.code} {error.reason}"
                raise _PassingError(reason, float(wait) if wait.isdecimal() else 0.0) from error
            raise _DownloadError(error.reason) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError | ConnectionResetError) or _size(part):
            raise _PassingError(error.reason) from error
        raise _DownloadError(error.reason) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _PassingError(error) from error


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK)
    except (http.client.HTTPException, OSError) as error:
        raise _PassingError(error) from error


def _version(headers: Message) -> str | None:
    """What `If-Range` may compare: a strong ETag, or else the date."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _content_range(headers: Message) -> tuple[str, str]:
    """First byte and length of the whole in `Content-Range: bytes 500-999/1000`, or in `bytes */1000`."""
    span, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    return span.partition("-")[0], total


def _mark_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.mark")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _discard(part: Path) -> None:
    """The bytes first: without a mark they could not be told from another version's."""
    part.unlink(missing_ok=True)
    _mark_of(part).unlink(missing_ok=True)
