"""Reading the files that decide an identity: regular ones, and nothing else."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path


def printable(text: str | os.PathLike[str]) -> str:
    """Make a text storable: paths and JSON may hold what is not valid Unicode."""
    return os.fspath(text).encode("utf-8", "backslashreplace").decode()


class CannotIdentify(Exception):
    """Carries a reason from where it is found to `Identifier`, which makes a value of it."""


def open_regular(path: Path) -> io.FileIO:
    # Opening a FIFO would block the caller for ever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise CannotIdentify(f"{printable(path)} is not a file")
    return io.FileIO(path)


def read_regular(path: Path) -> bytes:
    """Return the bytes of a small file; raises as `Contents.read` does, and notes nothing."""
    with open_regular(path) as file:
        return file.readall() or b""
