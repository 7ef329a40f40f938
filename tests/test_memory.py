"""Freed memory goes back to the system, whichever thread had it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
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


def test_what_any_thread_freed_goes_back_when_they_share_one_heap() -> None:
    assert left_bytes("one") < 4 << 20
    assert left_bytes("many") > 20 << 20  # what it is for


def test_who_has_set_the_number_of_heaps_keeps_it() -> None:
    assert left_bytes("one", MALLOC_ARENA_MAX="8") > 20 << 20
