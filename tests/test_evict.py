"""What goes to make room, in which order, and what never does."""

from __future__ import annotations

import contextlib
import mmap
import random
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from persist_cache import fs
from persist_cache.blobs.writer import BlobWriter
from persist_cache.entry import Tier
from persist_cache.errors import StoreFullError
from persist_cache.index.records import SizedRecord
from persist_cache.store.store import Store
from tests import forge
from tests.fakes import Clock, blob_files, disk_usage, fetched, files_in, fingerprint, put, restore

ROOM_FOR_FEW = 600_000 + 80 * (mmap.PAGESIZE - 4096)
"""For some entries, an index of some 48 pages, and the 32 that are kept for its growth."""


def evict_one(store: Store) -> set[str]:
    """Evict until one byte is freed; returns the ids that went."""
    before = {entry.id for entry in store.entries()}
    forge.evict(store, nbytes=1)
    return before - {entry.id for entry in store.entries()}


def order_of_eviction(store: Store) -> list[str]:
    order: list[str] = []
    while gone := evict_one(store):
        order += sorted(gone)
    return order


def order_now(store: Store) -> list[str]:
    """In which order all would go, by this time."""
    return store.victims_until(0, [entry.id for entry in store.entries()])


def test_order_is_tier_then_last_use(store: Store, clock: Clock) -> None:
    ids: dict[tuple[str, int], str] = {}
    for tier in ("system", "assistant", "user"):
        for age in (2, 1):
            clock.advance(1)
            ids[tier, age] = put(store, [len(ids) + 1] * 3, tier=tier)

    assert order_of_eviction(store) == [
        ids[tier, age] for tier in ("assistant", "user", "system") for age in (2, 1)
    ]


def test_what_is_to_be_kept_goes_after_others_of_its_tier_while_that_time_runs(
    store: Store, clock: Clock
) -> None:
    hour = put(store, [1] * 3, tier="user", keep_s={Tier.USER: 3600})
    minutes = put(store, [2] * 3, tier="user", keep_s={Tier.USER: 300})
    clock.advance(60)
    plain = put(store, [3] * 3, tier="user")
    system = put(store, [4] * 3, tier="system")
    reply = put(store, [5] * 3)

    assert order_now(store) == [reply, plain, minutes, hour, system]
    clock.advance(600)
    assert order_now(store) == [reply, minutes, plain, hour, system]
    clock.advance(3600)
    assert order_now(store) == [reply, hour, minutes, plain, system]


def test_use_begins_the_time_anew_and_a_shorter_one_does_not_end_it(
    store: Store, clock: Clock
) -> None:
    kept = put(store, [1] * 3, tier="user", keep_s={Tier.USER: 3600})
    put(store, [1] * 3, tier="user", keep_s={Tier.USER: 300})
    clock.advance(3000)
    store.touch(store.match(fingerprint(), [1] * 3))
    store.flush()
    clock.advance(3000)
    plain = put(store, [2] * 3, tier="user")

    assert store.get(kept).keep_s == 3600
    assert {one.id: one.keep_s for one in store.entries()} == {kept: 3600, plain: 0}
    assert order_now(store) == [plain, kept]


def test_system_part_is_kept_for_what_a_later_prompt_asks(store: Store) -> None:
    head = put(store, [1] * 3, tier="system")
    put(store, [1] * 3 + [2] * 3, tier="user", keep_s={Tier.SYSTEM: 3600, Tier.USER: 300})

    assert sorted(one.keep_s for one in store.entries()) == [300, 3600]
    assert store.get(head).keep_s == 3600


def test_room_is_made_of_what_is_to_be_kept_if_there_is_nothing_else(
    tmp_path: Path, clock: Clock
) -> None:
    with Store.open(
        tmp_path / "kept", max_bytes=ROOM_FOR_FEW, min_free_bytes=0, clock=clock
    ) as store:
        for number in range(40):
            put(store, [number] * 300, tier="user", keep_s={Tier.USER: 3600})
            assert disk_usage(store.root) <= ROOM_FOR_FEW

        assert 0 < len(store.entries()) < 40


