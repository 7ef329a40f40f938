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

    By itself it does so when it is short of memory. Pages that other processes use as well stay,
    and so do files that this user may not write; what the loader has written to may go to swap.
    On other systems nothing is done.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError, OSError, ValueError):
        madvise = ctypes.CDLL(None).madvise
        # Bytes: a path may be in any encoding, or none.
        for line in Path("/proc/self/maps").read_bytes().split(b"\n"):
            # As proc_pid_maps(5) has it: first-end, access, offset, device, inode, path.
            span, _, rest = line.partition(b" ")
            if rest[:2] == b"r-" and rest[3:4] == b"p" and b" /" in rest:
                first, _, end = span.partition(b"-")
                size = int(end, 16) - int(first, 16)
                madvise(ctypes.c_void_p(int(first, 16)), ctypes.c_size_t(size), _MADV_PAGEOUT)
