"""Files: exact bytes, durable syncs, space that returns, and what is in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import statistics
import sys
import time
from pathlib import Path

from persist_cache import fs
from persist_cache.doctor import facts
from persist_cache.selftest.checks import Failed, NotApplicable, Result, Setting
from persist_cache.system.mounts import Mounts

MIB = 1 << 20
_LARGE_BYTES = 1 << 30
_BLOCK_BYTES = 4 * MIB
_BUFFERS = 1000
_SPACE_PATIENCE_S = 5.0


def bytes_are_exact(setting: Setting) -> Result:
    """Write and read with as many buffers, and as many bytes, as one call takes."""
    dice = random.Random(1)
    path = setting.folder / "bytes"
    sizes = [dice.randrange(1, 4000) for _ in range(_BUFFERS)]
    pieces = [dice.randbytes(size) for size in sizes]
    whole = b"".join(pieces)
    fd = fs.create(path)
    try:
        written = fs.write_all(fd, [memoryview(piece) for piece in pieces])
        if written != len(whole) or path.read_bytes() != whole:
            raise Failed(f"writev of {_BUFFERS} buffers wrote other bytes than it was given")
        buffers = [bytearray(size) for size in sizes]
        count = fs.read_into(fd, 0, [memoryview(buffer) for buffer in buffers])
        if count != len(whole) or b"".join(buffers) != whole:
            raise Failed(f"preadv into {_BUFFERS} buffers read other bytes than the file has")
        shifted = bytearray(len(whole) - 7)
        if fs.read_into(fd, 7, [memoryview(shifted)]) != len(shifted) or shifted != whole[7:]:
            raise Failed("preadv from the middle of a file read other bytes than the file has")
    finally:
        os.close(fd)
    path.unlink()
    nbytes = 64 * MIB if setting.quick else _LARGE_BYTES
    free = fs.free_bytes(setting.folder)
    if free < 2 * nbytes:
        raise Failed(f"{free:,} bytes are free, too few to write {nbytes:,}; use another --dir")
    write_s, read_s = _large(path, nbytes)
    return Result(
        f"{_BUFFERS:,} buffers, and {nbytes // MIB:,} MiB in one call, are exact",
        {
            "buffers": _BUFFERS,
            "large_bytes": nbytes,
            "write_bytes_per_s": round(nbytes / write_s),
            "read_bytes_per_s": round(nbytes / read_s),
        },
    )


def _large(path: Path, nbytes: int) -> tuple[float, float]:
    """Write and read that much in one call; returns the seconds of both."""
    block = os.urandom(_BLOCK_BYTES)
    fd = fs.create(path)
    try:
        started = time.perf_counter()
        written = fs.write_all(fd, [memoryview(block)] * (nbytes // _BLOCK_BYTES))
        write_s = time.perf_counter() - started
        if written != nbytes or os.fstat(fd).st_size != nbytes:
            raise Failed(f"writev wrote {os.fstat(fd).st_size:,} of {nbytes:,} bytes")
        with path.open("rb", buffering=0) as file:
            for _ in range(nbytes // _BLOCK_BYTES):
                if file.read(_BLOCK_BYTES) != block:
                    raise Failed(f"writev of {nbytes:,} bytes wrote other bytes than it was given")
        with mmap.mmap(-1, nbytes) as memory:
            view = memoryview(memory)
            parts = [view[start : start + _BLOCK_BYTES] for start in range(0, nbytes, _BLOCK_BYTES)]
            try:
                started = time.perf_counter()
                count = fs.read_into(fd, 0, parts)
                read_s = time.perf_counter() - started
                if count != nbytes or any(bytes(part) != block for part in parts):
                    raise Failed(f"preadv of {nbytes:,} bytes read other bytes than the file has")
            finally:
                for part in parts:
                    part.release()
                view.release()
    finally:
        os.close(fd)
        path.unlink()
    return write_s, read_s


def syncs_are_durable(setting: Setting) -> Result:
    """Make a file and a folder durable, as often as needed for a median."""
    path = setting.folder / "synced"
    fd = fs.create(path)
    try:
        if not fs.syncs_fully(fd):
            raise Failed("this volume has no F_FULLFSYNC: a power cut can take commits back")
        file_s = statistics.median(_time_sync(fd) for _ in range(setting.some(60)))
    finally:
        os.close(fd)
    folder_s = statistics.median(
        _time_folder_sync(setting.folder, number) for number in range(setting.some(60))
    )
    return Result(
        f"a file takes {file_s * 1000:.2f} ms, a folder {folder_s * 1000:.2f} ms (medians)",
        {"file_sync_s": file_s, "folder_sync_s": folder_s},
    )


def _time_sync(fd: int) -> float:
    os.pwrite(fd, os.urandom(4096), 0)
    started = time.perf_counter()
    fs.sync(fd)
    return time.perf_counter() - started


def _time_folder_sync(folder: Path, number: int) -> float:
    os.close(fs.create(folder / f"entry-{number}"))
    started = time.perf_counter()
    fs.sync_folder(folder)
    return time.perf_counter() - started


def space_returns(setting: Setting) -> Result:
    """Unlink a file, and see its room come back: else evicting for room is in vain."""
    nbytes = setting.some(256) * MIB
    best = -1.0
    for number in range(3):  # other programs write, too
        before = fs.free_bytes(setting.folder)
        path = _written(setting.folder / f"space-{number}", nbytes)
        fs.sync_file_system(setting.folder)
        full = fs.free_bytes(setting.folder)
        path.unlink()
        returned_s, returned = _returned(setting.folder, full, nbytes)
        best = max(best, returned / nbytes)
        if returned >= nbytes // 2:
            return Result(
                f"{returned / MIB:,.0f} of {nbytes / MIB:,.0f} MiB came back after "
                f"{returned_s:.2f} s",
                {
                    "nbytes": nbytes,
                    "taken_bytes": before - full,
                    "returned_bytes": returned,
                    "returned_s": returned_s,
                },
            )
    raise Failed(
        f"unlinking a file gave {best:.0%} of its bytes back: a snapshot holds it, or another "
        "program writes as much; evicting for the free-space floor is in vain"
    )


def _returned(folder: Path, full: int, nbytes: int) -> tuple[float, int]:
    """Seconds until most of the room was back, and how much is."""
    started = time.monotonic()
    while True:
        returned = fs.free_bytes(folder) - full
        passed = time.monotonic() - started
        if returned >= nbytes * 9 // 10 or passed > _SPACE_PATIENCE_S:
            return passed, returned
        fs.sync_file_system(folder)
        time.sleep(0.01)


def reads_come_from_the_disk(setting: Setting) -> Result:
    """Keep a file out of the page cache, as `doctor` does to measure the disk."""
    path = _written(setting.folder / "uncached", setting.some(256) * MIB)
    share = _resident(path)
    if share > 0.1:
        raise _still_cached(setting.folder, share)
    speed = facts.measure_disk(setting.folder)
    return Result(
        f"{speed.read_bytes_per_s / MIB:,.0f} MiB/s read past the cache, "
        f"{speed.write_bytes_per_s / MIB:,.0f} MiB/s written and synced",
        {
            "resident_share": share,
            "read_bytes_per_s": round(speed.read_bytes_per_s),
            "write_bytes_per_s": round(speed.write_bytes_per_s),
            "sync_s": speed.sync_s,
        },
    )


def read_ahead_works(setting: Setting) -> Result:
    """Advise the system to read a file, and see it come into the page cache."""
    path = _written(setting.folder / "advised", setting.some(64) * MIB)
    before = _resident(path)
    if before > 0.1:
        raise NotApplicable(f"{before:.0%} of a new file stays in the page cache here")
    started = time.monotonic()
    nbytes = fs.read_ahead(path)
    advised_s = time.monotonic() - started
    while (share := _resident(path)) < 0.9 and time.monotonic() - started < 10:
        time.sleep(0.01)
    if share < 0.5:
        raise Failed(f"after the advice {share:.0%} of the file were in the page cache")
    return Result(
        f"{nbytes // MIB:,} MiB were advised in {advised_s * 1000:.1f} ms, {share:.0%} of them "
        f"there after {time.monotonic() - started:.2f} s",
        {
            "nbytes": nbytes,
            "advised_s": advised_s,
            "resident_share": share,
            "there_s": time.monotonic() - started,
        },
    )


def _still_cached(folder: Path, share: float) -> Exception:
    if Mounts().kind(folder) in ("tmpfs", "ramfs"):
        return NotApplicable("this file system is memory")
    return Failed(
        f"{share:.0%} of a file were in the page cache after it had been dropped from it: what is "
        "measured would be memory"
    )


def _written(path: Path, nbytes: int) -> Path:
    """A file of random bytes, durable and kept out of the page cache where that can be."""
    block = os.urandom(MIB)
    fd = fs.create(path)
    try:
        fs.bypass_cache(fd)
        fs.write_all(fd, [memoryview(block)] * (nbytes // MIB))
        fs.sync(fd)
        fs.drop_cache(fd)
    finally:
        os.close(fd)
    return path


def _resident(path: Path) -> float:
    """The share of a file's pages that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = ctypes.create_string_buffer(pages)
        first = ctypes.c_char.from_buffer(mapped)
        try:
            if libc.mincore(ctypes.addressof(first), len(mapped), found):
                reason = os.strerror(ctypes.get_errno())
                raise NotApplicable(f"{sys.platform} does not say what is cached ({reason})")
        finally:
            del first
        return sum(byte & 1 for byte in found.raw) / pages
