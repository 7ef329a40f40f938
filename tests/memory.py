"""Folders in memory: a test spends most of its time in fsync, and need not wait for a disk.

`use_for_temporary_folders` makes memory the place of all temporary folders of a test run, also of
the processes that it starts. A test marked `on_disk` gets its `tmp_path` from `disk_folder`, and
tests that need a file system of some kind mount an image of it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from persist_cache.system.mounts import Mounts

_MEMORY = "/dev/shm"
_KINDS_IN_MEMORY = ("tmpfs", "ramfs")
_ENOUGH_BYTES = 4 << 30
"""Free bytes without which the tests stay on the disk: containers often have 64 MiB."""


@contextmanager
def fast_folder() -> Iterator[Path]:
    """A new folder, where there is one in memory, else in the usual place."""
    folder = tempfile.mkdtemp(dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)


@contextmanager
def disk_folder() -> Iterator[Path | None]:
    """A new folder whose files are on a disk; None where no place for one is known."""
    mounts = Mounts()
    for place in (Path("/tmp"), Path("/var/tmp"), Path(__file__).parent):
        if os.access(place, os.W_OK) and mounts.kind(place) not in _KINDS_IN_MEMORY:
            with tempfile.TemporaryDirectory(prefix="on-disk-", dir=place) as folder:
                yield Path(folder)
            return
    yield None


def use_for_temporary_folders() -> str:
    """Put temporary folders into memory, unless TMPDIR names a place or memory is small.

    Returns:
        The folder in which temporary folders are made.
    """
    if "TMPDIR" not in os.environ and _has_room():
        os.environ["TMPDIR"] = _MEMORY
        tempfile.tempdir = None  # asked again
    return tempfile.gettempdir()


def _has_room() -> bool:
    if not os.access(_MEMORY, os.W_OK) or not os.path.ismount(_MEMORY):
        return False
    found = os.statvfs(_MEMORY)
    return found.f_bavail * found.f_frsize >= _ENOUGH_BYTES
