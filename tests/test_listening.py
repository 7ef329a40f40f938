"""A server that comes up asks nobody for the name of its machine, and many may wait for it."""

from __future__ import annotations

import contextlib
import socket
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
