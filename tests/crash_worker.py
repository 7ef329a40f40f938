"""Kills itself at every step of an operation, again and again; run by `test_crash`.

It forks one child per step, so that hundreds of crashes cost one start of Python. The child opens
the store, dies in the midst of the operation, and the parent opens the same store and looks at
what is left.

    python -m tests.crash_worker FOLDER OPERATION
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from persist_cache import fs
from persist_cache.index.environment import Index
from persist_cache.index.transaction import Writer
from persist_cache.store.store import Store
from tests import forge
from tests.fakes import Clock, blob_files, disk_usage, fetched, put

SYSTEM = list(range(1, 20))
OLD = [*SYSTEM, 50, 51, 52]
RECURRENT = [*SYSTEM[:9], 60, 61]
NEW = [*SYSTEM[:12], *range(70, 90)]
MAX_BYTES = 600_000 + 68 * (mmap.PAGESIZE - 4096)  # as in `test_evict`
KILLED = 9
STEPS = (
    "create",
    "write_all",
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
)


class Seam:
    """Calls `act` at the n-th step, counting file-system calls and both sides of each commit."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.at = at
        self.act = act
        self.count = 0
        self.names: list[str] = []

    def step(self, name: str) -> None:
        self.names.append(name)
        self.count += 1
        if self.count == self.at:
            self.act()

    def install(self) -> Callable[[], None]:
        """Wrap everything; returns what takes it off again."""
        originals: dict[str, Any] = {name: getattr(fs, name) for name in STEPS}
        update = Index.update
        for name, original in originals.items():
            setattr(fs, name, self._wrapped(name, original))

        def watched(index: Index, change: Callable[[Writer], Any]) -> Any:
            def inner(txn: Writer) -> Any:
                value = change(txn)
                self.step("before commit")
                return value

            value = update(index, inner)
            self.step("after commit")
            return value

        Index.update = watched  # type: ignore[method-assign,assignment]

        def uninstall() -> None:
            for name, original in originals.items():
                setattr(fs, name, original)
            Index.update = update  # type: ignore[method-assign]

        return uninstall

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if name == "write_all" and self.count + 1 == self.at:
                fd, buffers = args
                half = buffers[: len(buffers) // 2 + 1]
                original(fd, [half[0][: len(half[0]) // 2], *half[1:]])
            self.step(name)
            return original(*args)

        return call


def open_store(folder: Path, max_bytes: int = MAX_BYTES) -> Store:
    return Store.open(folder, max_bytes=max_bytes, min_free_bytes=0, run_tokens=8, clock=Clock())


def prepare(folder: Path) -> None:
    """A store with three entries, one of them with a state of its own."""
    with open_store(folder) as store:
        put(store, SYSTEM, tier="system")
        put(store, OLD, tier="user")
        put(store, RECURRENT, complete=False, model="w1")


def put_new(store: Store) -> None:
    put(store, NEW)


def put_new_state(store: Store) -> None:
    put(store, [*RECURRENT, 99], complete=False, model="w1")


def evict_all(store: Store) -> None:
    store.evict([entry.id for entry in store.entries()])


def make_room(store: Store) -> None:
    store.evict_to(store.stats().usage.total - 30_000)


def quarantine(store: Store) -> None:
    path = blob_files(store.root)[0]
    path.write_bytes(path.read_bytes()[:-1])
    store.check(repair=True)


def rebuild(store: Store) -> None:
    forge.change(store, lambda txn: txn.add("blob_bytes", 1))
    store.check(repair=True)


def reopen_without_index(store: Store) -> None:
    root = store.root
    store.close()
    (root / "data.mdb").unlink()
    open_store(root).close()


OPERATIONS: dict[str, Callable[[Store], None]] = {
    "put": put_new,
    "put_state": put_new_state,
    "evict": evict_all,
    "make_room": make_room,
    "quarantine": quarantine,
    "rebuild": rebuild,
    "reopen_without_index": reopen_without_index,
}
REMOVES = {"evict", "make_room", "quarantine"}


def crash(folder: Path, operation: Callable[[Store], None], at: int) -> bool:
    """Run `operation` in a child that dies at step `at`; returns whether it got that far."""
    child = os.fork()
    if child == 0:
        try:
            store = open_store(folder)
            Seam(at, lambda: os._exit(KILLED)).install()
            operation(store)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), f"the child failed with {code}"
    return code == KILLED


def verify(folder: Path, operation: str) -> None:
    """What a crash may leave: a sound store, and every entry that was there, or is on purpose."""
    with open_store(folder) as store:
        problems = store.check(read_data=True)
        if operation == "quarantine":
            problems = [one for one in problems if one.kind != "damaged"]
            store.check(read_data=True, repair=True)
            assert store.check(read_data=True) == []
        if problems and {one.kind for one in problems} == {"orphan"}:
            raise AssertionError(f"files that nobody will remove: {problems}")
        if operation == "rebuild":  # the damage was done before the crash
            problems = [one for one in problems if "the counter says" not in one.message]
            store.check(repair=True)
        assert problems == [], problems
        usage = store.stats().usage
        assert usage.pending == 0, "a dead writer's reservation is left"
        assert usage.trash == 0, "the trash was not emptied"
        assert usage.total == disk_usage(folder), (usage, disk_usage(folder))
        assert usage.total <= MAX_BYTES
        assert list((folder / "tmp").iterdir()) == []
        if operation not in REMOVES:
            assert fetched(store, OLD) == len(OLD)
            assert fetched(store, RECURRENT, model="w1") == len(RECURRENT)
        # It works on, whatever happened.
        put(store, NEW)
        assert fetched(store, NEW) == len(NEW)
        assert store.check(read_data=True) == []


def main(folder: Path, operation: str) -> int:
    template = folder / "template"
    prepare(template)
    at = 1
    while True:
        copy = folder / "copy"
        shutil.copytree(template, copy)
        died = crash(copy, OPERATIONS[operation], at)
        try:
            verify(copy, operation)
        except BaseException as error:
            raise AssertionError(f"{operation}, killed at step {at}: {error!r}") from error
        shutil.rmtree(copy)
        if not died:
            return at - 1
        at += 1


if __name__ == "__main__":
    print(json.dumps({"crashes": main(Path(sys.argv[1]), sys.argv[2])}))
