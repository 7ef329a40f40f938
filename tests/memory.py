"""A folder in memory: a test of processes that die, or disks that fail, need not wait for one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = "/dev/shm"


@contextmanager
def fast_folder() -> Iterator[Path]:
    """A new folder, where there is one in memory, else in the usual place."""
    folder = tempfile.mkdtemp(dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)
