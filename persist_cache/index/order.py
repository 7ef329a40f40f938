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


def victims(txn: Reader, protected: Collection[int]) -> Iterator[int]:
    """Entries in the order of eviction; the caller drops each before asking for the next.

    By tier, inside a tier by last use, but a leaf before its parents: an entry that others hang
    on waits until they are gone, and is then the next if its own turn has passed. An entry with
    a checkpoint of its own need not wait, because those below do without it.

    Args:
        txn: The transaction in which the caller drops them.
        protected: Nodes whose entries must stay.
    """
    turn = b""
    while keys := list(islice(txn.recency_keys(turn), _VICTIMS_AT_ONCE)):
        for turn in keys:
            number = unpack_number(turn[9:])
            while number != NO_ENTRY:
                record = txn.entry(number)
                if record is None or not _may_go(txn, record, protected):
                    break
                if recency_key(record.tier, record.last_use_us, number) > turn:
                    break  # its own turn comes later
                above = _entry_above(txn, record.node)
                yield number
                number = above


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
