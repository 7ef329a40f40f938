"""A read-only mirror of a remote's folder over HTTP, in this process, that can be held up."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.waiting import until


class Mirror:
    """Serves the files of a folder.

    Attributes:
        url: Where it answers.
        asked: Paths of the requests so far.
        cut: How many requests ended because their client closed the connection.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self._ending = False
        self._held = ""
        self.asked: list[str] = []
        self.cut = 0
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                mirror.answer(self)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def blobs_asked(self) -> int:
        """Requests for blobs so far."""
        return sum(path.startswith("/pc1/b/") for path in self.asked)

    @contextlib.contextmanager
    def held_up(self, beginning: str) -> Iterator[None]:
        """Answer nothing to requests whose path begins so, until the end of the block."""
        self._held = beginning
        self._may_go_on.clear()
        try:
            yield
        finally:
            self._may_go_on.set()

    def stop(self) -> None:
        self._ending = True
        self._may_go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Send what a request asks for, once it may be sent."""
        self.asked.append(request.path)
        if request.path.startswith(self._held):
            self._may_go_on.wait()
        path = self._folder / request.path.lstrip("/")
        try:
            content = path.read_bytes()
        except OSError:
            request.send_error(404)
            return
        try:
            first, last = 0, len(content) - 1
            if said := request.headers.get("Range"):
                begin, _, end = said.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(last, int(end)) if end else last
            request.send_response(206 if said else 200)
            if said:
                request.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            request.send_header("Content-Length", str(last + 1 - first))
            request.send_header("ETag", f'"{len(content)}"')
            request.send_header("Last-Modified", request.date_time_string(0))
            request.end_headers()
            if request.command == "GET":
                request.wfile.write(content[first : last + 1])
        except ConnectionError:
            self.cut += 1


def wait_for_blobs(mirror: Mirror) -> None:
    """Wait until a blob is asked for."""
    until(lambda: mirror.blobs_asked() > 0, "no blob was asked for")
