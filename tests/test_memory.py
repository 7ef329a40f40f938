"""Freed memory goes back to the system, whichever thread had it, and so do pages of files."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from persist_cache.system import memory

on_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc has a heap for each thread"
)

FREEING = """
import os, sys, threading
from persist_cache.system import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def work():
    for _ in range(2):
        [bytearray(60_000) for _ in range(600)]

if sys.argv[1] == "one":
    memory.share_one_heap()
del [bytearray(30 << 20)][0]  # as weights are: glibc keeps more of the heaps' ends from now on
before = resident()
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
memory.give_back()
print(resident() - before)
"""


def left_bytes(heaps: str, **variables: str) -> int:
    """What a process is larger by when threads of it have had 36 MB each, and let go of it."""
    env = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    found = subprocess.run(
        [sys.executable, "-c", FREEING, heaps],
        env=env | variables,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    return int(found.stdout)


@on_glibc
def test_what_any_thread_freed_goes_back_when_they_share_one_heap() -> None:
    assert left_bytes("one") < 4 << 20
    assert left_bytes("many") > 20 << 20  # what it is for


@on_glibc
def test_who_has_set_the_number_of_heaps_keeps_it() -> None:
    assert left_bytes("one", MALLOC_ARENA_MAX="8") > 20 << 20


def resident_kib(address: int) -> int:
    """What of a mapping counts as this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_bytes().split(b"\n"))
    for line in lines:
        if line.startswith(b"%x-" % address):
            return next(int(one.split()[1]) for one in lines if one.startswith(b"Rss:"))
    raise AssertionError(f"nothing is mapped at {address:x}")


@pytest.mark.on_disk
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told to take them")
@pytest.mark.parametrize("name", ["program", "\udce9\x85 \x1c/program"], ids=["plain", "odd"])
def test_pages_of_files_leave_memory_and_what_was_written_to_them_does_not(
    tmp_path: Path, name: str
) -> None:
    """As the loader does: pages are changed, and may only be read from then on."""
    file, content = tmp_path / name, os.urandom(4 << 20)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        with mmap.mmap(
            opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        ) as mapped:
            mapped[:4] = b"mine"
            assert mapped[4:] == content[4:]
            view = ctypes.c_char.from_buffer(mapped)
            address = ctypes.c_void_p(ctypes.addressof(view))
            library = ctypes.CDLL(None)
            assert library.mprotect(address, ctypes.c_size_t(len(content)), mmap.PROT_READ) == 0
            if library.madvise(address, ctypes.c_size_t(mmap.PAGESIZE), 21):
                pytest.skip("this system's Linux cannot be told to take pages")
            assert mapped[:] == b"mine" + content[4:]
            before = resident_kib(address.value or 0)

            memory.page_out_programs()

            after = resident_kib(address.value or 0)
            assert mapped[:] == b"mine" + content[4:]
            del view
    assert before >= 4096
    assert after < before / 2
