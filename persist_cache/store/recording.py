"""Recording a published file, and the entry that it is for, within the caller's commit.

A put records what it wrote, a rebuild what it found, and both place entries by the same rules.
"""

from __future__ import annotations

from persist_cache.blobs.writer import Written
from persist_cache.entry import PARTIAL_LABEL
from persist_cache.index import tree
from persist_cache.index.records import (
    NO_BLOB,
    NO_ENTRY,
    BlobKind,
    BlobRecord,
    EntryRecord,
    entry_number,
)
from persist_cache.index.transaction import Writer
from persist_cache.tokens import TOKEN_BYTES


def add_blob(
    txn: Writer,
    one: Written,
    *,
    namespace: int,
    kind: BlobKind,
    created: float,
    start: int,
    packed: bytes,
) -> int:
    """Record a published file, with its tokens and as yet without references."""
    number = txn.add("next_blob", 1)
    record = BlobRecord(
        kind=kind,
        references=0,
        num_tokens=len(packed) // TOKEN_BYTES,
        start=start,
        nbytes=one.nbytes,
        disk_bytes=one.disk_bytes,
        created=created,
        name=bytes.fromhex(one.name),
        digest=one.digest,
    )
    txn.put_blob(number, record)
    if kind == BlobKind.RUN:
        txn.put_tokens(number, packed)
    txn.add(tree.BLOB_BYTES, one.disk_bytes)
    txn.own(number, namespace, one.disk_bytes)
    txn.delete_sized(b"pending", record.name)
    return number


def place_entry(txn: Writer, key: bytes, packed: bytes, wanted: EntryRecord) -> int:
    """Make an entry end at `wanted.node`, or merge `wanted` into the one that is there.

    The higher tier, the pin, the uses and the label of an older entry stay; `(partial)` gives way
    to both. `wanted.checkpoint` must have been added by `add_blob`; it gets its reference here. Two
    checkpoints of one position hold the same state: the caller makes sure that there is none yet.

    Returns:
        The entry's number.
    """
    edge_at = txn.parent_key(wanted.node)
    edge = None if edge_at is None else txn.edge(edge_at)
    if edge is None:
        raise tree.damaged("entries end below the root")
    if wanted.checkpoint != NO_BLOB:
        tree.refer_checkpoint(txn, wanted.checkpoint)
    old = txn.entry(edge.entry) if edge.entry != NO_ENTRY else None
    if old is not None:
        txn.put_entry(
            edge.entry,
            old._replace(
                tier=max(old.tier, wanted.tier),
                pinned=old.pinned or wanted.pinned,
                checkpoint=old.checkpoint or wanted.checkpoint,
                last_use_us=max(old.last_use_us, wanted.last_use_us),
                prefill_s=wanted.prefill_s or old.prefill_s,
                expires=wanted.expires or old.expires,
                label=_label(old.label, wanted.label),
            ),
        )
        return edge.entry
    number = entry_number(key, packed)
    while txn.entry(number) is not None:  # another path has the same 64-bit digest
        number = number + 1 & (1 << 64) - 1 or 1
    txn.put_entry(number, wanted)
    tree.set_entry(txn, wanted.node, number)
    return number


def _label(old: str, wanted: str) -> str:
    if wanted == PARTIAL_LABEL:
        return old
    return wanted or ("" if old == PARTIAL_LABEL else old)
