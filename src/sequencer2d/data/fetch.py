"""Bytes of a file, or of a part of it, from a disk, a command, a web server or an S3-compatible store.

What a network does is expected: a server that resets, stalls or is busy is asked again, for the bytes that are still
missing, and named when given up.
"""

import os
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from threading import Event
from typing import Any

from sequencer2d.data.web import (
    CHUNK_BYTES,
    Attempts,
    Patience,
    Refused,
    Trouble,
    ask,
    content_length,
    content_range,
    pieces,
    refusal,
)

PATIENCE = Patience()


class ShardError(ValueError):
    """Shards that are damaged or not those that were described; the message names the file and the next step."""


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
    url: str,
    *,
    start: int = 0,
    size: int | None = None,
    total: int | None = None,
    stop: Event | None = None,
    attempts: int | None = None,
) -> bytes:
    """Reads `size` bytes from `start` on, or all.

    Args:
        url: A path, `http(s)://…`, `s3://bucket/key`, or `pipe:` and a shell command that prints the file.
        start: First byte, from 0.
        size: Number of bytes; default: all from `start` on.
        total: Size that the whole file should have.
        stop: Set by another thread, ends the attempts.
        attempts: Failures in a row until it is given up; default: those of `PATIENCE`.

    Raises:
        FileNotFoundError, PermissionError, OSError: The file is missing or must not be read.
        ShardError: It is not `total` bytes long.
        ConnectionError: The server or the command failed too often, or its answer makes no sense.
        ImportError: s3:// without the extra `shards`.
        ValueError: s3:// is set up wrongly, such as for a profile that is not there.
    """
    read = _reader(url)
    stop = stop or Event()
    patience = PATIENCE if attempts is None else replace(PATIENCE, attempts=attempts)
    counted = Attempts(what=url, patience=patience, stop=stop)
    received = bytearray()
    while True:
        if size is None:
            received.clear()  # without a known end, a second answer may be another file than the first
        before = len(received)
        try:
            for chunk in read(url, start + before, None if size is None else size - before, total):
                received += chunk
                if stop.is_set():
                    break
            else:
                if size is None or len(received) == size:
                    return bytes(received)
                if len(received) > size:
                    raise ShardError(f"{url}: more bytes came than were asked for; the server is not to be trusted")
                raise Trouble(f"the connection ended after {len(received):,} of {size:,} bytes")
        except Refused as error:
            raise _refused(url, error) from error
        except Trouble as error:
            try:
                counted.failed(error, progress=size is not None and len(received) > before)
            except Trouble:
                raise ConnectionError(
                    f"{url}: given up after {counted.failures} attempts: {error}; see to the server, then continue "
                    "with --resume"
                ) from error
        if stop.is_set():
            raise ConnectionError(f"{url}: no longer wanted")


Reader = Callable[[str, int, int | None, int | None], Iterator[bytes]]
"""URL, first byte, number of bytes, size of the whole; yields the bytes in pieces, or raises `Trouble`."""


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
        raise Trouble(f"the command ended with status {done.returncode}" + "".join(f": {line}" for line in said))
    _check_total(url, len(done.stdout), total)
    yield done.stdout[start:] if size is None else done.stdout[start : start + size]


def _read_http(url: str, start: int, size: int | None, total: int | None) -> Iterator[bytes]:
    headers = {"Range": _range(start, size)} if start or size is not None else {}
    with closing(ask(url, headers, PATIENCE.timeout_s)) as response:
        if response.status == 206:
            _check_range(url, response.headers.get("Content-Range", ""), start, total)
            skip = 0
        else:  # a server that does not know ranges sends everything
            _check_total(url, content_length(response), total)
            skip = start
        came = 0
        for chunk in pieces(response):
            came += len(chunk)
            wanted = chunk[max(0, skip - (came - len(chunk))) :]
            if size is not None:
                wanted, size = wanted[:size], size - len(wanted[:size])
            if wanted:
                yield wanted
            if size == 0:
                return


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
        raise refusal(status, details.get("Message") or details.get("Code") or "") from error
    except NoCredentialsError as error:
        raise PermissionError(f"{url}: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and the secret") from error
    except BotoCoreError as error:
        raise Trouble(str(error)) from error


@lru_cache(maxsize=1)
def _s3_client(process: int) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise ImportError("s3:// needs boto3: pip install 'sequencer2d[shards]'") from error
    timeouts = {"connect_timeout": PATIENCE.timeout_s, "read_timeout": PATIENCE.timeout_s}
    try:
        return boto3.Session().client("s3", config=Config(**timeouts, retries={"total_max_attempts": 1}))
    except BotoCoreError as error:  # a profile that is not there, for one
        raise ValueError(f"s3:// cannot be used: {error}; see to AWS_PROFILE and ~/.aws/config") from error


def _range(start: int, size: int | None) -> str:
    return f"bytes={start}-{'' if size is None else start + size - 1}"


def _check_range(url: str, header: str, start: int, total: int | None) -> None:
    first, whole = content_range(header)
    if first != start:
        raise Trouble(f"asked for bytes from {start:,} on, the server answered {header!r}")
    _check_total(url, whole, total)


def _check_total(url: str, found: int | None, total: int | None) -> None:
    if found is not None and total is not None and found != total:
        raise ShardError(
            f"{url}: {found:,} bytes, where its list says {total:,}; copy it again, or write the shards again"
        )


def _refused(url: str, error: Refused) -> Exception:
    """What a final answer means for whoever wants the file."""
    if error.status == 404:
        return FileNotFoundError(f"{url}: not found; see to the address")
    if error.status in (401, 403):
        return PermissionError(f"{url}: the server answered {error.status} {error}; it wants credentials")
    if error.status == 416:
        return ShardError(f"{url}: shorter than its list says; copy it again, or write the shards again")
    return ConnectionError(f"{url}: the server answered {error.status} {error}")
