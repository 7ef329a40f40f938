"""Telling systemd how a service is: the protocol of `sd_notify`, by a datagram to a socket."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, MutableMapping
from typing import Self

log = logging.getLogger(__name__)

_LOOK_S = 2.0
"""How often the state is looked at."""


class Notifier:
    """What the service manager wants to hear; it says nothing where none asked.

    Thread safety: may be shared between threads.
    """

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        """Speak to a manager.

        Args:
            address: Of its socket; "" for none. An `@` at its head is an abstract one.
            watchdog_s: How often it wants to hear that the service lives; None for never.
        """
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.watchdog_s = watchdog_s
        self._ended = threading.Event()
        self._status = ""

    @classmethod
    def of(cls, variables: MutableMapping[str, str] | None = None) -> Self:
        """As the environment says, which is cleared of it: a child must not speak for us."""
        variables = os.environ if variables is None else variables
        address = variables.pop("NOTIFY_SOCKET", "")
        pid = variables.pop("WATCHDOG_PID", "")
        usec = variables.pop("WATCHDOG_USEC", "")
        is_ours = not pid or pid == str(os.getpid())
        watched = usec.isdigit() and int(usec) > 0 and is_ours
        if not address.startswith(("/", "@")):
            address = ""
        return cls(address, int(usec) / 1e6 if watched else None)

    @property
    def is_asked(self) -> bool:
        """Whether a manager listens."""
        return bool(self._address)

    def say(self, **fields: str | int) -> None:
        """Send fields such as `READY=1`; a manager that is gone is no error."""
        if not self._address:
            return
        text = "\n".join(f"{name}={' '.join(str(value).split())}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | _CLOSED_ON_EXEC) as sock:
                sock.sendto(text.encode(errors="replace"), self._address)
        except OSError as error:
            log.debug("the service manager was not told: %s", error)

    def keep_saying(self, status: Callable[[], str], is_alive: Callable[[], bool]) -> None:
        """Tell the status when it changes, and that the service lives, on a thread of its own.

        Args:
            status: One line for people.
            is_alive: Whether to say so; else the manager starts the service again.
        """
        if self._address:
            threading.Thread(
                target=self._keep_saying,
                args=(status, is_alive),
                name="persist-cache-notify",
                daemon=True,
            ).start()

    def stopping(self) -> None:
        """Say that the service ends; further calls do nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        self.say(STOPPING=1, STATUS="Stopping")

    def _keep_saying(self, status: Callable[[], str], is_alive: Callable[[], bool]) -> None:
        pause_s = _LOOK_S if self.watchdog_s is None else min(_LOOK_S, self.watchdog_s / 3)
        while not self._ended.is_set():
            with contextlib.suppress(Exception):  # it would end what keeps the service alive
                said: Mapping[str, str | int] = {}
                if (now := status()) != self._status:
                    self._status, said = now, {"STATUS": now}
                if self.watchdog_s is not None and is_alive():
                    said = {**said, "WATCHDOG": 1}
                if said:
                    self.say(**said)
            self._ended.wait(pause_s)


_CLOSED_ON_EXEC = getattr(socket, "SOCK_CLOEXEC", 0)
