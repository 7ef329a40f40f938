"""A disk that keeps unlinked blocks, as APFS snapshots do, does not empty the store."""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from persist_cache import fs
from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.errors import StoreFullError
from persist_cache.index.environment import Index
from persist_cache.index.transaction import Writer
from persist_cache.server.upstream.handler import health_said
from persist_cache.store import unreturned
from persist_cache.store.store import Store
from tests.cli import runner
from tests.fakes import Clock, fetched, fingerprint, put
from tests.live_fakes import FakeCodec

MIB = 1 << 20
FLOOR = 64 * MIB
ENTRIES = 100
MANY = 40 + 32 * (mmap.PAGESIZE - 4096) // 20_000
"""Entries that may go for one put: what it may add to the index goes by pages."""


class Disk:
    """A file system whose free space is made up here.

    Attributes:
        room: Bytes free when nothing was written yet.
        snapshot: What is unlinked stays taken.
    """

    def __init__(self, root: Path) -> None:
        self.room = 1 << 40
        self.snapshot = False
        self._root = root
        self._kept: dict[str, int] = {}

    def free_bytes(self, path: Path) -> int:
        there = {one.name: fs.disk_bytes(one) for one in self._root.rglob("*.safetensors")}
        self._kept = {**self._kept, **there} if self.snapshot else there
        return self.room - sum(self._kept.values())

    def leave(self, nbytes: int) -> None:
        """Have another program take all but `nbytes`."""
        self.room += nbytes - self.free_bytes(self._root)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(root)
    monkeypatch.setattr(fs, "free_bytes", made.free_bytes)
    monkeypatch.setattr(unreturned, "PATIENCE_S", 0.0)
    return made


START = 1_700_000_000.0


@pytest.fixture
def now() -> list[float]:
    return [START + ENTRIES]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with many entries, one a second, to be copied."""
    clock = Clock(START)
    with Store.open(
        tmp_path_factory.mktemp("filled") / "store", min_free_bytes=0, clock=clock
    ) as store:
        for number in range(ENTRIES):
            put(store, range(1000 * number, 1000 * number + 50))
            clock.advance(1)
    return store.root


@pytest.fixture
def full(filled: Path, root: Path, disk: Disk, now: list[float]) -> Iterator[Store]:
    """A store with many entries, on a disk on which no more may be written."""
    shutil.copytree(filled, root)
    with Store.open(root, min_free_bytes=FLOOR, clock=lambda: now[0]) as store:
        disk.leave(FLOOR)
        yield store


def count(store: Store) -> int:
    return len(list(store.entries()))


def refused(store: Store, first: int = 900_000) -> str:
    with pytest.raises(StoreFullError) as error:
        put(store, range(first, first + 50))
    return str(error.value)


def test_a_snapshot_costs_few_entries_and_the_refusal_says_it(full: Store, disk: Disk) -> None:
    disk.snapshot = True

    said = refused(full)

    assert count(full) >= ENTRIES - 15
    assert "snapshot" in said
    assert "gave nothing back" in said


def test_nothing_more_is_evicted_until_it_is_worth_a_trial(
    full: Store, disk: Disk, now: list[float]
) -> None:
    disk.snapshot = True
    refused(full)
    left = count(full)

    for number in range(20):
        assert "snapshot" in refused(full, 10_000_000 + 1000 * number)
    assert count(full) == left

    now[0] += unreturned.LONGEST_PAUSE_S + 1
    refused(full)
    assert left - 10 <= count(full) < left


def test_the_pauses_grow(full: Store, disk: Disk, now: list[float]) -> None:
    """A snapshot lasts for a day: trials must not empty the store one by one."""
    disk.snapshot = True
    start = now[0]

    while now[0] < start + 86_400:
        refused(full)
        now[0] += 1200

    assert count(full) >= ENTRIES // 4


def test_other_processes_do_not_try_it_either(
    full: Store, disk: Disk, root: Path, now: list[float]
) -> None:
    disk.snapshot = True
    refused(full)
    left = count(full)
    full.close()

    with Store.open(root, clock=lambda: now[0]) as again:
        assert "snapshot" in refused(again)
        assert count(again) == left


def test_a_pause_that_cannot_be_recorded_is_one_all_the_same(
    full: Store, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk without a free block: else each put would evict some more."""
    disk.snapshot = True
    update = Index.update

    def refuse(index: Index, change: Callable[[Writer], Any]) -> Any:
        if change.__qualname__.startswith("Unreturned.note."):
            raise StoreFullError("The disk is full.")
        return update(index, change)

    monkeypatch.setattr(Index, "update", refuse)
    refused(full)
    left = count(full)

    for number in range(5):
        assert "snapshot" in refused(full, 10_000_000 + 1000 * number)

    assert count(full) == left
    assert full.eviction_paused


