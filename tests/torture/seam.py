"""Faults at any single step of the store: a failing, short or slow file-system call, or death.

Steps are the calls of `persist_cache.fs` and both sides of every commit of the index.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from persist_cache import fs
from persist_cache.index.environment import Index
from persist_cache.index.transaction import Writer

CALLS = (
    "create",
    "open_shared",
    "open_read",
    "allocate",
    "write_all",
    "write_at",
    "read_into",
    "sync",
    "sync_folder",
    "rename",
    "unlink",
    "make_folder",
    "try_lock",
    "lock",
    "unlock",
    "lock_shared",
    "disk_bytes",
    "free_bytes",
)
COMMITS = ("before commit", "after commit")
ERRORS = {
    "no space": errno.ENOSPC,
    "I/O error": errno.EIO,
    "no descriptors": errno.EMFILE,
    "no permission": errno.EACCES,
    "read-only": errno.EROFS,
}
"""Faults by which a call fails."""
KINDS = (*ERRORS, "short", "slow", "killed")
_SLOW_S = 0.002


class Seam:
    """Asks `choose` before every step which fault, if any, it is to suffer."""

    def __init__(self, choose: Callable[[int, str], str | None]) -> None:
        """Prepare; `choose` gets the number of the step, from 1, and its name."""
        self._choose = choose
        self.names: list[str] = []
        self.injected: list[str] = []

    def step(self, name: str, begin: Callable[[], object] = lambda: None) -> str | None:
        """Suffer the fault of this step; returns its kind, for those the caller acts out.

        Args:
            name: The step.
            begin: Leaves behind what a step does that is cut short by an error or by death.
        """
        self.names.append(name)
        kind = self._choose(len(self.names), name)
        if kind is None:
            return None
        self.injected.append(kind)
        if kind in ERRORS or kind == "killed":
            begin()
        if kind in ERRORS:
            raise OSError(ERRORS[kind], "made up")
        if kind == "slow":
            time.sleep(_SLOW_S)
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return kind

    @contextlib.contextmanager
    def installed(self) -> Iterator[Seam]:
        """Stand between the store and the disk."""
        originals: dict[str, Any] = {name: getattr(fs, name) for name in CALLS}
        update = Index.update
        for name, original in originals.items():
            setattr(fs, name, self._wrapped(name, original))

        def watched(index: Index, change: Callable[[Writer], Any]) -> Any:
            def inner(txn: Writer) -> Any:
                value = change(txn)
                self.step(COMMITS[0])
                return value

            value = update(index, inner)
            with _as_the_index_says():
                self.step(COMMITS[1])
            return value

        Index.update = watched  # type: ignore[method-assign,assignment]
        try:
            yield self
        finally:
            for name, original in originals.items():
                setattr(fs, name, original)
            Index.update = update  # type: ignore[method-assign]

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begin = partial(_write_half, original, *args) if name == "write_all" else lambda: None
            if self.step(name, begin) == "short":
                with _short_calls():
                    return original(*args)
            return original(*args)

        return call


@contextlib.contextmanager
def _as_the_index_says() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise fs.translated(error, "after a commit") from error


def _write_half(original: Callable[..., Any], fd: int, buffers: Sequence[memoryview]) -> None:
    half = list(buffers[: len(buffers) // 2 + 1])
    original(fd, [half[0][: len(half[0]) // 2], *half[1:]])


class _ShortOs:
    """The module `os` on a file system that reads and writes a little at a time."""

    def __init__(self, real: Any, nbytes: int) -> None:
        self._real = real
        self._nbytes = nbytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def writev(self, fd: int, buffers: Sequence[memoryview]) -> int:
        first = next((one for one in buffers if len(one)), memoryview(b""))
        return os.writev(fd, [first[: self._nbytes]])

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.pwrite(fd, buffer[: self._nbytes], offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        first = next((one for one in buffers if len(one)), memoryview(b""))
        return os.preadv(fd, [first[: self._nbytes]], offset)


@contextlib.contextmanager
def _short_calls(nbytes: int = 1000) -> Iterator[None]:
    real = vars(fs)["os"]
    vars(fs)["os"] = _ShortOs(real, nbytes)
    try:
        yield
    finally:
        vars(fs)["os"] = real


def at_step(number: int, kind: str, *, lasting: bool = False) -> Callable[[int, str], str | None]:
    """One fault at step `number`; with `lasting` at every step from there on."""

    def choose(step: int, name: str) -> str | None:
        return kind if step == number or (lasting and step > number) else None

    return choose


def at_random(dice: random.Random, share: float, kinds: Sequence[str]) -> Callable[..., str | None]:
    """A fault at about every `1 / share`-th step; never an unreadable sector, which costs data."""

    def choose(step: int, name: str) -> str | None:
        if dice.random() >= share:
            return None
        kind = dice.choice(kinds)
        return "short" if kind == "I/O error" and name in ("read_into", "open_read") else kind

    return choose