def test_store_of_a_version_that_knows_no_such_time_is_read_and_cleaned(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        kept = put(store, [1] * 3, tier="user", keep_s={Tier.USER: 300})
        forge.change(store, lambda txn: forge.put(txn, b"kept", b"x" * 8, b"nonsense"))
        assert store.check() == []
        store.gc()
        left = forge.change(store, lambda txn: forge.records(txn, b"kept"))
        assert [key.hex() for key, _ in left] == [kept]
        assert store.get(kept).keep_s == 300
        forge.change(store, lambda txn: forge.drop(txn, b"kept"))

    with Store.open(tmp_path / "store", read_only=True) as store:
        assert store.get(kept).keep_s == 0
        assert [one.keep_s for one in store.entries()] == [0]
        assert store.check() == []
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put(store, [1] * 3, tier="user", keep_s={Tier.USER: 300})
        assert store.get(kept).keep_s == 300


def test_expired_go_first_whatever_their_tier(store: Store, clock: Clock) -> None:
    put(store, [1, 1])
    old = put(store, [2, 2], tier="system", expires=clock() + 10)
    clock.advance(11)

    assert evict_one(store) == {old}


def test_nothing_goes_for_what_a_dead_writer_reserved(tmp_path: Path, clock: Clock) -> None:
    with Store.open(
        tmp_path / "s", max_bytes=ROOM_FOR_FEW, min_free_bytes=0, run_tokens=8, clock=clock
    ) as small:
        kept = put(small, [1, 2, 3])
        name = bytes(range(16))
        left_behind = forge.folder(small).temporary_path(name.hex())
        left_behind.write_bytes(b"half a blob")
        reserved = SizedRecord(ROOM_FOR_FEW, clock())
        forge.change(small, lambda txn: txn.put_sized(b"pending", name, reserved))

        put(small, [4, 5, 6])

        assert kept in {entry.id for entry in small.entries()}
        assert small.stats().usage.pending == 0
        assert not left_behind.exists()


def test_what_a_living_writer_reserved_is_not_given_away(tmp_path: Path, clock: Clock) -> None:
    with Store.open(
        tmp_path / "s", max_bytes=ROOM_FOR_FEW, min_free_bytes=0, run_tokens=8, clock=clock
    ) as small:
        folder = forge.folder(small)
        with BlobWriter(folder) as writer:
            name = bytes.fromhex(writer.name)
            reserved = SizedRecord(ROOM_FOR_FEW, clock())
            forge.change(small, lambda txn: txn.put_sized(b"pending", name, reserved))

            with pytest.raises(StoreFullError):
                put(small, [4, 5, 6])

            assert small.stats().usage.pending == ROOM_FOR_FEW
            assert folder.temporary_path(writer.name).exists()


def test_leaves_go_before_their_parents(store: Store, clock: Clock) -> None:
    chain = [put(store, list(range(end))) for end in (3, 6, 9)]

    assert order_of_eviction(store) == chain[::-1]


def test_parent_follows_its_last_leaf_before_anything_younger(store: Store, clock: Clock) -> None:
    parent = put(store, [1, 2, 3])
    clock.advance(1)
    leaf = put(store, [1, 2, 3, 4])
    clock.advance(1)
    younger = put(store, [9, 9])

    assert order_of_eviction(store) == [leaf, parent, younger]


def test_a_reply_under_replies_goes_before_any_system_prompt(store: Store, clock: Clock) -> None:
    """A conversation is a chain: its last leaf does not open the way to higher tiers."""
    system = put(store, [9, 9], tier="system")
    clock.advance(1)
    replies = [put(store, list(range(end))) for end in (3, 6, 9)]

    assert order_of_eviction(store) == [*replies[::-1], system]


def test_state_goes_before_entries_below_that_do_without(store: Store, clock: Clock) -> None:
    upper = put(store, list(range(5)), complete=False)
    clock.advance(1)
    put(store, list(range(9)), complete=False)

    assert evict_one(store) == {upper}
    assert fetched(store, list(range(9))) == 9


def test_pinned_entries_never_go(store: Store, clock: Clock) -> None:
    pinned = put(store, [1, 1], pinned=True, expires=clock() + 1)
    put(store, [2, 2])
    clock.advance(100)

    store.evict_to(0)
    store.gc()

    assert [entry.id for entry in store.entries()] == [pinned]


def test_pin_survives_reopening(tmp_path: Path) -> None:
    """LMCache #562, Mooncake #1196, LlamaFarm: the index, and with it the pins, lost at restart."""
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        entry = put(store, [1, 1])
        store.pin(entry)
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        store.evict_to(0)
        assert store.get(entry).pinned
        store.pin(entry, False)
        store.evict_to(0)
        assert store.entries() == []


def test_last_use_survives_reopening(tmp_path: Path, clock: Clock) -> None:
    """oMLX: last use forgotten over a restart, the hottest prompt evicted first."""
    with Store.open(tmp_path / "store", min_free_bytes=0, clock=clock) as store:
        used = put(store, [1, 1])
        clock.advance(1)
        idle = put(store, [2, 2])
        clock.advance(1)
        store.touch(store.match(fingerprint(), [1, 1]))
    with Store.open(tmp_path / "store", min_free_bytes=0, clock=clock) as store:
        assert evict_one(store) == {idle}
        assert store.get(used)


def test_entry_that_is_being_read_stays(store: Store) -> None:
    put(store, [1, 2, 3, 4])
    put(store, [1, 2, 8, 9])
    left = []

    def evict_meanwhile(runs, checkpoint, num_tokens):  # type: ignore[no-untyped-def]
        store.evict_to(0)
        left.append(len(store.entries()))
        return restore(runs, checkpoint, num_tokens)

    # At the fork no entry ends: one of those below has to hold the rows.
    found = store.fetch(fingerprint(), [1, 2, 7], evict_meanwhile)

    assert found is not None
    assert left == [1]


def fill(store: Store, first_token: int = 100) -> list[str]:
    """Put small entries until one of them had to go."""
    ids: list[str] = []
    while True:
        ids.append(put(store, [first_token + len(ids)] * 4))
        if len(store.entries()) < len(ids):
            return ids
        assert len(ids) < 200, "nothing was ever evicted"


@pytest.fixture
def small(tmp_path: Path, clock: Clock) -> Store:
    return Store.open(
        tmp_path / "small", max_bytes=ROOM_FOR_FEW, min_free_bytes=0, run_tokens=8, clock=clock
    )


def test_full_store_makes_room(small: Store, clock: Clock) -> None:
    ids = fill(small)

    assert ids[-1] in {entry.id for entry in small.entries()}
    assert disk_usage(small.root) <= ROOM_FOR_FEW
    counters = small.stats().counters
    assert counters["evicted"] == counters["evicted:assistant"] >= 1
    small.close()


def test_prefix_that_is_extended_is_not_evicted_for_it(small: Store, clock: Clock) -> None:
    stem = put(small, [1, 2, 3, 4])
    clock.advance(1)
    fill(small)
    assert stem not in {entry.id for entry in small.entries()}, "it is the oldest"
    stem = put(small, [1, 2, 3, 4])
    forge.change(
        small,
        lambda txn: txn.put_entry(
            int(stem, 16),
            txn.entry(int(stem, 16))._replace(last_use_us=1),  # type: ignore[union-attr]
        ),
    )

    longer = put(small, [1, 2, 3, 4, 5, 6])

    assert {stem, longer} <= {entry.id for entry in small.entries()}
    small.close()


def test_carrier_of_a_prefix_without_entry_is_not_evicted_for_it(
    small: Store, clock: Clock
) -> None:
    put(small, [1, 2, 3, 4])
    put(small, [1, 2, 7, 7])
    clock.advance(1)
    for n in range(100):
        before = len(small.entries())
        result = small.put(fingerprint(), [1, 2, 500 + n], source := source_of([1, 2, 500 + n]))
        assert source.written in ([], [(2, 3)]), "the shared rows are never written again"
        assert result.new_tokens == 1
        if len(small.entries()) <= before:
            break
    assert small.check(read_data=True) == []
    small.close()


def source_of(tokens: list[int]):  # type: ignore[no-untyped-def]
    from persist_cache.codec import Payload
    from tests.fakes import FakeSource

    class Watched(FakeSource):
        def __init__(self) -> None:
            super().__init__(tokens)
            self.written: list[tuple[int, int]] = []

        def rows(self, start: int, end: int) -> Payload:
            self.written.append((start, end))
            return super().rows(start, end)

    return Watched()


def test_entry_larger_than_the_budget_evicts_nothing(small: Store) -> None:
    put(small, [1, 2, 3])

    with pytest.raises(StoreFullError, match="larger than the budget") as refused:
        put(small, list(range(20_000)))

    entry, budget, fixed = map(int, re.findall(r"\d+", str(refused.value)))
    assert budget == small.limits.max_bytes
    assert entry + fixed > budget

    assert len(small.entries()) == 1
    assert list((small.root / "tmp").iterdir()) == []
    small.close()


def test_full_of_pinned_entries_refuses_and_evicts_nothing(small: Store) -> None:
    for n in range(100):
        with contextlib.suppress(StoreFullError):
            put(small, [100 + n] * 4, pinned=True)
    ids = {entry.id for entry in small.entries()}
    with pytest.raises(StoreFullError, match="pinned"):
        put(small, [1, 2, 3])

    assert {entry.id for entry in small.entries()} == ids
    assert small.check() == []
    small.close()


def test_undeletable_file_does_not_wedge_eviction(
    small: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang #31485: one file that cannot be deleted wedges eviction."""
    put(small, [1] * 4)
    stuck = blob_files(small.root)[0]
    unlink = fs.unlink

    def refuse(path: Path) -> None:
        if path == stuck:
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path)

    monkeypatch.setattr(fs, "unlink", refuse)
    small.evict([small.entries()[0].id])
    assert small.stats().usage.trash == stuck.stat().st_blocks * 512
    assert [problem.kind for problem in small.check()] == ["trash"]

    fill(small)
    assert disk_usage(small.root) <= ROOM_FOR_FEW

    monkeypatch.undo()
    small.gc()
    assert not stuck.exists()
    assert small.check() == []
    small.close()


def test_folder_that_lets_nothing_go_does_not_cost_all_entries(
    small: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(small)
    before = len(small.entries())

    def refuse(path: Path) -> None:
        if "blobs" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        path.unlink()

    monkeypatch.setattr(fs, "unlink", refuse)
    prompts = iter([[1, 2, 3, number] for number in range(before)])
    with pytest.raises(StoreFullError, match="cannot be removed"):
        any(not put(small, prompt) for prompt in prompts)

    assert before - len(small.entries()) <= 8
    small.close()


@pytest.mark.parametrize(
    ("entries", "new_tokens", "beside"),
    [
        (12, 96, "nobody"),
        (12, 96, "a reader"),
        pytest.param(250, 40_000, "a reader", marks=pytest.mark.long),
        pytest.param(250, 40_000, "nobody", marks=pytest.mark.long),
        (80, 15_000, "a reader"),
    ],
)
def test_put_that_no_eviction_makes_room_for_evicts_nothing(
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    entries: int,
    new_tokens: int,
    beside: str,
) -> None:
    """The commit of the evictions takes room itself, most of all beside a reader."""
    monkeypatch.setattr(fs, "sync", lambda fd: None)
    options: dict[str, Any] = {"min_free_bytes": 0, "clock": clock, "max_bytes": 1 << 30}
    with Store.open(tmp_path / "full", **options) as full:
        for number in range(entries):
            put(full, [number] * 4, complete=False)
        usage = full.stats().usage
    # The smaller budgets have a smaller ballast.
    usage = msgspec.structs.replace(usage, ballast=0)
    too_little, enough = usage.total - usage.blobs, usage.total + (32 << 20)
    while enough - too_little > 8192:
        root = tmp_path / str(enough)
        shutil.copytree(tmp_path / "full", root)
        options["max_bytes"] = (too_little + enough) // 2
        with Store.open(root, **options) as tight, contextlib.ExitStack() as stack:
            before = tight.entries()
            if beside == "a reader":
                stack.enter_context(tight.read())
            try:
                put(tight, [-1] * new_tokens, complete=False)
                enough = options["max_bytes"]
            except StoreFullError:
                too_little = options["max_bytes"]
                stack.close()
                assert tight.entries() == before
        shutil.rmtree(root)
    assert usage.total - usage.blobs < too_little < enough < usage.total + (32 << 20)


def test_quarantine_counts_and_goes_before_anything_useful(small: Store) -> None:
    put(small, [1] * 4)
    path = blob_files(small.root)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert fetched(small, [1] * 4) == 0
    waste = small.stats().usage.quarantine
    assert waste == (small.root / "quarantine" / path.name).stat().st_blocks * 512 > 0
    ids = {put(small, [2] * 4), put(small, [3] * 4)}

    small.evict_to(small.stats().usage.total - 1)

    assert small.stats().usage.quarantine == 0
    assert {entry.id for entry in small.entries()} == ids
    assert not (small.root / "quarantine" / path.name).exists()
    small.close()


def test_daily_write_budget(tmp_path: Path, clock: Clock) -> None:
    with Store.open(
        tmp_path / "store", min_free_bytes=0, daily_write_bytes=150_000, clock=clock
    ) as store:
        for n in range(3):
            put(store, [n] * 3)
        with pytest.raises(StoreFullError, match="write budget"):
            put(store, list(range(2000)))
        assert 0 < store.stats().written_today <= 150_000
        clock.advance(86_400)
        put(store, [99, 99])
        assert store.stats().written_today < 60_000


def test_free_space_floor(
    store: Store, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(tmp_path / "other", min_free_bytes=10_000_000, clock=clock) as other:
        put(other, [1, 2, 3])
        used = disk_usage(other.root)
        monkeypatch.setattr(
            fs, "free_bytes", lambda path: 10_100_000 + used - disk_usage(other.root)
        )
        before = len(other.entries())
        with pytest.raises(StoreFullError):
            put(other, list(range(5000)))
        assert len(other.entries()) == before, "what there is would not have been enough"


@pytest.mark.on_disk
def test_du_never_exceeds_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled before and after every change of the disk, over hundreds of puts.

    LMCache #4725, vLLM #52784, oMLX #2115: a cap that is declared, not enforced.
    """
    dice = random.Random(1)
    worst = 0
    root = tmp_path / "store"

    def sampled(name: str):  # type: ignore[no-untyped-def]
        original = getattr(fs, name)

        def call(*arguments: object) -> object:
            nonlocal worst
            value = original(*arguments)
            worst = max(worst, disk_usage(root))
            return value

        return call

    for name in ("write_all", "unlink", "unlock"):
        monkeypatch.setattr(fs, name, sampled(name))
    limit = 1_600_000 + 68 * (mmap.PAGESIZE - 4096)  # the index grows by pages
    with Store.open(root, max_bytes=limit, min_free_bytes=0, run_tokens=500) as store:
        for n in range(120):
            tokens = [n % 7, *dice.choices(range(50_000), k=dice.randrange(1, 700))]
            put(store, tokens, complete=n % 3 > 0)
        assert store.stats().counters["evicted"] > 20
        assert store.check() == []

    assert limit * 3 // 4 <= worst <= limit


def test_leftovers_of_crashes_are_counted_and_removed(tmp_path: Path) -> None:
    """LMCache #1454: leftovers not counted, one more cap per restart."""
    name = "ab" * 16 + ".safetensors"
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put(store, [1, 2, 3])
        root = store.root
    for folder in ("tmp", "quarantine"):
        (root / folder / name).write_bytes(b"x" * 100_000)

    with Store.open(root, min_free_bytes=0) as store:
        assert store.stats().usage.total == disk_usage(root)
        assert [p for p in files_in(root) if p.name == name] == []


def test_negative_limits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        Store.open(tmp_path / "store", max_bytes=-1)


def test_limits_are_remembered(tmp_path: Path) -> None:
    Store.open(tmp_path / "store", max_bytes=5_000_000, min_free_bytes=0).close()

    with Store.open(tmp_path / "store") as store:
        assert (store.limits.max_bytes, store.limits.min_free_bytes) == (5_000_000, 0)
