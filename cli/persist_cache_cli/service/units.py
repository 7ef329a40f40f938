"""The files of services: a systemd user unit, and a launchd agent. Pure: texts are made of values.

A file that was made here is known by its mark; others are left alone.
"""

from __future__ import annotations

import plistlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MARK = "Written by `persist-cache service install`; `persist-cache service uninstall` removes it."
NAME = "persist-cache"
LABEL = "io.github.persist-cache.serve"
_START_S, _WATCHDOG_S, _SAVE_S = 300, 120, 60
"""Until it listens; without a sign of life; for saving behind the grace."""


@dataclass(frozen=True, slots=True)
class Service:
    """What is to be run.

    Attributes:
        command: The command line.
        folder: Working directory.
        variables: Of the environment.
        grace_s: What running requests get at the end.
        log: File that launchd writes the log to.
    """

    command: Sequence[str]
    folder: str
    variables: Mapping[str, str] = field(default_factory=dict)
    grace_s: float = 0.0
    log: str = ""


def systemd_unit(service: Service) -> str:
    """A user unit of systemd.

    Raises:
        ValueError: Something has a control character, which no unit can have.
    """
    command = " ".join(_quoted(one) for one in service.command)
    variables = "".join(
        f"Environment={_quoted(f'{name}={value}')}\n" for name, value in service.variables.items()
    )
    # The colon: no variables are put into the command. Standard output has the admin token.
    # The minus: a folder that is removed later, such as a checkout, does not keep it from starting.
    return f"""# {MARK}
[Unit]
Description=persist-cache: mlx-lm with a prompt cache that survives restarts
StartLimitIntervalSec=300
StartLimitBurst=5

[Service]
Type=notify
ExecStart=:{command}
WorkingDirectory=-{_checked(service.folder).replace("%", "%%")}
{variables}StandardOutput=null
Restart=on-failure
RestartSec=2
TimeoutStartSec={_START_S}
TimeoutStopSec={_stop_s(service)}
WatchdogSec={_WATCHDOG_S}
KillMode=mixed

[Install]
WantedBy=default.target
"""


def launchd_agent(service: Service) -> str:
    """A launchd agent.

    Raises:
        ValueError: Something has a control character.
    """
    agent: dict[str, object] = {
        "Label": LABEL,
        "ProgramArguments": [_checked(one) for one in service.command],
        "WorkingDirectory": _checked(service.folder),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        "ExitTimeOut": _stop_s(service),
        "ProcessType": "Interactive",  # else it computes on the slow cores
        "StandardErrorPath": _checked(service.log),
    }
    if service.variables:
        agent["EnvironmentVariables"] = {
            name: _checked(value) for name, value in service.variables.items()
        }
    text = plistlib.dumps(agent, sort_keys=False).decode()
    return text.replace("<plist ", f"<!-- {MARK} -->\n<plist ", 1)


def is_ours(text: str) -> bool:
    """Whether a file was made here."""
    return MARK in text


def _stop_s(service: Service) -> int:
    return int(service.grace_s) + _SAVE_S


def _quoted(text: str) -> str:
    """A word of a unit's line, whatever is in it."""
    escaped = _checked(text).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _checked(text: str) -> str:
    if not all(one.isprintable() for one in text):
        raise ValueError(f"{text!r} has a character that cannot be in the file of a service")
    return text
