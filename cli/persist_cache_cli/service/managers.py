"""Who runs services here: systemd for the user, or launchd. Each is asked by its own command."""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import click

from persist_cache_cli.service import units
from persist_cache_cli.service.units import Service


class Manager(ABC):
    """Runs a service that a file describes."""

    name: str

    @property
    @abstractmethod
    def path(self) -> Path:
        """The file."""

    @abstractmethod
    def text(self, service: Service) -> str:
        """What the file is to say; raises a `ValueError` where it cannot."""

    @abstractmethod
    def start(self) -> None:
        """Have it run the service, as its file says now, and at each login."""

    @abstractmethod
    def stop(self) -> None:
        """End the service, and do not start it again."""

    @abstractmethod
    def status(self) -> int:
        """Show how it is; returns the exit status."""

    @abstractmethod
    def logs(self, lines: int, *, follow: bool) -> int:
        """Show its log; returns the exit status."""


class Systemd(Manager):
    """The user's systemd."""

    name = "systemd"
    _unit = f"{units.NAME}.service"

    @property
    def path(self) -> Path:
        home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        return Path(home) / "systemd" / "user" / self._unit

    def text(self, service: Service) -> str:
        return units.systemd_unit(service)

    def start(self) -> None:
        _done("systemctl", "--user", "daemon-reload")
        _done("systemctl", "--user", "enable", self._unit)
        _done("systemctl", "--user", "restart", "--no-block", self._unit)

    def stop(self) -> None:
        _done("systemctl", "--user", "disable", "--now", self._unit)

    def status(self) -> int:
        return _shown("systemctl", "--user", "status", "--no-pager", "--lines=0", self._unit)

    def logs(self, lines: int, *, follow: bool) -> int:
        how = ["--follow"] if follow else ["--no-pager"]
        return _shown("journalctl", "--user", "--unit", self._unit, f"--lines={lines}", *how)


class Launchd(Manager):
    """The user's launchd."""

    name = "launchd"

    @property
    def path(self) -> Path:
        return Path.home() / "Library" / "LaunchAgents" / f"{units.LABEL}.plist"

    @property
    def log(self) -> Path:
        """Where the log goes."""
        return Path.home() / "Library" / "Logs" / "persist-cache.log"

    @property
    def _domain(self) -> str:
        return f"gui/{os.getuid()}"

    def text(self, service: Service) -> str:
        return units.launchd_agent(service)

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch(mode=0o600)
        subprocess.run(
            ["launchctl", "bootout", f"{self._domain}/{units.LABEL}"],
            capture_output=True,
            check=False,
        )
        _done("launchctl", "bootstrap", self._domain, str(self.path))

    def stop(self) -> None:
        _done("launchctl", "bootout", f"{self._domain}/{units.LABEL}")

    def status(self) -> int:
        return _shown("launchctl", "print", f"{self._domain}/{units.LABEL}")

    def logs(self, lines: int, *, follow: bool) -> int:
        how = ["-F"] if follow else []
        return _shown("tail", "-n", str(lines), *how, str(self.log))


MANAGERS: dict[str, type[Manager]] = {one.name: one for one in (Systemd, Launchd)}


def own_manager() -> str:
    """The name of the one that this system has."""
    return Launchd.name if sys.platform == "darwin" else Systemd.name


def _done(*command: str) -> None:
    """Run a command that has to succeed.

    Raises:
        click.ClickException: It did not; with what it said.
    """
    done = _run(command, capture=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout or "").split()) or f"status {done.returncode}"
        raise click.ClickException(f"`{' '.join(command)}` failed: {said.rstrip('.')}.")


def _shown(*command: str) -> int:
    """Run a command whose output is for the user."""
    return _run(command, capture=False).returncode


def _run(command: Sequence[str], *, capture: bool) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=capture, text=True, check=False)
    except OSError as error:
        raise click.ClickException(
            f"{command[0]} cannot be run here ({error.strerror}); `service install --print` shows "
            "the file, for another manager of services."
        ) from None
