"""Memory that was freed, given back to the operating system."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_M_ARENA_MAX = -8
"""From glibc's `<malloc.h>`."""


def share_one_heap() -> None:
    """Have all threads allocate from one heap, as early as possible, so that all of it comes back.

    glibc has a heap for each thread, and `give_back` returns the unused end of the main one alone.
    Who sets MALLOC_ARENA_MAX knows better.
    """
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(ctypes.c_int(_M_ARENA_MAX), ctypes.c_int(1))


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
