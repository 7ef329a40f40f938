"""The trie in the index: how edges are split, merged, walked and dropped."""

from __future__ import annotations

import pytest

from persist_cache.index import tree
from persist_cache.store.store import Store
from persist_cache.tokens import pack_tokens
from tests.fakes import fetched, put

STEM = [1, 2, 3, 4]


def shape(store: Store) -> list[tuple[int, int]]:
    """First row and rows of every edge."""
    with store.read() as txn:
        return sorted((edge.first_row, edge.rows) for _, edge in txn.edges())


def references(store: Store) -> list[int]:
    with store.read() as txn:
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
    with store.read() as txn:
        (root,) = [record.root for _, record in txn.namespaces()]
        whole = tree.walk(txn, root, pack_tokens(list(range(20))))
        part = tree.walk(txn, root, pack_tokens([*range(11), 99, 12]))
        none = tree.walk(txn, root, pack_tokens([99]))

    assert (whole.common, part.common, none.common) == (20, 11, 0)
    assert [step.used for step in part.steps] == [8, 3]
    assert (whole.node is None, part.node is None, none.node) == (False, True, root)


def test_notes_on_departed_entries_are_bounded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "_MAX_DEPARTED", 8)
    ids = [put(store, [n, n]) for n in range(20)]
    for entry in ids:
        store.evict([entry])

    with store.read() as txn:
        assert txn.size_of(b"departed") <= 8
        note = txn.departed(int(ids[-1], 16))
    assert note is not None
    assert note.note == "evicted by request"
