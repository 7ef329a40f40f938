"""Other processes that use a store, and what they do to LMDB's semaphores.

What takes a semaphore here does so by its name alone, with none of the store's code.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATIENCE_S = 40.0
_OPEN = """
import sys
from pathlib import Path
from persist_cache.store.store import Store
from tests import forge
from tests.fakes import Clock, fetched, put

def opened(folder, **options):
    given = {"max_bytes": 1 << 30, "min_free_bytes": 0, "run_tokens": 8, "clock": Clock()}
    return Store.open(Path(folder), **given | options)

folder, *arguments = sys.argv[1:]
"""
_KEEP = """
with opened(folder) as store:
    with store.read():
        pass
    print("open", flush=True)
    sys.stdin.read()
"""
_USE = """
import json
with opened(folder) as store:
    for prompt in json.loads(arguments[0]):
        put(store, prompt)
        assert fetched(store, prompt) == len(prompt)
    problems = store.check(read_data=True)
    assert problems == [], problems
"""


def run(script: str, folder: Path, *arguments: str, **options: Any) -> None:
    """Run a script in another process; fails if it does or is not done in `PATIENCE_S`."""
    done = subprocess.run(
        [sys.executable, "-c", _OPEN + script, str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr


def use(folder: Path, *prompts: list[int], **options: Any) -> None:
    """Open the store in another process, store prompts, and check it."""
    run(_USE, folder, json.dumps(prompts), **options)


@contextlib.contextmanager
def kept(folder: Path, script: str = _KEEP) -> Iterator[subprocess.Popen[str]]:
    """Another process has the store open, and is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", _OPEN + script, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as keeper:
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == "open\n"
            yield keeper
        finally:
            keeper.kill()


def names(folder: Path) -> tuple[str, str]:
    """The readers' and the writers' semaphore of a store.

    Not where this process has the store open: LMDB would lose its locks.
    """
    head = (folder / "lock.mdb").read_bytes()[:256]
    found = re.findall(rb"/MDB[rw][!-~]+", head)
    assert [one[:5] for one in found] == [b"/MDBr", b"/MDBw"], head
    return found[0].decode(), found[1].decode()


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sem_open.restype = ctypes.c_void_p
    libc.sem_open.argtypes = (ctypes.c_char_p, ctypes.c_int)
    for function in (libc.sem_trywait, libc.sem_post, libc.sem_close):
        function.argtypes = (ctypes.c_void_p,)
    libc.sem_getvalue.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
    return libc


@contextlib.contextmanager
def _opened(name: str) -> Iterator[int]:
    handle = _libc().sem_open(name.encode(), 0)
    assert handle, f"there is no semaphore {name}"
    try:
        yield handle
    finally:
        _libc().sem_close(handle)


def abandon(name: str) -> None:
    """Leave a semaphore taken."""
    with _opened(name) as handle:
        assert _libc().sem_trywait(handle) == 0


def give(name: str) -> None:
    """Give a semaphore back, whoever has it."""
    with _opened(name) as handle:
        assert _libc().sem_post(handle) == 0


def value(name: str) -> int:
    """How many may still take a semaphore."""
    found = ctypes.c_int(-1)
    with _opened(name) as handle:
        _libc().sem_getvalue(handle, found)
    return found.value


def unlink(name: str) -> None:
    """Remove a semaphore's name."""
    assert _libc().sem_unlink(name.encode()) == 0


def exists(name: str) -> bool:
    """Whether there is a semaphore of that name."""
    return os.path.exists(f"/dev/shm/sem.{name[1:]}")
