"""An HTTP server that does not ask the network for its own name before it answers.

`http.server.HTTPServer` does when it binds (`socket.getfqdn`), for a name that only CGI scripts
want. Where no resolver answers, as in some virtual machines, that takes half a minute.
"""

from __future__ import annotations

from http.server import ThreadingHTTPServer
from socketserver import TCPServer


class NamelessServer(ThreadingHTTPServer):
    """A `ThreadingHTTPServer` that goes by its address."""

    def server_bind(self) -> None:
        TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), port
