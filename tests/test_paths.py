"""The trie in the index keeps its invariants, and `audit` sees each one that is broken."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from persist_cache import paths
from persist_cache.entry import pack_tokens
from persist_cache.index import Writer
from persist_cache.store import Store
from tests.fakes import fetched, put

STEM = [1, 2, 3, 4]


def shape(store: Store) -> list[tuple[int, int]]:
    """First row and rows of every edge."""
    with store._disk.index.read() as txn:
        return sorted((edge.first_row, edge.rows) for _, edge in txn.edges())


def references(store: Store) -> list[int]:
    with store._disk.index.read() as txn:
        return sorted(record.references for _, record in txn.blobs())


def test_fork_splits_an_edge_without_touching_files(store: Store) -> None:
    put(store, [*STEM, 5, 6])
    put(store, [*STEM, 7])

    assert shape(store) == [(0, 1), (0, 4), (4, 2)]
    assert references(store) == [1, 2]


def test_fork_that_goes_is_merged_away(store: Store) -> None:
    put(store, [*STEM, 5, 6])
    fork = put(store, [*STEM, 7])
    store.evict([fork])

    assert shape(store) == [(0, 6)]
    assert references(store) == [1]


def test_entry_in_the_middle_that_goes_is_merged_away(store: Store) -> None:
    put(store, [*STEM, 5, 6])
    middle = put(store, STEM)
    assert shape(store) == [(0, 4), (4, 2)]

    store.evict([middle])

    assert shape(store) == [(0, 6)]
    assert fetched(store, [*STEM, 5, 6]) == 6


def test_edges_of_different_blobs_are_not_merged(store: Store) -> None:
    stem = put(store, STEM)
    put(store, [*STEM, 5])

    store.evict([stem])

    assert shape(store) == [(0, 1), (0, 4)]
    assert fetched(store, [*STEM, 5]) == 5


def test_evicting_the_last_user_removes_the_whole_path(store: Store) -> None:
    put(store, STEM)
    long = put(store, [*STEM, 5, 6, 7, 8, 9, 10, 11, 12, 13])
    store.evict([long])
    assert shape(store) == [(0, 4)]


def test_walk_stops_at_the_first_other_token(store: Store) -> None:
    put(store, list(range(20)))
    with store._disk.index.read() as txn:
        (root,) = [record.root for _, record in txn.namespaces()]
        whole = paths.walk(txn, root, pack_tokens(list(range(20))))
        part = paths.walk(txn, root, pack_tokens([*range(11), 99, 12]))
        none = paths.walk(txn, root, pack_tokens([99]))

    assert (whole.common, part.common, none.common) == (20, 11, 0)
    assert [step.used for step in part.steps] == [8, 3]
    assert (whole.node is None, part.node is None, none.node) == (False, True, root)


def first_edge(txn: Writer):  # type: ignore[no-untyped-def]
    return next(iter(txn.edges()))


def first_blob(txn: Writer):  # type: ignore[no-untyped-def]
    return next(iter(txn.blobs()))


def first_entry(txn: Writer):  # type: ignore[no-untyped-def]
    return next(iter(txn.entries()))


def wrong_references(txn: Writer) -> None:
    number, blob = first_blob(txn)
    txn.put_blob(number, blob._replace(references=9))


def too_many_rows(txn: Writer) -> None:
    key, edge = first_edge(txn)
    txn.put_edge(key, edge._replace(rows=edge.rows + 1))


def dead_rows_first(txn: Writer) -> None:
    key, edge = first_edge(txn)
    txn.put_edge(key, edge._replace(first_row=1, rows=edge.rows - 1))


def lost_entry(txn: Writer) -> None:
    txn.delete_entry(first_entry(txn)[0])


def bare_leaf(txn: Writer) -> None:
    for key, edge in list(txn.edges()):
        txn.put_edge(key, edge._replace(entry=0))


def lost_way_back(txn: Writer) -> None:
    key, edge = first_edge(txn)
    txn.delete_edge(key, edge.node)
    txn._txn.put(key, edge.pack(), db=txn._db[b"edges"])


def unreachable(txn: Writer) -> None:
    key, _ = first_edge(txn)
    txn._txn.delete(key, db=txn._db[b"edges"])


def lost_recency(txn: Writer) -> None:
    key = next(txn.recency_keys())
    txn._txn.delete(key, db=txn._db[b"recency"])


def lost_expiry(txn: Writer) -> None:
    key = next(txn.expiry_keys())
    txn._txn.delete(key, db=txn._db[b"expiry"])


def foreign_checkpoint(txn: Writer) -> None:
    number, record = first_entry(txn)
    txn.put_entry(number, record._replace(checkpoint=first_blob(txn)[0]))


def lost_name(txn: Writer) -> None:
    txn._txn.delete(first_blob(txn)[1].name, db=txn._db[b"names"])


def wrong_total(txn: Writer) -> None:
    txn.add(paths.BLOB_BYTES, 1)


@pytest.mark.parametrize(
    "damage",
    [
        wrong_references,
        too_many_rows,
        dead_rows_first,
        lost_entry,
        bare_leaf,
        lost_way_back,
        unreachable,
        lost_recency,
        lost_expiry,
        foreign_checkpoint,
        lost_name,
        wrong_total,
    ],
)
def test_audit_sees_damage_and_repair_mends_it(
    store: Store, damage: Callable[[Writer], None]
) -> None:
    prompts = [[*STEM, 5, 6], [*STEM, 7]]
    for prompt in prompts:
        put(store, prompt, expires=2e9)
    assert store.check() == []

    store._disk.index.update(damage)

    assert {problem.kind for problem in store.check()} == {"index"}
    store.check(repair=True)
    assert store.check(read_data=True) == []
    for prompt in prompts:
        assert fetched(store, prompt) == len(prompt)


def test_unmerged_edges_are_seen(store: Store) -> None:
    middle = put(store, STEM)
    put(store, [*STEM, 5, 6])
    store.evict([middle])
    long = put(store, [1, 2, 3])

    def forget(txn: Writer) -> None:
        record = txn.entry(int(long, 16))
        assert record is not None
        txn.delete_entry(int(long, 16))
        paths.set_entry(txn, record.node, 0)

    store._disk.index.update(forget)

    assert "merged" in store.check()[0].message


def test_notes_on_departed_entries_are_bounded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "_MAX_DEPARTED", 8)
    ids = [put(store, [n, n]) for n in range(20)]
    for entry in ids:
        store.evict([entry])

    with store._disk.index.read() as txn:
        assert txn.size_of(b"departed") <= 8
        note = txn.departed(int(ids[-1], 16))
    assert note is not None
    assert note.note == "evicted by request"
