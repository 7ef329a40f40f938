"""Records survive packing, sort as numbers, and unknown versions are refused."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persist_cache.entry import Tier
from persist_cache.errors import StoreFormatError
from persist_cache.index.columns import BlobColumns, EdgeColumns, EntryColumns, Packed
from persist_cache.index.records import (
    NUMBER,
    RECENCY_KEY,
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

    found = EdgeColumns(keys, [edge.pack() for edge in edges])

    assert [*found.keys] == keys
    assert [*found.parents] == [edge_parent(key) for key in keys]
    assert [*found.tokens] == [key[8:] for key in keys]
    for name, field in {
        "blobs": "blob",
        "nodes": "node",
        "entries": "entry",
        "first_rows": "first_row",
        "rows": "rows",
    }.items():
        assert [*getattr(found, name)] == [getattr(edge, field) for edge in edges]


BLOBS = st.builds(
    BlobRecord,
    st.sampled_from(BlobKind),
    *(U32, U32, U32, U64, U64),
    DATES,
    *(st.binary(min_size=16, max_size=16),) * 2,
)
ENTRIES = st.builds(
    EntryRecord,
    st.sampled_from(Tier),
    st.booleans(),
    *(U32, U32, U32, U32, U64, U64, U64),
    *(DATES, DATES, DATES),
    st.text(max_size=3),
)


@given(st.lists(st.tuples(U64, BLOBS), max_size=4))
def test_columns_of_blobs_are_their_fields(rows: list[tuple[int, BlobRecord]]) -> None:
    found = BlobColumns(
        [pack_number(number) for number, _ in rows], [row.pack() for _, row in rows]
    )

    assert [*found.numbers] == [number for number, _ in rows]
    for name, field in {
        "kinds": "kind",
        "references": "references",
        "num_tokens": "num_tokens",
        "starts": "start",
        "nbytes": "nbytes",
        "disk_bytes": "disk_bytes",
        "names": "name",
        "digests": "digest",
    }.items():
        assert [*getattr(found, name)] == [getattr(row, field) for _, row in rows]


@given(st.lists(st.tuples(U64, ENTRIES), max_size=4))
def test_columns_of_entries_are_their_fields(rows: list[tuple[int, EntryRecord]]) -> None:
    found = EntryColumns(
        [pack_number(number) for number, _ in rows], [row.pack() for _, row in rows]
    )

    assert [*found.numbers] == [number for number, _ in rows]
    for name, field in {
        "tiers": "tier",
        "pinned": "pinned",
        "num_tokens": "num_tokens",
        "checkpoints": "checkpoint",
        "namespaces": "namespace",
        "hits": "hits",
        "nodes": "node",
        "created_us": "created_us",
        "last_uses_us": "last_use_us",
        "prefills_s": "prefill_s",
        "saved_s": "saved_s",
        "expires": "expires",
        "labels": "label",
    }.items():
        assert [*getattr(found, name)] == [getattr(row, field) for _, row in rows]


@given(st.lists(st.binary(min_size=17, max_size=17), max_size=4))
def test_packed_records_that_need_a_gap_are_read_as_their_layout_reads_them(
    raws: list[bytes],
) -> None:
    packed = Packed(RECENCY_KEY, raws)

    found = zip(*(packed.field(place) for place in range(3)), strict=True)

    assert [*found] == [RECENCY_KEY.unpack(raw) for raw in raws]


def test_packed_records_of_another_length_are_refused() -> None:
    with pytest.raises(struct.error, match="it has 9 bytes instead of 8"):
        Packed(NUMBER, [bytes(8), bytes(9)])


@pytest.mark.parametrize(
    ("columns", "key", "record"),
    [
        (EdgeColumns, b"k" * 16, RECORDS[0]),
        (BlobColumns, b"k" * 8, RECORDS[1]),
        (EntryColumns, b"k" * 8, RECORDS[2]),
    ],
)
def test_columns_of_an_unknown_version_are_refused(columns: Any, key: bytes, record: Any) -> None:
    raw = bytearray(record.pack())
    raw[0] = 9

    with pytest.raises(StoreFormatError, match="version 9"):
        columns([key], [bytes(raw)])
