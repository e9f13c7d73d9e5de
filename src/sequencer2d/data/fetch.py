"""Bytes of a file, or of a part of it, from a disk, a command, a web server or an S3-compatible store.

What a network does is expected: a server that resets, stalls or is busy is asked again, for the bytes that are still
missing, and named when given up.
"""

import http.client
import logging
import os
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from threading import Event
from typing import Any

CHUNK_BYTES = 2**16
"""What one read may lose when the connection breaks."""

log = logging.getLogger(__name__)


class ShardError(ValueError):
    """Shards that are damaged or not those that were described; the message names the file and the next step."""


class _Trouble(Exception):
    """A failure that may pass; `delay_s` is how long the server wants to be left alone."""

    def __init__(self, reason: str, delay_s: float = 0) -> None:
        super().__init__(reason)
        self.delay_s = delay_s


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a server is waited for."""

    attempts: int = 6
    """Failures in a row, without one new byte in between, until it is given up."""
    timeout_s: float = 30
    """Silence that counts as a failure."""
    first_delay_s: float = 0.5
    """Pause after the first failure; it doubles with each further one."""
    max_delay_s: float = 30


PATIENCE = Patience()


def is_url(text: str) -> bool:
    """Whether this is no path of the file system but something else that `fetch` reads."""
    return text.startswith(("http://", "https://", "s3://", "pipe:"))


def check_url(url: str) -> None:
    """Raises ValueError for a URL with a password or key in it, as runs, logs and messages repeat it in clear."""
    if not is_url(url) or url.startswith("pipe:"):
        return
    parts = urllib.parse.urlsplit(url)
    if parts.username or parts.password:
        raise ValueError(f"{parts.scheme}://…@{parts.hostname}: leave the password out; a pipe: command can give it")
    if parts.query:
        raise ValueError(
            f"{parts.scheme}://{parts.netloc}{parts.path}?…: a signed address is good for one file; give an open one, "
            "or s3://bucket/prefix"
        )
    if not parts.netloc:
        raise ValueError(f"{url}: names no {'bucket' if parts.scheme == 's3' else 'server'}")


def fetch(
    url: str, *, start: int = 0, size: int | None = None, total: int | None = None, stop: Event | None = None
) -> bytes:
    """Reads `size` bytes from `start` on, or all.

    Args:
        url: A path, `http(s)://…`, `s3://bucket/key`, or `pipe:` and a shell command that prints the file.
        start: First byte, from 0.
        size: Number of bytes; default: all from `start` on.
        total: Size that the whole file should have.
        stop: Set by another thread, ends the attempts.

    Raises:
        FileNotFoundError, PermissionError, OSError: The file is missing or must not be read.
        ShardError: It is not `total` bytes long.
        ConnectionError: The server or the command failed too often, or its answer makes no sense.
        ImportError: s3:// without the extra `shards`.
    """
    read = _reader(url)
    stop = stop or Event()
    received = bytearray()
    failures = 0
    while True:
        if size is None:
            received.clear()  # without a known end, a second answer may be another file than the first
        before = len(received)
        delay_s = 0.0
        try:
            for chunk in read(url, start + before, None if size is None else size - before, total):
                received += chunk
                if stop.is_set():
                    raise ConnectionError(f"{url}: no longer wanted")
            if size is None or len(received) == size:
                return bytes(received)
            if len(received) > size:
                raise ShardError(f"{url}: more bytes came than were asked for; the server is not to be trusted")
            reason = f"the connection ended after {len(received):,} of {size:,} bytes"
        except _Trouble as error:
            reason, delay_s = str(error), error.delay_s
        failures = 1 if size is not None and len(received) > before else failures + 1
        if failures >= PATIENCE.attempts:
            raise ConnectionError(
                f"{url}: given up after {failures} attempts: {reason}; see to the server, then continue with --resume"
            )
        delay_s = min(max(delay_s, PATIENCE.first_delay_s * 2 ** (failures - 1)), PATIENCE.max_delay_s)
        log.warning("%s: %s; asking again in %.1f s", url, reason, delay_s)
        if stop.wait(delay_s):
            raise ConnectionError(f"{url}: no longer wanted")


Reader = Callable[[str, int, int | None, int | None], Iterator[bytes]]
"""URL, first byte, number of bytes, size of the whole; yields the bytes in pieces, or raises `_Trouble`."""


def _reader(url: str) -> Reader:
    if url.startswith("pipe:"):
        return _read_command
    if url.startswith("s3://"):
        return _read_s3
    return _read_http if is_url(url) else _read_file


def _read_file(path: str, start: int, size: int | None, total: int | None) -> Iterator[bytes]:
    with open(path, "rb") as file:
        _check_total(path, os.fstat(file.fileno()).st_size, total)
        file.seek(start)
        yield file.read() if size is None else file.read(size)


def _read_command(url: str, start: int, size: int | None, total: int | None) -> Iterator[bytes]:
    """The command starts from the beginning every time; a hanging one is the command's own affair."""
    done = subprocess.run(url.removeprefix("pipe:"), shell=True, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise _Trouble(f"the command ended with status {done.returncode}" + "".join(f": {line}" for line in said))
    _check_total(url, len(done.stdout), total)
    yield done.stdout[start:] if size is None else done.stdout[start : start + size]


def _read_http(url: str, start: int, size: int | None, total: int | None) -> Iterator[bytes]:
    headers = {"Accept-Encoding": "identity"}
    if start or size is not None:
        headers["Range"] = _range(start, size)
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=PATIENCE.timeout_s
        ) as response:
            expected = _number(response.headers.get("Content-Length"))
            if response.status == 206:
                _check_range(url, response.headers.get("Content-Range", ""), start, total)
                skip = 0
            else:  # a server that does not know ranges sends everything
                _check_total(url, expected, total)
                skip = start
            came = 0
            while chunk := response.read1(CHUNK_BYTES):
                came += len(chunk)
                wanted = chunk[max(0, skip - (came - len(chunk))) :]
                if size is not None:
                    wanted, size = wanted[:size], size - len(wanted[:size])
                if wanted:
                    yield wanted
                if size == 0:
                    return
            if expected is not None and came < expected:
                raise _Trouble(f"the connection ended after {came:,} of {expected:,} bytes")
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(url, error.code, error.reason, error.headers.get("Retry-After")) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _Trouble(str(reason) or type(reason).__name__) from error


