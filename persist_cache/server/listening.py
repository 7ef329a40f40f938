"""An HTTP server that does not ask the network for its own name, and resets no client that waits.

`http.server.HTTPServer` asks for it when it binds (`socket.getfqdn`), though only CGI scripts want
it. Where no resolver answers, as in some virtual machines, that takes half a minute.
"""

from __future__ import annotations

import select
import threading
import time
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

_ACCEPT_S = 0.1
"""How long to wait at the end for a client that is there; it may be gone again."""


class NamelessServer(ThreadingHTTPServer):
    """A `ThreadingHTTPServer` that goes by its address.

    Agents ask in parallel. Clients that do not fit into the queue of those who wait to be accepted
    are reset, and while all processors compute, that is soon the case with the usual five.
    """

    request_queue_size = 128  # what macOS has at most, if nobody changed that

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._changed = threading.Condition()
        self._accepted: dict[Any, Any] = {}
        """Connections, with their clients' addresses, that no thread has taken yet."""
        self._threads_at: dict[Any, int] = {}
        """Connections that a thread answers, and which."""
        super().__init__(*arguments, **options)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), port

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            self._accepted[request] = client_address
        try:
            super().process_request(request, client_address)
        except Exception:
            with self._changed:
                self._accepted.pop(request, None)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._changed:
            if self._accepted.pop(request, None) is None:
                return  # another thread has it, see `answer_rest`
            self._threads_at[request] = threading.get_ident()
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                del self._threads_at[request]
                self._changed.notify_all()

    def shutdown_request(self, request: Any) -> None:
        """As the standard library's: not for a connection that another thread answers, or will.

        A signal that ends the loop while that starts a thread would close it.
        """
        with self._changed:
            is_anothers = self._threads_at.get(request) not in (None, threading.get_ident())
            if request in self._accepted or is_anothers:
                return
        super().shutdown_request(request)

    def answer_rest(self, timeout_s: float) -> None:
        """Answer those who wait for a thread, or to be accepted, when the loop was ended.

        Args:
            timeout_s: What that may take.
        """
        give_up = time.monotonic() + timeout_s
        with self._changed:
            before, left_over = set(self._threads_at), dict(self._accepted)
        for request, address in left_over.items():
            super().process_request(request, address)
        self.socket.settimeout(_ACCEPT_S)
        while time.monotonic() < give_up and select.select([self], [], [], 0)[0]:
            self.handle_request()
        with self._changed:
            self._changed.wait_for(
                lambda: not self._accepted and self._threads_at.keys() <= before,
                max(0.0, give_up - time.monotonic()),
            )