def test_once_the_snapshot_is_gone_room_is_made_again(
    full: Store, disk: Disk, now: list[float]
) -> None:
    disk.snapshot = True
    refused(full)
    assert full.stats().eviction_paused
    disk.snapshot = False
    disk.leave(FLOOR)
    now[0] += unreturned.LONGEST_PAUSE_S + 1

    put(full, range(900_000, 900_050))

    assert fetched(full, list(range(900_000, 900_050))) == 50
    assert full.stats().eviction_paused == ""
    assert count(full) > ENTRIES - MANY


def test_room_that_others_free_is_used_at_once(full: Store, disk: Disk) -> None:
    disk.snapshot = True
    refused(full)
    disk.leave(FLOOR + 8 * MIB)

    put(full, range(900_000, 900_050))


def test_the_budget_is_still_kept_during_a_pause(full: Store, disk: Disk, root: Path) -> None:
    """What exceeds the budget goes whatever the disk says: `du` of the store does shrink."""
    disk.snapshot = True
    refused(full)
    disk.leave(1 << 34)
    full.close()
    with Store.open(root, max_bytes=2 * MIB, min_free_bytes=FLOOR) as small:
        small.evict_to(MIB)
        before = count(small)
        for number in range(60):
            put(small, range(10_000_000 + 1000 * number, 10_000_050 + 1000 * number))
        assert small.stats().usage.total <= 2 * MIB
        assert count(small) < before + 60


def test_without_a_snapshot_only_what_is_needed_goes(full: Store) -> None:
    put(full, range(900_000, 900_050))

    assert ENTRIES - MANY < count(full) <= ENTRIES


def test_a_disk_far_below_its_floor_is_relieved_when_that_helps(full: Store, disk: Disk) -> None:
    disk.leave(FLOOR - MIB)

    put(full, range(900_000, 900_050))

    assert disk.free_bytes(full.root) >= FLOOR
    assert fetched(full, list(range(900_000, 900_050))) == 50


def test_nothing_goes_where_all_that_may_go_would_be_too_little(full: Store, disk: Disk) -> None:
    disk.leave(FLOOR - 1024 * MIB)

    refused(full)

    assert count(full) == ENTRIES


def test_blocks_that_come_back_late_are_waited_for(
    full: Store, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XFS and btrfs, and the reaper of APFS, free blocks in the background."""
    monkeypatch.setattr(unreturned, "PATIENCE_S", 30.0)
    answers: list[int] = []
    honest = disk.free_bytes

    def late(path: Path) -> int:
        answers.append(honest(path))
        return min(answers[-4:])

    monkeypatch.setattr(fs, "free_bytes", late)

    put(full, range(900_000, 900_050))

    assert count(full) > ENTRIES - MANY
    assert full.stats().eviction_paused == ""


def test_everything_says_it(
    full: Store, disk: Disk, root: Path, now: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    import time

    now[0] = time.time()
    disk.snapshot = True
    refused(full)
    full.close()
    run = runner(root, capfd)

    stats = run("stats", "--json").json
    assert "snapshot" in stats["eviction_paused"]
    assert "snapshot" in run("stats").out
    findings = run("doctor", "--json").json["findings"]
    assert any("snapshot" in one["message"] for one in findings)


def test_health_says_it(full: Store, disk: Disk) -> None:
    disk.snapshot = True
    with PromptCache(store=full, identify=lambda model: fingerprint(), codec=FakeCodec()) as cache:
        assert "eviction" not in health_said(cache, healthy=True)
        refused(full)

        assert "snapshot" in health_said(cache, healthy=True)["eviction"]


@pytest.mark.parametrize("returns", [False, True])
def test_file_limits_are_no_reason_to_empty_the_store_either(
    full: Store, disk: Disk, monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    disk.leave(1 << 34)
    taken = [0]
    unlink: Callable[[Path], None] = fs.unlink

    def counting(path: Path) -> None:
        unlink(path)
        taken[0] += returns

    monkeypatch.setattr(fs, "unlink", counting)
    monkeypatch.setattr(fs, "free_files", lambda path: taken[0])

    def fail(fd: int, nbytes: int) -> None:
        if taken[0] < 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(fs, "allocate", fail)

    if returns:
        put(full, range(900_000, 900_050))
    else:
        assert "gave nothing back" in refused(full)
    assert count(full) >= ENTRIES - 15
