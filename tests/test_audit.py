"""`audit` sees each invariant of the index that is broken, says which, and repair mends it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from persist_cache.index import tree
from persist_cache.index.records import BlobKind, pack_number
from persist_cache.index.transaction import Writer
from persist_cache.store.store import Store
from tests import forge
from tests.fakes import fetched, put

STEM = [1, 2, 3, 4]
PROMPTS = [[*STEM, 5, 6], [*STEM, 7]]


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
    txn.put_edge(key, edge._replace(rows=edge.rows + 99))


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
    forge.put(txn, b"edges", key, edge.pack())


def unreachable(txn: Writer) -> None:
    key, _ = first_edge(txn)
    forge.delete(txn, b"edges", key)


def lost_recency(txn: Writer) -> None:
    key = next(txn.recency_keys())
    forge.delete(txn, b"recency", key)


def lost_expiry(txn: Writer) -> None:
    key = min(txn.keys(b"expiry"))
    forge.delete(txn, b"expiry", key)


def foreign_checkpoint(txn: Writer) -> None:
    number, record = first_entry(txn)
    txn.put_entry(number, record._replace(checkpoint=first_blob(txn)[0]))


def lost_name(txn: Writer) -> None:
    forge.delete(txn, b"names", first_blob(txn)[1].name)


def wrong_total(txn: Writer) -> None:
    txn.add(tree.BLOB_BYTES, 1)


def no_rows(txn: Writer) -> None:
    key, edge = first_edge(txn)
    txn.put_edge(key, edge._replace(rows=0))


def unknown_blob(txn: Writer) -> None:
    key, edge = first_edge(txn)
    txn.put_edge(key, edge._replace(blob=99))


def elsewhere(txn: Writer) -> None:
    number, blob = first_blob(txn)
    txn.put_blob(number, blob._replace(start=1))


def wrong_token(txn: Writer) -> None:
    number, blob = first_blob(txn)
    txn.put_tokens(number, b"\7" * 8 * blob.num_tokens)


def two_ways_to_a_node(txn: Writer) -> None:
    key, edge = first_edge(txn)
    forge.put(txn, b"edges", key[:-1] + b"\1", edge.pack())


def above_the_root(txn: Writer) -> None:
    (root,) = [record.root for _, record in txn.namespaces()]
    key, edge = list(txn.edges())[-1]
    txn.put_edge(key, edge._replace(node=root))


def extra_way_back(txn: Writer) -> None:
    forge.put(txn, b"parents", pack_number(77), first_edge(txn)[0])


def wandering_entry(txn: Writer) -> None:
    number, record = first_entry(txn)
    txn.put_entry(number, record._replace(node=record.node + 77))


def wrong_length(txn: Writer) -> None:
    number, record = first_entry(txn)
    txn.put_entry(number, record._replace(num_tokens=record.num_tokens + 1))


def entry_at_two_nodes(txn: Writer) -> None:
    (one, _), (key, edge) = [item for item in txn.edges() if item[1].entry][:2]
    first = txn.edge(one)
    assert first is not None
    txn.put_edge(key, edge._replace(entry=first.entry))


def wrong_turn(txn: Writer) -> None:
    """The order of eviction lists as many entries as there are, one with another last use."""
    key = next(txn.recency_keys())
    forge.delete(txn, b"recency", key)
    forge.put(txn, b"recency", key[:1] + b"\1" + key[2:], b"")


def extra_name(txn: Writer) -> None:
    forge.put(txn, b"names", b"\1" * 16, pack_number(1))


def checkpoint_elsewhere(txn: Writer) -> None:
    number, blob = first_blob(txn)
    entry, record = first_entry(txn)
    changed = blob._replace(kind=BlobKind.CHECKPOINT, start=record.num_tokens + 1)
    txn.put_blob(number, changed)
    txn.put_entry(entry, record._replace(checkpoint=number))


def damaged_key_of_tokens(txn: Writer) -> None:
    forge.put(txn, b"tokens", b"\0" * 9, b"\1" * 8)


def unknown_namespace(txn: Writer) -> None:
    number, record = first_entry(txn)
    txn.put_entry(number, record._replace(namespace=99))


def no_date(txn: Writer) -> None:
    number, record = first_entry(txn)
    raw = record._replace(expires=math.nan).pack()
    forge.put(txn, b"entries", pack_number(number), raw)


def date_after_all_time(txn: Writer) -> None:
    number, record = first_entry(txn)
    txn.put_entry(number, record._replace(expires=math.inf))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (wrong_references, "counts 9 references instead of"),
        (too_many_rows, "uses rows that blob"),
        (no_rows, "uses rows that blob"),
        (dead_rows_first, "has dead rows before living ones"),
        (unknown_blob, "hangs on blob 99, which is unknown"),
        (elsewhere, "begins elsewhere than its rows"),
        (wrong_token, "is filed under another token"),
        (two_ways_to_a_node, "is reached twice"),
        (above_the_root, "is reached twice"),
        (lost_entry, "which has no record"),
        (bare_leaf, "is a leaf without entry"),
        (lost_way_back, "does not know its way back"),
        (extra_way_back, "edges but 4 ways back"),
        (unreachable, "edges cannot be reached from a root"),
        (wandering_entry, "is not where it says it is"),
        (wrong_length, "has another length than its path"),
        (entry_at_two_nodes, "ends at 2 nodes"),
        (lost_recency, "the order of eviction does not list exactly the entries"),
        (wrong_turn, "the order of eviction does not list exactly the entries"),
        (lost_expiry, "the order of expiry does not list exactly the entries that expire"),
        (foreign_checkpoint, "names a checkpoint that is not its own"),
        (checkpoint_elsewhere, "names a checkpoint that is not its own"),
        (lost_name, "cannot be found by its name"),
        (extra_name, "blobs but 3 names"),
        (wrong_total, "the counter says"),
        (damaged_key_of_tokens, "holds a damaged record (it has 9 bytes instead of 8)"),
        (unknown_namespace, "names namespace 99, below whose root it does not lie"),
        (no_date, "the order of expiry does not list exactly the entries that expire"),
        (date_after_all_time, "the order of expiry does not list exactly the entries that expire"),
    ],
)
def test_damage_is_named_and_mended(
    store: Store, damage: Callable[[Writer], None], says: str
) -> None:
    for prompt in PROMPTS:
        put(store, prompt, expires=2e9)
    assert store.check() == []

    forge.change(store, damage)

    found = store.check()
    assert {problem.kind for problem in found} == {"index"}
    assert any(says in problem.message for problem in found), found
    store.check(repair=True)
    assert store.check(read_data=True) == []
    for prompt in PROMPTS:
        assert fetched(store, prompt) == len(prompt)


def test_entry_of_another_model_is_seen(store: Store) -> None:
    for prompt in PROMPTS:
        put(store, prompt)
    put(store, PROMPTS[0], model="w1")
    assert store.check() == []

    def confuse(txn: Writer) -> None:
        one, other = (record.number for _, record in txn.namespaces())
        number, record = first_entry(txn)
        changed = record._replace(namespace=one + other - record.namespace)
        txn.put_entry(number, changed)

    forge.change(store, confuse)

    (problem,) = store.check()
    assert "below whose root it does not lie" in problem.message
    store.check(repair=True)
    assert store.check() == []


def test_unmerged_edges_are_seen(store: Store) -> None:
    middle = put(store, STEM)
    put(store, [*STEM, 5, 6])
    store.evict([middle])
    long = put(store, [1, 2, 3])

    def forget(txn: Writer) -> None:
        record = txn.entry(int(long, 16))
        assert record is not None
        txn.delete_entry(int(long, 16))
        tree.set_entry(txn, record.node, 0)

    forge.change(store, forget)

    assert "merged" in store.check()[0].message
