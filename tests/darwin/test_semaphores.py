"""Semaphores that dead processes left, and those that live ones have."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import threading
from pathlib import Path
from typing import Any

import lmdb
import pytest

from persist_cache import Store, fs
from persist_cache.errors import StoreBusyError, StoreError
from persist_cache.index import semaphores
from tests import forge
from tests.darwin import processes
from tests.darwin.processes import abandon, exists, give, kept, names, unlink, use, value
from tests.fakes import Clock, fetched, put

_INSIDE = """
with opened(folder) as store:
    locks = forge.index(store).semaphores
    with locks.claiming():
        assert locks.take_readers()
        print("open", flush=True)
        sys.stdin.read()
"""


def open_store(folder: Path, **options: Any) -> Store:
    return Store.open(
        folder, max_bytes=1 << 30, min_free_bytes=0, run_tokens=8, clock=Clock(), **options
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    with open_store(folder) as store:
        put(store, [1, 2, 3])
    return folder


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["readers", "writers", "both"])
def test_abandoned_semaphore_stops_nobody(folder: Path, which: tuple[int, ...]) -> None:
    """Nothing tells that a process died: the mark in `writer.lock` may fail on a full disk."""
    with kept(folder) as keeper:
        both = names(folder)
        for one in which:
            abandon(both[one])

        use(folder, [4, 5, 6])

        assert [value(name) for name in both] == [1, 1]
        assert keeper.poll() is None


def test_process_that_has_the_store_open_goes_on(folder: Path) -> None:
    with kept(folder):
        both = names(folder)
    script = """
with opened(folder) as store:
    from tests.darwin.processes import abandon
    for name in arguments:
        abandon(name)
    put(store, [4, 5, 6])
    for name in arguments:
        abandon(name)
    assert fetched(store, [4, 5, 6]) == 3
    with store.read(), forge.index(store)._begin_read(False):
        pass
"""
    processes.run(script, folder, *both)


def test_commit_of_the_dead_writer_is_not_lost(folder: Path) -> None:
    """It had written its meta page, and died before it put the number into `lock.mdb`."""
    with kept(folder):
        writer = names(folder)[1]
        use(folder, [4, 5, 6])
        set_back(folder)
        abandon(writer)

        use(folder, [7, 8, 9])
        set_back(folder)
        abandon(writer)
        use(folder, [10, 11, 12])

        with_all = "for one in ([1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]):\n"
        processes.run(
            f"with opened(folder) as store:\n  {with_all}    assert fetched(store, one) == 3, one",
            folder,
        )


def set_back(folder: Path) -> None:
    """Have `lock.mdb` say that the last commit was not made, and `writer.lock` that one died."""
    with (folder / "lock.mdb").open("r+b", buffering=0) as file:
        number = struct.unpack("=Q", os.pread(file.fileno(), 8, 40))[0]
        assert number > 2
        os.pwrite(file.fileno(), struct.pack("=Q", number - 1), 40)
    with (folder / "writer.lock").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"\x01", 0)


def test_number_of_the_last_commit_is_where_it_is_looked_for(folder: Path) -> None:
    with open_store(folder) as store:
        locks = forge.index(store).semaphores
        assert locks is not None
        before = locks.commits()
        put(store, [4, 5, 6])
        with store.read() as txn:
            commit = txn.commit_id
        after = locks.commits()

    assert before[0] == before[1]
    assert after == (commit, commit)
    assert commit > before[0]


def test_semaphore_that_was_given_twice_lets_one_in(folder: Path) -> None:
    with kept(folder):
        both = names(folder)
        for name in both:
            give(name)

        use(folder, [4, 5, 6])

        assert [value(name) for name in both] == [1, 1]


def test_live_process_inside_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semaphores, "PATIENCE_S", 0.5)
    with kept(folder, _INSIDE) as inside:
        readers = names(folder)[0]
        inside.send_signal(signal.SIGSTOP)
        with pytest.raises(StoreBusyError, match=r"data\.mdb"):
            open_store(folder)
        assert value(readers) == 0, "it was given away under a process that is inside"
        inside.kill()
        inside.wait()

        with kept(folder):
            use(folder, [4, 5, 6])


def test_threads_that_read_at_once_leave_it_free(folder: Path) -> None:
    failed: list[BaseException] = []

    def look(store: Store) -> None:
        try:
            for _ in range(50):
                assert fetched(store, [1, 2, 3]) == 3
        except BaseException as error:
            failed.append(error)

    with kept(folder):
        both = names(folder)
        with open_store(folder) as store:
            threads = [threading.Thread(target=look, args=(store,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert [value(name) for name in both] == [1, 1]
    assert failed == []


@pytest.mark.parametrize("read_only", [False, True])
def test_opening_while_another_closes_tries_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    """The last process that closes a store removes the names, while another reads them."""
    opened = lmdb.open
    tries = []
    with kept(folder) as closing:
        for name in names(folder):
            unlink(name)

        def watched(*arguments: Any, **options: Any) -> Any:
            try:
                return opened(*arguments, **options)
            except lmdb.Error as error:
                tries.append(str(error))
                closing.kill()
                closing.wait()
                raise

        monkeypatch.setattr(lmdb, "open", watched)
        with open_store(folder, read_only=read_only) as store:
            assert fetched(store, [1, 2, 3]) == 3

    assert len(tries) == 1
    assert "No such file" in tries[0]


def test_names_that_stay_missing_are_a_sentence(folder: Path) -> None:
    with kept(folder):
        for name in names(folder):
            unlink(name)
        with pytest.raises(StoreError, match="semaphores are missing"):
            open_store(folder)


def test_full_table_of_semaphores_is_no_full_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARWIN_LANE_SEMAPHORES", "full")
    with pytest.raises(StoreError, match="no room for another named semaphore") as caught:
        open_store(folder)

    assert "disk" not in str(caught.value)
    monkeypatch.undo()
    with open_store(folder) as store:
        assert fetched(store, [1, 2, 3]) == 3


def test_last_one_leaves_no_names(folder: Path) -> None:
    with kept(folder) as killed:
        both = names(folder)
        killed.kill()
        killed.wait()
    assert all(exists(name) for name in both), "LMDB cleans up after a killed process"

    open_store(folder).close()

    assert not any(exists(name) for name in both)


def test_names_go_with_the_index_that_is_made_anew(folder: Path) -> None:
    with kept(folder):
        both = names(folder)
    assert all(exists(name) for name in both)
    (folder / "data.mdb").write_bytes(b"damaged" * 4000)

    with open_store(folder) as store:
        assert fetched(store, [1, 2, 3]) == 3

    assert not any(exists(name) for name in both)


@pytest.mark.parametrize("step", ["lock", "unlock"])
def test_opening_that_fails_at_a_lock_leaves_nothing_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    call = getattr(fs, step)
    for place in range(1, 12):
        left = [place]

        def fail(*arguments: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return call(*arguments)

        (folder / "data.mdb").unlink()
        with monkeypatch.context() as patch, contextlib.suppress(StoreError):
            patch.setattr(fs, step, fail)
            open_store(folder).close()

        with open_store(folder) as store:
            assert fetched(store, [1, 2, 3]) == 3
