"""Records survive packing, sort as numbers, and unknown versions are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persist_cache.columns import (
    BlobColumns,
    EdgeColumns,
    EntryColumns,
    SizeColumns,
    TreeColumns,
)
from persist_cache.entry import Tier
from persist_cache.errors import StoreFormatError
from persist_cache.records import (
    BlobKind,
    BlobRecord,
    Edge,
    EntryRecord,
    NamespaceRecord,
    SizedRecord,
    edge_key,
    edge_parent,
    entry_id,
    entry_number,
    expiry_key,
    namespace_key,
    pack_number,
    recency_key,
)

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
DATES = st.floats(0, 1e12)
RECORDS: list[Any] = [
    Edge(True, 7, 1 << 40, (1 << 64) - 1, 3, 4),
    BlobRecord(BlobKind.CHECKPOINT, 1, 0, 9, 1 << 40, 4096, 1.5, b"n" * 16, b"d" * 16),
    EntryRecord.fresh(Tier.SYSTEM, 9, 1.7e9)._replace(label="Grüße 🎉", expires=2e9, pinned=True),
    NamespaceRecord(3, 4, '{"a":1}', "{}", 1.5),
    SizedRecord(5, 6.5, "why"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_record_survives_packing_and_an_unknown_version_is_refused(record: Any) -> None:
    raw = record.pack()

    assert type(record).unpack(raw) == record
    assert type(record).unpack(memoryview(raw)) == record
    with pytest.raises(StoreFormatError, match="version 2"):
        type(record).unpack(b"\x02" + raw[1:])


def test_edges_take_32_bytes() -> None:
    assert len(RECORDS[0].pack()) == 32


@given(st.sampled_from(Tier), U64, U64, st.sampled_from(Tier), U64, U64)
def test_recency_sorts_by_tier_then_use_then_entry(
    tier: Tier, use: int, entry: int, tier2: Tier, use2: int, entry2: int
) -> None:
    assert (recency_key(tier, use, entry) < recency_key(tier2, use2, entry2)) == (
        (tier, use, entry) < (tier2, use2, entry2)
    )


@given(DATES, DATES)
def test_expiry_sorts_by_date(one: float, other: float) -> None:
    assert (expiry_key(one, 0) < expiry_key(other, 0)) == (int(one * 1e6) < int(other * 1e6))


@given(U64, st.binary(min_size=8, max_size=8))
def test_edge_key_names_its_parent(node: int, token: bytes) -> None:
    assert edge_parent(edge_key(node, token)) == node


def test_entry_numbers_do_not_depend_on_the_process() -> None:
    key = namespace_key(b"f" * 32, "{}")

    assert entry_id(entry_number(key, b"x" * 8)) == entry_id(entry_number(key, b"x" * 8))
    assert entry_number(key, b"x" * 8) != entry_number(namespace_key(b"g" * 32, "{}"), b"x" * 8)
    assert len(entry_id(1)) == 16


@given(st.lists(st.tuples(U64, st.booleans(), U32, U64, U64, U32, U32), max_size=4))
def test_columns_of_edges_are_their_fields(rows: list[tuple[Any, ...]]) -> None:
    keys = [edge_key(parent, pack_number(parent ^ 5)) for parent, *_ in rows]
    edges = [Edge(*fields) for _, *fields in rows]

    found = EdgeColumns.unpack(keys, [edge.pack() for edge in edges])

    assert [*found.keys] == keys
    assert [*found.parents] == [edge_parent(key) for key in keys]
    assert [*found.tokens] == [key[8:] for key in keys]
    assert [*zip(*found[3:], strict=True)] == [edge[1:] for edge in edges]
    tree = TreeColumns.unpack(keys, [edge.pack() for edge in edges])
    assert tree == (found.parents, *found[3:])


def test_columns_of_blobs_and_entries_are_their_fields() -> None:
    blobs = [BlobRecord(kind, 1, 2, 3, 4, 5, 6.5, b"n" * 16, b"d" * 16) for kind in BlobKind]
    entry = EntryRecord(Tier.USER, True, 2, 3, 4, 5, 6, 7, 8, 9.5, 10.5, 11.5, "Grüße")
    plain = entry._replace(label="", tier=Tier.SYSTEM)
    keys = [pack_number(7), pack_number(8)]

    stored = BlobColumns.unpack(keys, [blob.pack() for blob in blobs])
    placed = EntryColumns.unpack(keys, [entry.pack(), plain.pack()])

    assert stored == BlobColumns(
        (7, 8), (0, 1), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (b"n" * 16,) * 2, (b"d" * 16,) * 2
    )
    sizes = SizeColumns.unpack(keys, [blob.pack() for blob in blobs])
    assert sizes == (stored.numbers, stored.num_tokens, stored.starts, stored.disk_bytes)
    tiers = (int(Tier.USER), int(Tier.SYSTEM))
    twice = [(value, value) for value in entry[1:-1]]
    assert placed == EntryColumns._make(((7, 8), tiers, *twice, ["Grüße", ""]))


@pytest.mark.parametrize(
    ("columns", "record"),
    [
        (EdgeColumns, RECORDS[0]),
        (TreeColumns, RECORDS[0]),
        (BlobColumns, RECORDS[1]),
        (SizeColumns, RECORDS[1]),
        (EntryColumns, RECORDS[2]),
    ],
)
def test_columns_of_an_unknown_version_are_refused(columns: Any, record: Any) -> None:
    raw = bytearray(record.pack())
    raw[0] = 9

    with pytest.raises(StoreFormatError, match="version 9"):
        columns.unpack([b"k" * 16], [bytes(raw)])
