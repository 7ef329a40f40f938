"""Folders in memory: a test spends most of its time in fsync, and need not wait for a disk.

`use_for_temporary_folders` makes memory the place of all temporary folders of a test run, also of
the processes that it starts. A test that needs a real disk carries the marker `on_disk`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = "/dev/shm"
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
