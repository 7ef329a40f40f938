"""A server that comes up asks nobody for the name of its machine, and many may wait for it."""

from __future__ import annotations

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from persist_cache.server import run
from persist_cache.server.listening import NamelessServer
from tests.server_process import free_port

LOOK_UPS = ("getfqdn", "gethostbyaddr", "gethostbyname", "gethostbyname_ex", "getnameinfo")


@pytest.fixture(autouse=True)
def no_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine on which every look-up of a name by an address would hang."""
    asked: list[str] = []

    def hangs(name: str) -> Any:
        def call(*arguments: object) -> NoReturn:
            asked.append(name)
            raise TimeoutError(f"{name} would take half a minute")

        return call

    for name in LOOK_UPS:
        monkeypatch.setattr(socket, name, hangs(name))
    return asked


def test_the_standard_librarys_server_would_ask() -> None:
    """Else the other tests prove nothing."""
    with pytest.raises(TimeoutError):
        HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)


def test_serve_comes_up_without_looking_its_own_name_up(no_names: list[str]) -> None:
    bound: list[int] = []
    ended: list[str] = []
    generator: Any = SimpleNamespace(
        stop_and_join=lambda: ended.append("stopped"),
        drain=lambda grace_s: True,
        model_provider=SimpleNamespace(failed=None),
    )

    def tell(port: int) -> None:
        bound.append(port)
        raise KeyboardInterrupt  # it could answer by now

    port = free_port()
    run.answer_until_ended("127.0.0.1", port, generator, 0.0, tell)

    assert (bound, ended, no_names) == ([port], ["stopped"], [])


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_its_name_is_its_address(address: str) -> None:
    with NamelessServer((address, 0), BaseHTTPRequestHandler) as bound:
        assert bound.server_name == address
        assert bound.server_port == bound.server_address[1] > 0


def test_many_clients_may_wait_while_none_is_accepted() -> None:
    with (
        NamelessServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as bound,
        contextlib.ExitStack() as clients,
    ):
        for _ in range(100):
            where = ("127.0.0.1", bound.server_port)
            clients.enter_context(socket.create_connection(where, timeout=30))


class Refusing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


ASKED = b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"


def client_of(server: NamelessServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), 10)


def whole(client: socket.socket) -> bytes:
    """All that the server says until it closes the connection."""
    with client.makefile("rb") as answer:
        return answer.read()


def test_those_who_wait_to_be_accepted_are_answered_at_the_end() -> None:
    """By closing the socket they would be reset."""
    with NamelessServer(("127.0.0.1", 0), Refusing) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_of(server)) for _ in range(10)]
        for client in clients:
            client.sendall(ASKED)

        server.answer_rest(10)

        answers = [whole(client) for client in clients]
    assert all(answer.startswith(b"HTTP/1.1 503 ") for answer in answers)


def test_a_client_that_says_nothing_does_not_hold_the_end_up() -> None:
    with NamelessServer(("127.0.0.1", 0), Refusing) as server, client_of(server) as silent:
        server.answer_rest(0.0)

        silent.sendall(ASKED)
        assert whole(silent).startswith(b"HTTP/1.1 503 "), "it was accepted"


def test_a_server_that_is_closed_has_nobody_to_answer() -> None:
    server = NamelessServer(("127.0.0.1", 0), Refusing)
    server.server_close()

    server.answer_rest(10)


@pytest.mark.parametrize("begins", [False, True], ids=["before", "after"])
def test_a_signal_while_a_client_gets_its_thread_does_not_reset_it(
    monkeypatch: pytest.MonkeyPatch, begins: bool
) -> None:
    """It ends the loop before the thread has begun, or after that."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.undo()
        if begins:
            start(thread)
        raise KeyboardInterrupt

    with (
        NamelessServer(("127.0.0.1", 0), Refusing) as server,
        client_of(server) as client,
    ):
        client.sendall(ASKED)
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.handle_request()

        server.answer_rest(10)

        assert whole(client).startswith(b"HTTP/1.1 503 ")
