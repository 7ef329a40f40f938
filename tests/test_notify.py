"""What a service manager hears of a server, by the protocol of `sd_notify`."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from persist_cache.system.notify import Notifier
from tests.waiting import until


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(30)
        yield heard


def test_fields_are_lines_of_one_datagram(manager: socket.socket) -> None:
    notifier = Notifier.of({"NOTIFY_SOCKET": manager.getsockname()})

    notifier.say(READY=1, STATUS="on\nits way")

    assert manager.recv(4096) == b"READY=1\nSTATUS=on its way"


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="abstract sockets are Linux's")
def test_an_abstract_socket_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0persist-cache-test-{os.getpid()}")
        heard.settimeout(30)
        Notifier.of({"NOTIFY_SOCKET": f"@persist-cache-test-{os.getpid()}"}).stopping()

        assert heard.recv(4096) == b"STOPPING=1\nSTATUS=Stopping"


def test_children_do_not_inherit_the_socket() -> None:
    variables = {"NOTIFY_SOCKET": "/s", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1", "A": "b"}

    notifier = Notifier.of(variables)

    assert variables == {"A": "b"}
    assert notifier.is_asked
    assert notifier.watchdog_s is None, "it watches another process"


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1"])
def test_nothing_is_said_where_nobody_asked(address: str) -> None:
    notifier = Notifier.of({"NOTIFY_SOCKET": address})

    notifier.say(READY=1)
    notifier.keep_saying(lambda: "x", lambda: True)

    assert not notifier.is_asked


def test_the_end_is_said_once(manager: socket.socket) -> None:
    notifier = Notifier.of({"NOTIFY_SOCKET": manager.getsockname()})

    notifier.stopping()
    notifier.stopping()
    notifier.say(STATUS="Last")

    assert manager.recv(4096) == b"STOPPING=1\nSTATUS=Stopping"
    assert manager.recv(4096) == b"STATUS=Last"


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    Notifier.of({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).say(READY=1)


def test_the_watchdog_hears_of_a_living_server_only(manager: socket.socket) -> None:
    alive = [True]
    notifier = Notifier.of(
        {
            "NOTIFY_SOCKET": manager.getsockname(),
            "WATCHDOG_USEC": "60000",
            "WATCHDOG_PID": str(os.getpid()),
        }
    )

    notifier.keep_saying(lambda: "Ready" if alive[0] else "Sick", lambda: alive[0])

    assert manager.recv(4096) == b"STATUS=Ready\nWATCHDOG=1"
    assert manager.recv(4096) == b"WATCHDOG=1"
    alive[0] = False
    until(lambda: manager.recv(4096) == b"STATUS=Sick", "it went on")
    notifier.stopping()
    assert manager.recv(4096) == b"STOPPING=1\nSTATUS=Stopping"
