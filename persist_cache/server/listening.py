"""An HTTP server that does not ask the network for its own name, and keeps many clients waiting.

`http.server.HTTPServer` asks for it when it binds (`socket.getfqdn`), though only CGI scripts want
it. Where no resolver answers, as in some virtual machines, that takes half a minute.
"""

from __future__ import annotations

from http.server import ThreadingHTTPServer
from socketserver import TCPServer


class NamelessServer(ThreadingHTTPServer):
    """A `ThreadingHTTPServer` that goes by its address.

    Agents ask in parallel. Clients that do not fit into the queue of those who wait to be accepted
    are reset, and while all processors compute, that is soon the case with the usual five.
    """

    request_queue_size = 128  # what macOS has at most, if nobody changed that

    def server_bind(self) -> None:
        TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), port