def _read_s3(url: str, start: int, size: int | None, total: int | None) -> Iterator[bytes]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = _s3_client(os.getpid())  # a connection must not be shared with a forked process
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        options = {"Range": _range(start, size)} if start or size is not None else {}
        answer = client.get_object(Bucket=bucket, Key=key, **options)
        if options:
            _check_range(url, answer.get("ContentRange", ""), start, total)
        with closing(answer["Body"]) as body:
            yield from body.iter_chunks(CHUNK_BYTES)
    except ClientError as error:
        details = error.response.get("Error", {})
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        raise _refusal(url, status, details.get("Message") or details.get("Code") or "", None) from error
    except NoCredentialsError as error:
        raise PermissionError(f"{url}: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and the secret") from error
    except BotoCoreError as error:
        raise _Trouble(str(error)) from error


@lru_cache(maxsize=1)
def _s3_client(process: int) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise ImportError("s3:// needs boto3: pip install 'sequencer2d[shards]'") from error
    timeouts = {"connect_timeout": PATIENCE.timeout_s, "read_timeout": PATIENCE.timeout_s}
    return boto3.Session().client("s3", config=Config(**timeouts, retries={"total_max_attempts": 1}))


def _range(start: int, size: int | None) -> str:
    return f"bytes={start}-{'' if size is None else start + size - 1}"


def _number(header: str | None) -> int | None:
    return int(header) if header and header.isdecimal() else None


def _check_range(url: str, content_range: str, start: int, total: int | None) -> None:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
    if match is None or int(match[1]) != start:
        raise _Trouble(f"asked for bytes from {start:,} on, the server answered {content_range!r}")
    _check_total(url, None if match[2] == "*" else int(match[2]), total)


def _check_total(url: str, found: int | None, total: int | None) -> None:
    if found is not None and total is not None and found != total:
        raise ShardError(
            f"{url}: {found:,} bytes, where its list says {total:,}; copy it again, or write the shards again"
        )


def _refusal(url: str, status: int, reason: str, retry_after: str | None) -> Exception:
    """What a status of HTTP means: worth another attempt, or final."""
    if status in (408, 425, 429) or status >= 500:
        return _Trouble(f"the server answered {status} {reason}".rstrip(), delay_s=_number(retry_after) or 0)
    if status == 404:
        return FileNotFoundError(f"{url}: not found; see to the address")
    if status in (401, 403):
        return PermissionError(f"{url}: the server answered {status} {reason}; it wants credentials")
    if status == 416:
        return ShardError(f"{url}: shorter than its list says; copy it again, or write the shards again")
    return ConnectionError(f"{url}: the server answered {status} {reason}")
