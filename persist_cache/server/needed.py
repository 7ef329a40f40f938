"""A server that ends when nobody needs it: who does holds a shared lock on a file that it names.

A lock ends with its holder, however that ends. The server takes the exclusive one when it can, and
keeps it, so nobody begins to need a server that is about to end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from persist_cache import fs

_LOOK_S = 0.5
"""How often a server sees whether it is needed."""
_WHILE_OTHERS_LOOK_S = 0.1
"""Nobody holds an exclusive lock for long but a server that ends."""


def hold(path: Path) -> int | None:
    """Need the server that names this file, until the descriptor is closed.

    Returns:
        The descriptor; None where that server has ended, or is about to.
    """
    fd = _open(path)
    if fd is None:
        return None
    # What was removed meanwhile is of no use to anybody.
    if fs.lock_shared(fd, _WHILE_OTHERS_LOOK_S) and _is_at(fd, path):
        return fd
    os.close(fd)
    return None


def is_last(fd: int) -> bool:
    """Whether nobody else needs the server, which then ends; `fd` is from `hold`."""
    return fs.try_lock(fd)


def is_held(path: Path) -> bool:
    """Whether somebody holds the file; nobody does if it is gone."""
    fd = _open(path)
    if fd is None:
        return False
    is_free = fs.try_lock(fd)
    os.close(fd)
    return not is_free


def when_free(path: Path, end: Callable[[], object]) -> None:
    """Call `end` once nobody holds the file, or it is gone; from a thread of its own."""

    def look() -> None:
        while (fd := _open(path)) is not None and not fs.try_lock(fd):
            os.close(fd)
            waiting.wait(_LOOK_S)
        # The descriptor stays open as long as the process lives.
        end()

    waiting = threading.Event()
    threading.Thread(target=look, name="persist-cache-needed", daemon=True).start()


def _open(path: Path) -> int | None:
    try:
        return fs.open_read(path)
    except OSError:
        return None


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False
