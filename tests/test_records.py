"""Records survive packing, sort as numbers, and unknown versions are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
