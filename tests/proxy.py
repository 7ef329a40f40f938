"""A TCP proxy in this process that is slow, and cuts what is too long."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Self

_PIECE = 1024


class Proxy:
    """Hands bytes on to a port of this machine.

    Attributes:
        url: Where it listens.
        delay_s: Before each KiB of an answer.
        cut_after: Bytes of an answer after which its connection is closed; None for never.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.delay_s = 0.0
        self.cut_after: int | None = None
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                for act in (self._ask, self._answer):
                    threading.Thread(target=act, args=(client, server), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError), server:
            while piece := client.recv(_PIECE):
                server.sendall(piece)

    def _answer(self, client: socket.socket, server: socket.socket) -> None:
        sent = 0
        with contextlib.suppress(OSError), client:
            while piece := server.recv(_PIECE):
                time.sleep(self.delay_s)
                client.sendall(piece)
                sent += len(piece)
                if self.cut_after is not None and sent > self.cut_after:
                    return
