"""Mayhem by hand: `check` names each damage, `repair` mends it, and then nothing is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from persist_cache.index.environment import Index
from persist_cache.index.transaction import Writer
from persist_cache.store.store import Store
from tests import forge
from tests.fakes import Clock, blob_files, fetched, put


def kinds(store: Store, *, read_data: bool = True) -> list[str]:
    return sorted(problem.kind for problem in store.check(read_data=read_data))


def test_mayhem_is_named_and_mended(store: Store) -> None:
    prompts = [[n, *range(20)] for n in range(100, 106)]
    for prompt in prompts:
        put(store, prompt, complete=prompt[0] % 2 == 0)
    moved, cut, flipped, deleted, *_ = blob_files(store.root)
    (store.root / "blobs" / "zz").mkdir()
    shutil.move(moved, store.root / "blobs" / "zz" / moved.name)
    cut.write_bytes(cut.read_bytes()[:-1])
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    deleted.unlink()
    foreign = store.root / "blobs" / "zz" / "notes.txt"
    foreign.write_text("mine")
    orphan = store.root / "blobs" / "zz" / ("0" * 32 + ".safetensors")
    orphan.write_bytes(b"who am I")

    assert kinds(store) == ["damaged", "damaged", "missing", "missing", "orphan", "orphan"]
    named = {problem.blob for problem in store.check(read_data=True)}
    assert named == {p.stem for p in (moved, cut, flipped, deleted, orphan)}

    assert len(store.check(read_data=True, repair=True)) == 6

    assert store.check(read_data=True) == []
    assert foreign.read_text() == "mine", "a foreign file is nobody's business"
    assert not orphan.exists()
    for prompt in prompts:
        put(store, prompt)
        assert fetched(store, prompt) == 21


def test_cheap_check_compares_sizes_only(store: Store) -> None:
    put(store, [1, 2, 3])
    path = blob_files(store.root)[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert kinds(store, read_data=False) == []
    assert kinds(store) == ["damaged"]


def test_damaged_entry_goes_when_its_turn_has_come_not_when_damage_was_seen(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one process waits for the index, another is still told that the entry is stored."""
    entry = put(store, [1, 2, 3])
    path = blob_files(store.root)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    update = Index.update

    def wait(index: Index, change: Callable[[Writer], Any]) -> Any:
        clock.advance(5)
        return update(index, change)

    monkeypatch.setattr(Index, "update", wait)
    put_at = clock() + 4

    assert fetched(store, [1, 2, 3]) == 0

    with store.read() as txn:
        departed = txn.departed(int(entry, 16))
    assert departed is not None
    assert departed.since > put_at


def test_check_reports_progress(store: Store) -> None:
    put(store, list(range(20)))
    seen: list[tuple[int, int]] = []

    store.check(read_data=True, progress=lambda done, total: seen.append((done, total)))

    assert len(seen) == 3
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize("which", range(5))
def test_one_bad_run_takes_along_just_what_hangs_on_it(store: Store, which: int) -> None:
    """Dropping a subtree removes and merges edges: none that was collected before may be used."""
    stem = list(range(8))
    put(store, stem, tier="system")
    put(store, [*stem, *range(20, 28)])
    put(store, [*stem, *range(20, 24), 50, 51])
    put(store, [*stem, *range(20, 22), 60])
    put(store, [*stem, 70])
    prompts = [
        stem,
        [*stem, *range(20, 28)],
        [*stem, *range(20, 24), 50, 51],
        [*stem, *range(20, 22), 60],
        [*stem, 70],
    ]
    path = sorted(blob_files(store.root), key=lambda path: path.stat().st_mtime_ns)[which]
    path.write_bytes(b"")

    store.check(repair=True)

    assert store.check(read_data=True) == []
    lost = [n for n, prompt in enumerate(prompts) if fetched(store, prompt) < len(prompt)]
    assert lost == [[0, 1, 2, 3, 4], [1, 2, 3], [2], [3], [4]][which]


def test_one_bad_state_leaves_the_rows_that_others_need(store: Store) -> None:
    put(store, list(range(6)), complete=False)
    put(store, list(range(9)), complete=False)
    state = min(
        (path for path in blob_files(store.root) if b'"checkpoint"' in path.read_bytes()),
        key=lambda path: path.stat().st_mtime_ns,
    )
    state.write_bytes(b"")

    assert fetched(store, list(range(6))) == 0
    assert fetched(store, list(range(9))) == 9
    assert store.check(read_data=True) == []


def test_contradictory_index_is_rebuilt_in_place(store: Store) -> None:
    kept = put(store, list(range(20)), label="mine", pinned=True, expires=2e9)

    def damage(txn: Writer) -> None:
        key, edge = next(iter(txn.edges()))
        txn.put_edge(key, edge._replace(blob=77))

    forge.change(store, damage)
    assert "index" in kinds(store)

    store.check(repair=True)

    assert store.check(read_data=True) == []
    assert fetched(store, list(range(20))) == 20
    entry = store.get(kept)
    assert (entry.label, entry.pinned, entry.expires) == ("mine", True, 2e9)


def test_quarantined_file_that_was_not_moved_is_moved_by_the_next_sweep(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, [1, 2, 3])
    path = blob_files(store.root)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with monkeypatch.context() as patch:
        patch.setattr("persist_cache.store.quarantine.move_aside", lambda *_: None)
        assert fetched(store, [1, 2, 3]) == 0
    assert path.exists()

    store.gc()

    assert store.check() == []
    assert not path.exists()


def test_gc_applies_expiry_and_forgets_empty_models(store: Store, clock: Clock) -> None:
    put(store, [1, 2, 3], expires=clock() + 5)
    put(store, [4, 5, 6], model="w1")
    clock.advance(40 * 86_400)

    assert store.gc().freed_bytes >= 0

    assert [entry.expires for entry in store.entries()] == [None]
    store.evict([store.entries()[0].id])
    store.gc()
    with store.read() as txn:
        assert txn.namespaces() == []
    assert store.check() == []
