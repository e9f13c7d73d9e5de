"""Asking a web server with patience: what may pass is asked for again, after a pause; what will not is said at once.

`fetch` reads parts of shards through it, `download` whole files.
"""

import http.client
import logging
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from email.message import Message
from threading import Event

CHUNK_BYTES = 2**16
"""What one read may lose when the connection breaks."""
PASSING_STATUSES = frozenset({408, 425, 429})
"""Beside those from 500 on."""

log = logging.getLogger(__name__)


class Trouble(Exception):
    """A failure that may pass; `wait_s` is how long the server wants to be left alone."""

    def __init__(self, reason: object, wait_s: float = 0.0) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.wait_s = wait_s


class Unreachable(Trouble):
    """Nobody answered."""


class Refused(Exception):
    """An answer that another attempt would meet again."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | Message | None = None) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers if headers is not None else {}


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a server is waited for."""

    attempts: int = 6
    """Failures in a row, without one new byte in between, until it is given up."""
    timeout_s: float = 30.0
    """Silence that counts as a failure."""
    first_delay_s: float = 0.5
    """Pause after the first failure; it doubles with each further one."""
    max_delay_s: float = 30.0


@dataclass(kw_only=True)
class Attempts:
    """Counts the failures in a row, and waits after each."""

    what: str
    """What is asked for, for the log."""
    patience: Patience
    stop: Event = field(default_factory=Event)
    """Set by another thread, ends the pause."""
    failures: int = 0

    def failed(self, trouble: Trouble, *, progress: bool) -> None:
        """Waits for the next attempt; `progress`: some bytes came.

        Raises:
            Trouble: Patience is at its end.
        """
        self.failures = 0 if progress else self.failures + 1
        if self.failures >= self.patience.attempts:
            raise trouble
        delay_s = self.patience.first_delay_s * 2 ** max(self.failures - 1, 0)
        delay_s = min(max(delay_s, trouble.wait_s), self.patience.max_delay_s)
        log.warning("%s: %s; asking again in %.1f s", self.what, trouble, delay_s)
        self.stop.wait(delay_s)


def ask(url: str, headers: Mapping[str, str], timeout_s: float) -> http.client.HTTPResponse:
    """Sends a request; the answer is a good one, of which nothing has been read yet.

    Raises:
        Trouble, Refused: It is not.
    """
    headers = {"User-Agent": "sequencer2d", "Accept-Encoding": "identity", **headers}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            raise refusal(error.code, error.reason, error.headers) from error
    except urllib.error.URLError as error:
        silent = isinstance(error.reason, TimeoutError | ConnectionResetError)
        raise (Trouble if silent else Unreachable)(error.reason) from error
    except (http.client.HTTPException, OSError) as error:
        raise Trouble(error) from error


def refusal(status: int, reason: str, headers: Mapping[str, str] | Message | None = None) -> Trouble | Refused:
    """What a status other than 200 and 206 means: worth another attempt, or final."""
    if status not in PASSING_STATUSES and status < 500:
        return Refused(status, reason, headers)
    wait = (headers.get("Retry-After") if headers is not None else "") or ""
    return Trouble(f"the server answered {status} {reason}".rstrip(), float(wait) if wait.isdecimal() else 0.0)


def pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body of an answer as it comes; closes the answer.

    Raises:
        Trouble: The connection broke, or ended before all came that the server had promised.
    """
    expected, came = content_length(response), 0
    with closing(response):
        try:
            while piece := response.read1(CHUNK_BYTES):
                came += len(piece)
                yield piece
        except (http.client.HTTPException, OSError) as error:
            raise Trouble(error) from error
    if expected is not None and came < expected:
        raise Trouble(f"the connection ended after {came:,} of {expected:,} bytes")


def content_length(response: http.client.HTTPResponse) -> int | None:
    """Bytes of the body, if the server says so."""
    length = response.headers.get("Content-Length") or ""
    return int(length) if length.isdecimal() else None


def content_range(header: str | None) -> tuple[int | None, int | None]:
    """First byte and length of the whole in `bytes 500-999/1000`, `bytes 500-999/*` or `bytes */1000`."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", header or "")
    if match is None:
        return None, None
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] != "*" else None
