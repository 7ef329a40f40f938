"""Where the index and a sound blob contradict each other, what is at fault goes, and that alone."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache
from msgspec.structs import replace

from persist_cache import tensors
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.index.audit import was_given
from persist_cache.index.records import BlobKind
from persist_cache.index.transaction import Writer
from persist_cache.store.store import Store
from persist_cache.tensors.layers import leaves
from tests import forge
from tests.fakes import blob_files, fetched, put
from tests.tiny_caches import Layer, feed, new_cache

FIRST = list(range(100, 130))
SECOND = [*FIRST[:11], *range(300, 309)]
STATE = [*range(50, 62)]


@pytest.mark.parametrize("lag", [1, 2, 5, 16])
def test_a_match_shorter_than_a_lag_is_served_and_costs_no_blob(store: Store, lag: int) -> None:
    """The layers that are behind have no row yet, as in a live cache that was trimmed so far."""
    specs = (Layer(KVCache), (Layer(KVCache, lag=lag), Layer(KVCache)))
    cache = new_cache(specs)
    feed(cache, specs, 30, seed=1)
    model = Fingerprint.from_fields({"weights": "w"})
    length = tensors.prepare(cache, 30)
    store.put(model, FIRST, tensors.source(cache, length))

    for used in range(1, lag + 3):
        found = store.fetch(model, [*FIRST[:used], 9999], tensors.restore)
        assert found is not None, used
        restored, match = found
        assert match.num_tokens == used
        for (_, layer), (_, live) in zip(leaves(restored), leaves(cache), strict=True):
            rows = max(used - (30 - live.offset), 0)
            assert layer.offset == rows
            for mine, theirs in ((layer.keys, live.keys), (layer.values, live.values)):
                assert mx.array_equal(mine[..., :rows, :], theirs[..., :rows, :])
    assert store.stats().counters.get("quarantined", 0) == 0
    assert store.check(read_data=True) == []


# ---- an index that is wrong --------------------------------------------------------------------

Damage = Callable[[Writer], None]


def last_run(txn: Writer) -> int:
    """The run with the end of `FIRST`."""
    return max(
        (record.start, number)
        for number, record in txn.blobs()
        if record.kind == BlobKind.RUN
        and txn.tokens(number, record.num_tokens - 1, 1) == struct.pack("<q", FIRST[-1])
    )[1]


def wrong_token(txn: Writer, row: int) -> None:
    number = last_run(txn)
    tokens = bytearray(txn.tokens(number, 0, 1 << 30))
    tokens[row * 8] ^= 0x40
    txn.put_tokens(number, bytes(tokens))


def wrong_first_token(txn: Writer) -> None:
    """Of the run and of its edge, so that the index agrees with itself."""
    number = last_run(txn)
    tokens = bytearray(txn.tokens(number, 0, 1 << 30))
    tokens[0] ^= 0x40
    txn.put_tokens(number, bytes(tokens))
    for key, edge in list(txn.edges()):
        if edge.blob == number and edge.first_row == 0:
            txn.delete_edge(key, None)
            txn.put_edge(key[:8] + bytes(tokens[:8]), edge)


def wrong_middle_token(txn: Writer) -> None:
    wrong_token(txn, 1)


def wrong_digest(txn: Writer) -> None:
    number = last_run(txn)
    record = txn.blob(number)
    assert record is not None
    txn.put_blob(number, record._replace(digest=bytes(16)))


def wrong_length(txn: Writer) -> None:
    number = last_run(txn)
    record = txn.blob(number)
    assert record is not None
    txn.put_blob(number, record._replace(nbytes=record.nbytes - 1))


def wrong_complete(txn: Writer) -> None:
    for key, edge in list(txn.edges()):
        if edge.blob == last_run(txn):
            txn.put_edge(key, edge._replace(complete=not edge.complete))


def too_complete(txn: Writer) -> None:
    """A run without the rows of one layer is said to have them."""
    for key, edge in list(txn.edges()):
        txn.put_edge(key, edge._replace(complete=True))


def wrong_layout(txn: Writer) -> None:
    for key, record in txn.namespaces():
        txn.put_namespace(key, replace(record, layout='{"fake":2}'))


def small_generator(name: str) -> Damage:
    def damage(txn: Writer) -> None:
        txn.add(name, -1)

    damage.__name__ = name
    return damage


def wrong_number(txn: Writer) -> None:
    for key, edge in list(txn.edges()):
        record = txn.entry(edge.entry) if edge.entry else None
        if record is not None and record.num_tokens == len(FIRST):
            txn.delete_entry(edge.entry)
            txn.put_entry(edge.entry ^ 0x10, record)
            txn.put_edge(key, edge._replace(entry=edge.entry ^ 0x10))


def lost_state(txn: Writer) -> None:
    """An entry is said to need no state, and nothing knows the file with it."""
    for number, entry in list(txn.entries()):
        if entry.checkpoint:
            forge.unrefer(txn, entry.checkpoint)
            txn.put_entry(number, entry._replace(checkpoint=0))
    for name in txn.keys(b"trash"):
        txn.delete_sized(b"trash", name)


@pytest.fixture
def ids(store: Store) -> dict[str, str]:
    """Marked entries, of which one ends in the middle of a run."""
    return {
        "middle": put(store, FIRST[:11], tier="system", label="house", pinned=True),
        "first": put(store, FIRST, tier="user", label="first"),
        "second": put(store, SECOND, label="second"),
        "state": put(store, STATE, complete=False, label="state"),
    }


def marks(store: Store) -> dict[str, tuple[str, bool, str]]:
    return {one.id: (one.label, one.pinned, one.tier.label) for one in store.entries()}


def all_there(store: Store) -> None:
    for tokens in (FIRST, FIRST[:11], SECOND, STATE):
        assert fetched(store, tokens) == len(tokens)
    assert store.stats().counters.get("quarantined", 0) == 0
    assert not list((store.root / "quarantine").iterdir())


READ_DATA = [wrong_middle_token, wrong_first_token, wrong_digest, wrong_complete, too_complete]
AT_ONCE = [
    wrong_middle_token,
    wrong_first_token,
    wrong_length,
    wrong_layout,
    wrong_number,
    lost_state,
    small_generator("next_node"),
    small_generator("next_blob"),
    small_generator("next_namespace"),
]


@pytest.mark.parametrize(
    ("damage", "read_data"),
    [*((one, True) for one in READ_DATA), *((one, False) for one in AT_ONCE)],
)
def test_what_the_index_has_wrong_is_found_and_mended(
    store: Store, ids: dict[str, str], damage: Damage, read_data: bool
) -> None:
    before = marks(store)
    forge.change(store, damage)

    found = store.check(read_data=read_data)
    assert found
    assert {problem.kind for problem in found} - {"orphan"} <= {"index", "damaged"}
    assert found[0].kind != "orphan"
    store.check(read_data=read_data, repair=True)

    assert store.check(read_data=True) == []
    all_there(store)
    assert marks(store) == before


@pytest.mark.parametrize("damage", [wrong_middle_token, wrong_digest, wrong_length])
def test_a_sound_blob_is_not_given_up_for_a_wrong_index(
    store: Store, ids: dict[str, str], damage: Damage
) -> None:
    before, files = marks(store), blob_files(store.root)
    forge.change(store, damage)

    # A request for what the index says, and for what is there.
    changed = [*FIRST[:-2], FIRST[-2] ^ 0x40, FIRST[-1]]
    for tokens in (changed, FIRST, SECOND, STATE):
        fetched(store, tokens)

    all_there(store)
    assert blob_files(store.root) == files
    assert marks(store) == before
    assert store.check(read_data=True) == []


def test_a_run_said_to_be_complete_is_not_given_up(store: Store) -> None:
    specs = (Layer(KVCache), Layer(lambda: RotatingKVCache(16)))
    cache = new_cache(specs)
    feed(cache, specs, 40, seed=1)
    model, tokens = Fingerprint.from_fields({"weights": "w"}), list(range(40))
    store.put(model, tokens, tensors.source(cache, tensors.prepare(cache, 40)))
    forge.change(store, too_complete)

    found = store.fetch(model, [*tokens, 1], tensors.restore)

    assert found is not None
    assert found[1].num_tokens == 40
    assert store.stats().counters.get("quarantined", 0) == 0
    assert store.fetch(model, tokens[:30], tensors.restore) is None
    store.check(read_data=True, repair=True)
    assert store.check(read_data=True) == []


def test_another_file_in_the_place_of_a_blob_is_at_fault(store: Store) -> None:
    put(store, FIRST[:8])
    put(store, SECOND[11:19])
    one, other = blob_files(store.root)
    content = one.read_bytes(), other.read_bytes()
    one.write_bytes(content[1])
    other.write_bytes(content[0])

    assert {problem.kind for problem in store.check(read_data=True)} == {"damaged"}
    assert fetched(store, FIRST[:8]) == fetched(store, SECOND[11:19]) == 0
    assert store.stats().counters["quarantined"] == 2
    assert store.check(read_data=True) == []


@pytest.mark.parametrize(
    ("number", "known", "right"),
    [
        (7, {7}, True),
        (8, {8}, False),
        (8, {7, 8}, True),
        (9, {7, 9}, False),
        (9, {7, 8, 9}, True),
        (6, {6, 7}, False),
    ],
)
def test_a_number_that_was_taken_gives_the_next_free_one(
    number: int, known: set[int], right: bool
) -> None:
    assert was_given(number, 7, known) == right


def test_numbers_begin_again_behind_the_last() -> None:
    last = (1 << 64) - 1

    assert was_given(1, last, {last, 1})
    assert not was_given(0, last, {last, 0})


def test_damaged_blobs_go_as_before(store: Store, ids: dict[str, str], tmp_path: Path) -> None:
    path = next(one for one in blob_files(store.root))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)

    store.check(read_data=True, repair=True)

    assert store.stats().counters["quarantined"] == 1
    assert store.check(read_data=True) == []
