"""Small files in a store's folder that are for its owner alone: reading them, and making them.

What is written holds the folder's `flock`; what is read does not need it, because files are
replaced as a whole.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from persist_cache import fs
from persist_cache.errors import StoreAccessError

PATIENCE_S = 5.0
_MAX_BYTES = 4096


def read_own(path: Path) -> bytes | None:
    """The beginning of a file of ours that nobody else can read; None for anything else."""
    try:
        # What a pipe says is nothing to wait for.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if not mine or status.st_mode & 0o077:
            return None
        return os.read(fd, _MAX_BYTES)
    except OSError:
        return None
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, if it is ours alone to write.

    Raises:
        StoreAccessError: It is not, or somebody holds the lock for long.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            raise StoreAccessError(f"{folder} belongs to another user.")
        if status.st_mode & 0o022:
            raise StoreAccessError(f"Other users may write to {folder}.")
        deadline = time.monotonic() + PATIENCE_S
        while not fs.try_lock(fd):
            if time.monotonic() > deadline:
                raise StoreAccessError(f"Another process holds {folder} locked.")
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def reason(error: OSError | StoreAccessError, folder: Path) -> str:
    """Why a file in `folder` could not be made, in a sentence."""
    if isinstance(error, OSError):
        return f"{error.filename or folder} cannot be used ({error.strerror})."
    return str(error)
