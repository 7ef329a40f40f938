"""The order of eviction: which entry is worth least, and may go."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice

from persist_cache.index.records import (
    NO_BLOB,
    NO_ENTRY,
    EntryRecord,
    edge_parent,
    recency_key,
    unpack_number,
)
from persist_cache.index.transaction import Reader
from persist_cache.index.tree import MAX_DEPTH, damaged

_VICTIMS_AT_ONCE = 256


def victims(txn: Reader, protected: Collection[int], now: float) -> Iterator[int]:
    """Entries in the order of eviction; the caller drops each before asking for the next.

    By tier, inside a tier by last use, and then those that are to be kept for some time after it,
    as long as that runs, by its end. But a leaf goes before its parents: an entry that others
    hang on waits until they are gone, and is then the next if its own turn has passed. An entry
    with a checkpoint of its own need not wait, because those below do without it.

    Args:
        txn: The transaction in which the caller drops them.
        protected: Nodes whose entries must stay.
        now: UTC seconds.
    """
    now_us = int(now * 1e6)
    for turn in _turns(txn, now_us):
        number = unpack_number(turn[9:])
        while number != NO_ENTRY:
            record = txn.entry(number)
            if record is None or not _may_go(txn, record, protected):
                break
            if _turn(txn, number, record, now_us) > turn:
                break  # its own turn comes later
            above = _entry_above(txn, record.node)
            yield number
            number = above


def _turns(txn: Reader, now_us: int) -> Iterator[bytes]:
    """When it is each entry's turn, in order."""
    kept: list[bytes] = []
    after = b""
    while keys := list(islice(txn.recency_keys(after), _VICTIMS_AT_ONCE)):
        for after in keys:
            if kept and kept[0][0] != after[0]:
                yield from sorted(kept)
                kept = []
            number = unpack_number(after[9:])
            record = txn.entry(number) if txn.kept_s(number) else None
            turn = after if record is None else _turn(txn, number, record, now_us)
            if turn == after:
                yield turn
            else:
                kept.append(turn)
    yield from sorted(kept)


def _turn(txn: Reader, number: int, record: EntryRecord, now_us: int) -> bytes:
    """Sorts by tier, then by last use or, while it is to be kept, by the end of that time."""
    until_us = record.last_use_us + txn.kept_s(number) * 1_000_000
    when_us = until_us if until_us > now_us else record.last_use_us
    return recency_key(record.tier, when_us, number)


def _may_go(txn: Reader, record: EntryRecord, protected: Collection[int]) -> bool:
    if record.pinned or record.node in protected:
        return False
    return record.checkpoint != NO_BLOB or not txn.children(record.node, limit=1)


def _entry_above(txn: Reader, node: int) -> int:
    """The nearest entry that is a prefix of the one at `node`."""
    key = txn.parent_key(node)
    for _ in range(MAX_DEPTH):
        if key is None:
            return NO_ENTRY
        key = txn.parent_key(edge_parent(key))
        edge = None if key is None else txn.edge(key)
        if edge is not None and edge.entry != NO_ENTRY:
            return edge.entry
    raise damaged("the way back from a node has no end")
