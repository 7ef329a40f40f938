"""A small server that speaks as much of S3 as a remote needs, and can misbehave.

It keeps objects in memory, counts every request, and refuses what a remote never asks for.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

Fault = int | str | None
"""A status, or `freeze`, `reset` (the connection breaks in the middle), `short` (so does the
object), `trickle` (a byte now and then); None for none."""


class Request(NamedTuple):
    """One request as the server saw it."""

    method: str
    name: str
    query: str


@dataclass
class S3Like:
    """The server's state.

    Attributes:
        port: Where it listens.
        objects: By name, without bucket and prefix.
        requests: All so far.
        fault: Asked before each.
        error: The code in what it says when it refuses.
        thawed: Set when what is frozen may end.
    """

    port: int = 0
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[Request], Fault] = lambda request: None
    error: str = "Made up"
    thawed: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        """What leads an S3 client here."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "key",
            "AWS_REGION": "us-east-1",
        }

    def misbehave(self, what: Fault, kind: str = "", method: str = "") -> None:
        """Suffer `what` at each request for an object of a kind (`a`, `b`, `c`, `p`)."""

        def fault(request: Request) -> Fault:
            concerned = request.name.startswith(f"pc1/{kind}") and method in ("", request.method)
            return what if concerned else None

        self.fault = fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: S3Like

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        state = self.state
        parts = urlsplit(self.path)
        name = parts.path.removeprefix("/bucket/prefix/").removeprefix("/mirror/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, name, parts.query)
        with state.lock:
            state.requests.append(request)
        fault = state.fault(request)
        if fault == "freeze":
            state.thawed.wait()
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._send(fault, f"<Error><Code>{state.error}</Code></Error>".encode())
            return
        if parts.query or self.command == "HEAD":
            self._send(400, b"")
        elif self.command == "PUT":
            with state.lock:
                is_there = name in state.objects
                if not is_there:
                    state.objects[name] = body
            if self.headers.get("If-None-Match") != "*":
                self._send(400, b"")
            else:
                self._send(412 if is_there else 200, b"")
        elif self.command == "DELETE":
            with state.lock:
                state.objects.pop(name, None)
            self._send(204, b"")
        elif name not in state.objects:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._send_object(state.objects[name], fault)

    def _send_object(self, content: bytes, fault: Fault) -> None:
        if fault == "short":
            content = content[: len(content) // 2]
        self._send(200, content if fault not in ("reset", "trickle") else b"", len(content))
        if fault == "reset":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif fault == "trickle":
            with suppress(OSError):
                for position in range(len(content)):
                    self.wfile.write(content[position : position + 1])
                    if self.state.thawed.wait(0.05):
                        break
            self.close_connection = True

    def _send(self, status: int, content: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()[:16]}"')
        self.send_header("Last-Modified", "Thu, 26 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Say nothing: clients that leave are part of the tests."""


@contextmanager
def s3_like() -> Iterator[S3Like]:
    """A server that runs while the block lasts."""
    state = S3Like()
    handler = type("Handler", (_Handler,), {"state": state})
    server = _Server(("127.0.0.1", 0), handler)
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.thawed.set()
        server.shutdown()
        server.server_close()
        thread.join()
