"""Who holds a lock of the store, for the sentence that says why something has to wait.

Linux lists the locks of each open file. Elsewhere the file itself tells who locked it last.
"""

from __future__ import annotations

import contextlib
import os
import sys
from itertools import takewhile
from pathlib import Path

from msgspec import Struct


class Holder(Struct, frozen=True):
    """A process that holds a lock.

    Attributes:
        pid: Its number.
        command: Its command line up to the first option, or "".
        is_stopped: It runs only after SIGCONT.
    """

    pid: int
    command: str = ""
    is_stopped: bool = False


def holders(path: Path, last_pid: int = 0) -> list[Holder]:
    """Processes with a `flock` on the file `path`.

    Args:
        path: The file.
        last_pid: Who locked it last, by its own account; named if the system tells nothing.
    """
    found = []
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            status = path.stat()
            found = [one for one in _processes() if _holds(one, status)]
    if not found and _is_alive(last_pid):
        found = [last_pid]
    return [_described(pid) for pid in found]


def sentence(path: Path, found: list[Holder], waited_s: float) -> str:
    """Why nothing can be changed, and what to do about it."""
    if not found:
        return (
            f"Another process has held {path} for more than {waited_s:.0f} s, so nothing can be "
            "changed; end that process."
        )
    who = " and ".join(
        f"process {one.pid}" + (f" ({one.command})" if one.command else "") for one in found
    )
    pids = " ".join(str(one.pid) for one in found)
    if all(one.is_stopped for one in found):
        return (
            f"{who[0].upper()}{who[1:]} is stopped and holds {path}, so nothing can be changed; "
            f"let it go on (kill -CONT {pids}) or end it (kill -KILL {pids})."
        )
    return (
        f"{who[0].upper()}{who[1:]} has held {path} for more than {waited_s:.0f} s, so nothing can "
        f"be changed; wait for it, or end it (kill {pids})."
    )


def _processes() -> list[int]:
    mine = os.getpid()
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != mine]


def _holds(pid: int, file: os.stat_result) -> bool:
    """Whether one of the files that the process has open is this one, and locked."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), file):
                    said = Path(f"/proc/{pid}/fdinfo/{name}").read_text()
                    if "FLOCK" in said:
                        return True
    return False


def _is_alive(pid: int) -> bool:
    if pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _described(pid: int) -> Holder:
    command, stopped = "", False
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            # Options may be secrets, and this is told to whoever asks a server how it is.
            bare = " ".join(takewhile(lambda word: not word.startswith("-"), words)).strip()
            # Everything that is printed goes to a terminal in the end.
            command = "".join(c if c.isprintable() else "?" for c in bare)[:80]
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            stopped = state in "Tt"
    return Holder(pid, command, stopped)
