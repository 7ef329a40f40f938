"""Blobs of mostly dead rows are written anew, and nobody can tell but by the bytes on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from persist_cache import fs
from persist_cache.entry import Tier
from persist_cache.errors import StoreError
from persist_cache.index.environment import Index
from persist_cache.index.records import BlobRecord
from persist_cache.index.transaction import Writer
from persist_cache.store.store import Store
from tests.fakes import Clock, blob_files, disk_usage, fetched, files_in, meanwhile, put, restore
from tests.fakes import fingerprint as identity

LONG = list(range(1, 401))
HEAD = LONG[:10]
BRANCH = [*LONG[:6], 900, 901]


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with open_store(tmp_path / "store", clock) as opened:
        yield opened


def open_store(root: Path, clock: Clock | None = None, **options: Any) -> Store:
    return Store.open(
        root, **{"max_bytes": 1 << 30, "min_free_bytes": 0, "clock": clock or Clock(), **options}
    )


def leave_dead_rows(store: Store) -> str:
    """Ten living rows and 390 dead ones in one file; returns the entry that lives."""
    long = put(store, LONG, tier="user")
    head = put(store, HEAD, tier="system", label="kept")
    store.evict([long])
    assert fetched(store, LONG) == len(HEAD)
    return head


def blobs(store: Store) -> list[BlobRecord]:
    with store.read() as txn:
        return [record for _, record in txn.blobs()]


def test_living_rows_are_written_anew_and_the_dead_go(store: Store) -> None:
    head = leave_dead_rows(store)
    before, (old,) = store.get(head), blob_files(store.root)
    length = old.stat().st_size
    size = disk_usage(store.root)

    collected = store.gc()

    (new,) = blob_files(store.root)
    assert (collected.compacted, collected.without_room) == (1, 0)
    assert collected.freed_bytes >= size - disk_usage(store.root) > 20_000
    assert new.name != old.name
    assert new.stat().st_size < length / 2
    (record,) = blobs(store)
    assert record.num_tokens == len(HEAD)
    assert store.check(read_data=True) == []
    assert fetched(store, LONG) == len(HEAD)
    after = store.get(head)
    assert (after.id, after.tier, after.label, after.created) == (
        before.id, before.tier, before.label, before.created,
    )  # fmt: skip
    assert store.stats().usage.total == disk_usage(store.root)
    assert store.gc().compacted == 0, "once is enough"


def test_edges_of_a_branch_and_what_hangs_behind_come_along(store: Store) -> None:
    head = leave_dead_rows(store)
    put(store, BRANCH)
    put(store, [*HEAD, 800, 801])
    put(store, [*BRANCH, 7], complete=False)
    put(store, HEAD[:3], complete=False, model="w1")

    assert store.gc().compacted == 1

    assert store.check(read_data=True) == []
    assert fetched(store, [*BRANCH, 7, 8]) == len(BRANCH) + 1
    assert fetched(store, [*HEAD, 800, 801, 5]) == len(HEAD) + 2
    assert fetched(store, LONG) == store.get(head).num_tokens
    assert fetched(store, HEAD[:3], model="w1") == 3


def test_new_index_finds_what_hung_on_the_old_file(store: Store) -> None:
    """Files name the one they hang on, and are never changed: the new one answers for the old."""
    leave_dead_rows(store)
    put(store, [*HEAD, *range(500, 900)], tier="user")
    put(store, BRANCH)
    put(store, [*HEAD, *range(500, 520)])
    (long,) = [one.id for one in store.entries() if one.num_tokens == 410]
    assert store.gc().compacted == 1
    store.evict([long])
    assert store.gc().compacted == 1
    put(store, [*HEAD, *range(500, 520), 3])
    store.close()

    for _ in range(2):
        (store.root / "data.mdb").unlink()
        with open_store(store.root) as again:
            assert fetched(again, BRANCH) == len(BRANCH)
            assert fetched(again, [*HEAD, *range(500, 520), 3]) == 31
            assert again.check(read_data=True) == []
            again.gc()
            (kept,) = [one for one in again.entries() if one.num_tokens == len(HEAD)]
            assert kept.tier == Tier.SYSTEM


def test_blobs_that_are_half_alive_stay(store: Store) -> None:
    long = put(store, LONG)
    put(store, LONG[:220])
    store.evict([long])
    put(store, [5, 5, 5, 5])
    small = put(store, [5, 5, 5, 5, *range(20)])
    files = blob_files(store.root)
    store.evict([small])

    assert store.gc().compacted == 0

    assert set(blob_files(store.root)) <= set(files)


def test_copy_needs_room_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path / "store") as store:
        leave_dead_rows(store)
        put(store, LONG[::-1], pinned=True)
        tight = disk_usage(store.root) - store.stats().usage.ballast + 20_000
    open_store(tmp_path / "store", max_bytes=tight).close()  # the ballast is a smaller one now
    worst = 0

    def sampled(name: str) -> Callable[..., Any]:
        original = getattr(fs, name)

        def call(*arguments: Any) -> Any:
            nonlocal worst
            value = original(*arguments)
            worst = max(worst, disk_usage(tmp_path / "store"))
            return value

        return call

    for name in ("write_all", "rename", "unlink", "unlock"):
        monkeypatch.setattr(fs, name, sampled(name))
    with open_store(tmp_path / "store", max_bytes=tight) as store:
        before = {entry.id for entry in store.entries()}
        collected = store.gc()
        assert (collected.compacted, collected.without_room) == (0, 1)
        assert {entry.id for entry in store.entries()} == before, "nothing goes for a copy"
        assert list((store.root / "tmp").iterdir()) == []
        assert store.stats().usage.pending == 0
    assert worst <= tight

    with open_store(tmp_path / "store", max_bytes=tight + 300_000) as store:
        assert store.gc().compacted == 1
        assert worst <= tight + 300_000


def test_copies_count_against_the_bytes_of_a_day(tmp_path: Path) -> None:
    with open_store(tmp_path / "store", daily_write_bytes=60_000) as store:
        leave_dead_rows(store)
        assert store.gc().without_room == 1
    with open_store(tmp_path / "store") as store:
        written = store.stats().written_today
        assert store.gc().compacted == 1
        assert store.stats().written_today == written + blobs(store)[0].nbytes


@pytest.mark.parametrize("at", [100, -1, -30_000])
def test_damaged_file_is_put_aside_and_not_copied(store: Store, at: int) -> None:
    leave_dead_rows(store)
    (path,) = blob_files(store.root)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)

    collected = store.gc()

    assert collected.compacted == 0
    assert blob_files(store.root) == []
    assert len(list((store.root / "quarantine").iterdir())) == 1
    assert store.check() == []
    assert fetched(store, LONG) == 0
    assert store.stats().counters["quarantined"] == 1


def test_missing_file_takes_its_records_along(store: Store) -> None:
    leave_dead_rows(store)
    blob_files(store.root)[0].unlink()

    assert store.gc().compacted == 0

    assert store.check() == []
    assert store.entries() == []


def test_rows_that_came_to_life_meanwhile_are_not_cut_off(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_dead_rows(store)
    meanwhile(monkeypatch, lambda: put(store, LONG[:50]))

    assert store.gc().compacted == 0

    assert fetched(store, LONG) == 50
    assert store.check(read_data=True) == []
    assert store.stats().usage.pending == 0
    assert store.gc().compacted == 1
    assert fetched(store, LONG) == 50


def test_rows_that_died_meanwhile_stay_dead(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    head = leave_dead_rows(store)
    put(store, LONG[:4])
    meanwhile(monkeypatch, lambda: store.evict([head]))

    assert store.gc().compacted == 1

    assert fetched(store, LONG) == 4
    assert store.check(read_data=True) == []


def test_entry_that_went_meanwhile_is_gone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    head = leave_dead_rows(store)
    meanwhile(monkeypatch, lambda: store.evict([head]))

    assert store.gc().compacted == 0

    assert files_in(store.root / "blobs") == []
    assert store.check() == []
    assert store.stats().usage.pending == 0


def test_prompt_inserted_meanwhile_hangs_on_the_copy(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_dead_rows(store)
    update = Index.update
    turns = iter(range(100))

    def compact_first(index: Index, change: Callable[[Writer], Any]) -> Any:
        # The put has written its file, which names the old one, when the old one goes.
        if next(turns) == 1:
            monkeypatch.undo()
            assert store.gc().compacted == 1
        return update(index, change)

    monkeypatch.setattr(Index, "update", compact_first)
    put(store, [*HEAD, 700])

    assert fetched(store, [*HEAD, 700]) == 11
    assert store.check(read_data=True) == []


def test_reader_of_the_old_file_reads_on(store: Store) -> None:
    leave_dead_rows(store)
    compacted = []

    def compact_meanwhile(runs: Any, checkpoint: Any, num_tokens: int) -> Any:
        compacted.append(store.gc().compacted)
        return restore(runs, checkpoint, num_tokens)

    found = store.fetch(identity(), LONG, compact_meanwhile)

    assert compacted == [1]
    assert found is not None
    assert found[0].equals(HEAD)


def test_look_up_that_finds_the_old_name_looks_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_dead_rows(store)
    open_read = fs.open_read
    begun: list[Path] = []
    compacted: list[int] = []

    def compact_first(path: Path) -> int:
        if not begun:
            begun.append(path)
            compacted.append(store.gc().compacted)
        return open_read(path)

    monkeypatch.setattr(fs, "open_read", compact_first)

    assert fetched(store, LONG) == len(HEAD)
    assert compacted == [1]
    assert not begun[0].exists()
    assert store.stats().counters.get("quarantined", 0) == 0


def test_disk_that_fails_meanwhile_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_dead_rows(store)
    files = blob_files(store.root)

    def fail(fd: int) -> None:
        raise OSError(5, "made up")

    with monkeypatch.context() as patch:
        patch.setattr(fs, "sync", fail)
        with pytest.raises(StoreError, match="Input/output error"):
            store.gc()

    assert blob_files(store.root) == files
    assert list((store.root / "tmp").iterdir()) == []
    assert fetched(store, LONG) == len(HEAD)
    assert store.check(read_data=True) == []
