"""A web server on loopback that knows ranges and, on demand, fails in the ways that servers do."""

import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseServer
from threading import Thread
from typing import Any


class FlakyServer(ThreadingHTTPServer):
    """Serves a folder. `faults[file]` are what goes wrong with the next requests for it, the first one first.

    A number is a status; "reset" breaks off in the middle of the answer, "stall" falls silent there, "no-range" answers
    with the whole file. A fault named under "*" happens every time, for any file.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.requests: list[tuple[str, str | None]] = []
        """Path and range of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self) -> list[str]:
        return [Path(path).name for path, _ in self.requests]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client has gone, as it should after a stall."""


class _Handler(BaseHTTPRequestHandler):
    server: BaseServer

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, FlakyServer)
        path = self.path.partition("?")[0]
        server.requests.append((path, self.headers.get("Range")))
        queue = server.faults[Path(path).name]
        always = server.faults["*"]
        fault = queue.pop(0) if queue else always[0] if always else None
        file = server.root / path.lstrip("/")
        if isinstance(fault, int) or not file.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        content = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = 0, len(content)
        if asked and fault != "no-range":
            start, end = int(asked[1]), min(int(asked[2] or len(content) - 1) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        part = content[start:end]
        self.wfile.write(part[: len(part) // 2] if fault in ("reset", "stall") else part)
        self.wfile.flush()
        if fault == "stall":
            time.sleep(3)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the tests quiet."""


@contextmanager
def flaky_server(root: Path) -> Iterator[FlakyServer]:
    with FlakyServer(root) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
