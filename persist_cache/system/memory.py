"""Memory that was freed, or only idles, given back to the operating system."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

_M_ARENA_MAX = -8
"""From glibc's `<malloc.h>`."""
_MADV_PAGEOUT = 21
"""From Linux's `<asm-generic/mman-common.h>`, since 5.4."""


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


def page_out_programs() -> None:
    """Have Linux take back the pages of program files, which are read again when they are run.

    By itself it does so when it is short of memory. What other processes use as well stays, and
    so does all that was written to. Elsewhere nothing is done.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError, OSError):
        madvise = ctypes.CDLL(None).madvise
        for line in Path("/proc/self/maps").read_text().splitlines():
            # As proc_pid_maps(5) has it: first-end, access, offset, device, inode, path.
            span, access, _, _, _, *path = line.split(maxsplit=5)
            if access[:2] == "r-" and access[3] == "p" and path and path[0].startswith("/"):
                first, end = (int(one, 16) for one in span.split("-"))
                madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_PAGEOUT)
