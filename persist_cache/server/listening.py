"""An HTTP server that does not ask the network for its own name, and resets no client that waits.

`http.server.HTTPServer` asks for it when it binds (`socket.getfqdn`), though only CGI scripts want
it. Where no resolver answers, as in some virtual machines, that takes half a minute.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

_ACCEPT_S = 0.1
"""How long to wait at the end for a client that is there; it may be gone again."""
_LOOK_S = 0.01
"""How often to see whether the last ones are answered."""


class NamelessServer(ThreadingHTTPServer):
    """A `ThreadingHTTPServer` that goes by its address.

    Agents ask in parallel. Clients that do not fit into the queue of those who wait to be accepted
    are reset, and while all processors compute, that is soon the case with the usual five.
    """

    request_queue_size = 128  # what macOS has at most, if nobody changed that

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # Changed by single steps, without a lock: a signal would leave that with the main thread.
        self._accepted: dict[Any, Any] = {}
        """Connections that were accepted and are not over, with their clients' addresses."""
        self._taken: dict[Any, int] = {}
        """Those that a thread answers, and which."""
        super().__init__(*arguments, **options)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), port

    def process_request(self, request: Any, client_address: Any) -> None:
        self._accepted[request] = client_address
        try:
            super().process_request(request, client_address)
        except Exception:
            self._accepted.pop(request, None)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        me = threading.get_ident()
        if self._taken.setdefault(request, me) != me:
            return  # another thread has it, see `answer_rest`
        try:
            if request in self._accepted:  # else another thread had it
                super().process_request_thread(request, client_address)
        finally:
            self._accepted.pop(request, None)
            self._taken.pop(request, None)

    def shutdown_request(self, request: Any) -> None:
        """As the standard library's: not for a connection that another thread answers, or will.

        A signal that ends the loop while that starts a thread would close it.
        """
        if request in self._accepted and self._taken.get(request) != threading.get_ident():
            return
        super().shutdown_request(request)

    def answer_rest(self, timeout_s: float) -> None:
        """Answer those who wait for a thread, or to be accepted, when the loop was ended.

        Does nothing once the server is closed.

        Args:
            timeout_s: What that may take.
        """
        if self.socket.fileno() < 0:
            return
        give_up = time.monotonic() + timeout_s
        before = set(self._taken)
        for request, address in list(self._accepted.items()):
            if request not in before:
                with contextlib.suppress(RuntimeError):  # there are no more threads
                    super().process_request(request, address)
        self.socket.settimeout(_ACCEPT_S)
        for _ in range(self.request_queue_size):
            if not select.select([self], [], [], 0)[0]:
                break
            self.handle_request()
        while set(self._accepted) - before and time.monotonic() < give_up:
            time.sleep(_LOOK_S)
