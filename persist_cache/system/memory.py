"""Memory that was freed, given back to the operating system."""

from __future__ import annotations

import contextlib
import ctypes
import sys


def give_back() -> None:
    """Have the C library return what it keeps of freed memory, where it knows how to.

    Without it a process that let gigabytes go may stay as large as it was.
    """
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            library.malloc_zone_pressure_relief(None, ctypes.c_size_t(0))
        else:
            library.malloc_trim(ctypes.c_size_t(0))  # glibc's; others have none
