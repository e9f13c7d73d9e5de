"""A download survives what networks do, and never puts another file, or half of one, under the name."""

import errno
import hashlib
import signal
import subprocess
import sys
import textwrap
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sequencer2d.data import download as module
from sequencer2d.data.download import download
from sequencer2d.data.web import Patience

CONTENT = bytes(i * i % 251 for i in range(100_000))
OTHER = bytes(reversed(CONTENT))


def checksum(content: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


class Server:
    """Serves one file; `script` says what happens to the first requests, one word each."""

    def __init__(self) -> None:
        self.content, self.etag, self.ranges, self.script = CONTENT, '"one"', True, list[str]()
        self.requests: list[str | None] = []
        self.release = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/file.bin"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers["Range"]
        self.requests.append(wanted)
        what = self.script.pop(0) if self.script else "whole"
        if what.isdecimal():
            request.send_response(int(what))
            request.send_header("Retry-After", "0")
            request.end_headers()
            return
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if not self.ranges or request.headers["If-Range"] != self.etag:
            first = 0
        if first and first >= len(self.content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(self.content)}")
            request.end_headers()
            return
        request.send_response(206 if first else 200)
        if first:
            first -= 100 * (what == "shifted")
            request.send_header("Content-Range", f"bytes {first}-{len(self.content) - 1}/{len(self.content)}")
        if self.etag:
            request.send_header("ETag", self.etag)
        request.send_header("Content-Length", str(len(self.content) - first))
        request.end_headers()
        end = first + 30_000 if what in ("reset", "stall") else None
        request.wfile.write(self.content[first:end])
        if what == "stall":
            request.wfile.flush()
            self.release.wait(10)

    def close(self) -> None:
        self.release.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def fetch(server: Server, path: Path, content: bytes = CONTENT, **options) -> None:
    progress = options.pop("progress", None)
    patience = Patience(**{"timeout_s": 5.0, "first_delay_s": 0.001, **options})
    download(server.url, path, checksum=checksum(content), next_step="Do that", progress=progress, patience=patience)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_whole_file_once_with_progress(server: Server, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    path = tmp_path / "made/for/it" / "file.bin"
    fetch(server, path, progress=lambda *call: calls.append(call))
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["file.bin"]
    assert calls[-1] == ("downloading file.bin", len(CONTENT), len(CONTENT))
    fetch(server, path)
    assert server.requests == [None]
    server.content = OTHER
    fetch(server, path, OTHER)  # another checksum is another file
    assert path.read_bytes() == OTHER


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_checksums(algorithm: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    assert module.has_checksum(tmp_path / "a", checksum(CONTENT, algorithm))
    assert not module.has_checksum(tmp_path / "a", checksum(OTHER, algorithm))


def test_resets_are_resumed_however_many_as_long_as_bytes_come(server: Server, tmp_path: Path) -> None:
    server.script = ["reset"] * 3
    fetch(server, tmp_path / "file.bin", attempts=2)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]


def test_a_server_without_ranges_is_not_asked_for_ever(server: Server, tmp_path: Path) -> None:
    server.ranges, server.script = False, ["reset"] * 50
    with pytest.raises(ConnectionError, match=r"the connection ended after 30,000 of 100,000 bytes"):
        fetch(server, tmp_path / "file.bin", attempts=3)
    assert len(server.requests) == 4  # the first brought something
    server.script = ["reset"]
    fetch(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("status", ["429", "500", "503"])
def test_busy_server_is_asked_again(status: str, server: Server, tmp_path: Path) -> None:
    server.script = [status, "reset", status, "whole"]
    fetch(server, tmp_path / "file.bin", attempts=2)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_busy_for_too_long_then_run_again(server: Server, tmp_path: Path) -> None:
    server.script = ["reset", *["503"] * 3]
    with pytest.raises(ConnectionError) as error:
        fetch(server, tmp_path / "file.bin", attempts=3)
    message = f"file.bin: cannot be downloaded from {server.url} (the server answered 503 Service Unavailable). Do that"
    assert str(error.value) == message
    assert names(tmp_path) == ["file.bin.part", "file.bin.part.mark"]
    fetch(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert names(tmp_path) == ["file.bin"]
    assert server.requests[-1] == "bytes=30000-"


@pytest.mark.parametrize("status", ["403", "404"])
def test_refused_for_good(status: str, server: Server, tmp_path: Path) -> None:
    server.script = [status] * 9
    with pytest.raises(ConnectionError, match="cannot be downloaded"):
        fetch(server, tmp_path / "file.bin")
    assert len(server.requests) == 1


def test_silence_is_a_reset(server: Server, tmp_path: Path) -> None:
    server.script = ["stall"]
    fetch(server, tmp_path / "file.bin", timeout_s=0.3)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=30000-"]


@pytest.mark.parametrize("mark", ['"two"', 'W/"weak"', ""])
def test_changed_file_begins_anew(mark: str, server: Server, tmp_path: Path) -> None:
    server.script = ["reset", *["404"] * 9]
    with pytest.raises(ConnectionError):
        fetch(server, tmp_path / "file.bin")
    server.content, server.etag, server.script = OTHER, mark, ["reset"]
    fetch(server, tmp_path / "file.bin", OTHER)
    assert (tmp_path / "file.bin").read_bytes() == OTHER


def test_a_weak_mark_is_none(server: Server, tmp_path: Path) -> None:
    server.etag, server.script = 'W/"weak"', ["reset"]
    fetch(server, tmp_path / "file.bin")
    assert server.requests == [None, None]


def test_bytes_without_a_mark_are_not_trusted(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(OTHER[:500])
    fetch(server, tmp_path / "file.bin")
    assert server.requests == [None]


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_all_bytes_there_or_too_many(extra: bytes, server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT + extra)
    (tmp_path / "file.bin.part.mark").write_text('"one"')
    fetch(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert len(server.requests) == (2 if extra else 1)


def test_another_range_than_asked_for(server: Server, tmp_path: Path) -> None:
    server.script = ["reset", "shifted"]
    fetch(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="not the whole official file"):
        fetch(server, tmp_path / "file.bin", OTHER)
    assert names(tmp_path) == []


def test_no_network_is_said_at_once(server: Server, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(ConnectionError, match=rf"cannot be downloaded from {server.url} \(.*refused\)\. Do that"):
        fetch(server, tmp_path / "file.bin", first_delay_s=60.0)


def test_a_file_that_does_not_fit_is_not_begun(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10, 10, 99_999))
    with pytest.raises(OSError, match="No space left") as error:
        fetch(server, tmp_path / "file.bin")
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["file.bin.part.mark"]


def test_interrupted_and_gone_on_with(server: Server, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    server.script = ["reset"]
    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path / "file.bin", progress=stop)
    fetch(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests[1].startswith("bytes=")  # pyright: ignore[reportOptionalMemberAccess]


def test_two_at_once_fetch_once(server: Server, tmp_path: Path) -> None:
    threads = [threading.Thread(target=fetch, args=(server, tmp_path / "file.bin")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == [None]


def test_killed_and_gone_on_with(server: Server, tmp_path: Path) -> None:
    """`kill -9` after so many bytes, again and again: every process adds to what the one before has left."""
    program = """
        import os, signal, sys
        from pathlib import Path
        from sequencer2d.data import download as module, web

        web.CHUNK_BYTES = 1000
        url, path, checksum = sys.argv[1:]
        pieces = 0

        def stop(what, done, total):
            global pieces
            pieces += 1
            if pieces == 25:
                os.kill(os.getpid(), signal.SIGKILL)

        module.download(url, Path(path), checksum=checksum, next_step="", progress=stop)
    """
    path = tmp_path / "file.bin"
    statuses = []
    while not statuses or (statuses[-1] and len(statuses) < 20):
        assert not path.exists()
        command = [sys.executable, "-c", textwrap.dedent(program), server.url, str(path), checksum(CONTENT)]
        statuses.append(subprocess.run(command, timeout=60, check=False).returncode)
    assert set(statuses[:-1]) == {-signal.SIGKILL}
    assert 3 <= len(statuses) <= 8
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["file.bin"]
    assert len(set(server.requests)) == len(statuses)  # each asked for another range
