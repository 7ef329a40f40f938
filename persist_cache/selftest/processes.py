"""Locks: they keep others out, and end with their holder however it ends."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from persist_cache import fs
from persist_cache.filenames import PRESENCE_FILE
from persist_cache.selftest import material, parts
from persist_cache.selftest.checks import Failed, Result, Setting

_LIMIT_S = 2.0


def locks_end_with_their_holder(setting: Setting) -> Result:
    """Hold a lock in another process, kill it, and see the lock free, also beside its children."""
    path = setting.folder / "lock"
    times = setting.some(20)
    slowest_s = 0.0
    fd = fs.open_shared(path)
    try:
        for _ in range(times):
            slowest_s = max(slowest_s, _free_after_kill("hold", setting.folder, fd))
    finally:
        os.close(fd)
    material.opened(setting.folder).close()
    fd = fs.open_shared(setting.folder / "store" / PRESENCE_FILE)
    try:
        for _ in range(times):
            slowest_s = max(slowest_s, _free_after_kill("fork_with_store", setting.folder, fd))
    finally:
        os.close(fd)
    return Result(
        f"{2 * times} holders killed, {times} of them with a child that lived on; the slowest lock "
        f"was free after {slowest_s * 1000:.0f} ms",
        {"killed": 2 * times, "slowest_s": slowest_s},
    )


def _free_after_kill(part: str, folder: Path, fd: int) -> float:
    """Seconds from the holder's death until its lock can be had."""
    holder = parts.start(f"processes:{part}", folder)
    assert holder.stdout is not None
    try:
        said = holder.stdout.readline().split()
        if not said:
            parts.ended(holder, "a process that holds a lock")
            raise Failed("a process that was to hold a lock ended")
        if fs.try_lock(fd):
            raise Failed("a lock that another process holds was given away a second time")
        holder.kill()
        holder.wait()
        started = time.monotonic()
        if not fs.lock(fd, _LIMIT_S):
            raise Failed(f"the lock of a killed process was still held after {_LIMIT_S:.0f} s")
        fs.unlock(fd)
        return time.monotonic() - started
    finally:
        holder.kill()
        holder.wait()
        for child in map(int, said[1:]):
            os.kill(child, signal.SIGKILL)
        for stream in (holder.stdin, holder.stdout, holder.stderr):
            if stream is not None:
                stream.close()


def hold(folder: Path) -> None:
    """Part: hold a lock until killed."""
    fd = fs.open_shared(folder / "lock")
    if not fs.lock(fd, _LIMIT_S):
        sys.exit("the lock is not free")
    print("held", flush=True)
    signal.pause()


def fork_with_store(folder: Path) -> None:
    """Part: hold a store open until killed, with a forked child that lives on."""
    store = material.opened(folder)
    child = os.fork()
    if not child:
        signal.pause()
    print("held", child, flush=True)
    signal.pause()
    store.close()
