"""Rebuilding a lost or damaged index from the blobs alone.

Every blob says which tokens its rows stand for, what came before them, and which blob it hangs
on. What cannot be proved to belong is left to the orphan sweep. Uses, pins and labels are lost;
tiers and dates are not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from persist_cache import fs
from persist_cache.blobs.folder import BlobFolder
from persist_cache.blobs.header import TOKENS, BlobHeader, EntryMark, prefix_digest
from persist_cache.blobs.reader import BlobReader
from persist_cache.blobs.writer import Written
from persist_cache.entry import Tier
from persist_cache.errors import CorruptBlobError, StoreError
from persist_cache.index import tree
from persist_cache.index.environment import Index
from persist_cache.index.records import (
    END_OF_TIME_S,
    NO_BLOB,
    UNREADABLE,
    BlobKind,
    EntryRecord,
    NamespaceRecord,
    namespace_key,
)
from persist_cache.index.transaction import Reader, Writer
from persist_cache.store.recording import add_blob, place_entry
from persist_cache.tokens import TOKEN_BYTES

log = logging.getLogger(__name__)
_FINGERPRINT_BYTES = 32
_FILLED = "filled"
"""Counter in the index: not 0 once it lists the blobs. Until then no file is an orphan."""


class _Found(Struct, frozen=True):
    name: str
    header: BlobHeader
    written: Written
    packed: bytes


def is_due(index: Index) -> bool:
    """Whether `index` was never filled: it is new, or took the place of a damaged one."""
    with index.read() as txn:
        return txn.counter(_FILLED) == 0


def rebuild(
    index: Index, folder: BlobFolder, progress: Callable[[int, int], None] | None = None
) -> int:
    """Make all records anew from the blobs in `folder`, in one commit.

    What the old records, if there are any, say of use, pins, labels and expiry is carried over.

    Args:
        index: The index; others may have it open.
        folder: The blobs.
        progress: Called with files read and files in total.

    Returns:
        Number of blobs that found their place.
    """
    files = [(name, path) for name, path in folder.names() if path == folder.path(name)]
    found: dict[str, _Found] = {}
    for done, (name, path) in enumerate(files, 1):
        one = _inspect(name, path)
        if one is not None:
            found[name] = one
        if progress is not None:
            progress(done, len(files))
    # A blob names the one it hangs on, which may have been written anew under another name.
    by_name = {old: one for one in found.values() for old in one.header.replaces} | found
    needed = {id(by_name[one.header.parent]) for one in found.values() if _has_parent(one, by_name)}
    # What a dead writer left beside a blob then adds nothing: no blob hangs on that, and of two
    # that nothing hangs on the longer one comes first.
    in_order = sorted(
        found.values(),
        key=lambda one: (
            one.header.start,
            one.header.kind != "run",
            not _took_over(one, found),
            id(one) not in needed,
            -one.header.end,
            one.name,
        ),
    )

    def fill(txn: Writer) -> int:
        known = _readable(txn)
        txn.discard_unreadable()
        txn.clear_tree()
        txn.add(tree.BLOB_BYTES, -txn.counter(tree.BLOB_BYTES))
        doomed = txn.keys(b"trash") | txn.keys(b"pending")
        placed = sum(
            _place(txn, one, packed)
            for one in in_order
            if bytes.fromhex(one.name) not in doomed
            and (packed := _path_tokens(one, by_name)) is not None
        )
        _finish_leaves(txn)
        for number, record in list(txn.entries()):
            if number in known:
                txn.put_entry(number, _remember(record, known[number]))
        if txn.counter(_FILLED) == 0:
            txn.add(_FILLED, 1)
        return placed

    return index.update(fill)


def _took_over(one: _Found, found: dict[str, _Found]) -> bool:
    """Whether files whose place `one` took are gone, as they are only once it was committed."""
    old = one.header.replaces
    covered = {name for each in old if each in found for name in found[each].header.replaces}
    return any(name not in found and name not in covered for name in old)


def _readable(txn: Reader) -> dict[int, EntryRecord]:
    """The old entries; none when some of their records are damaged."""
    try:
        return dict(txn.entries())
    except (StoreError, *UNREADABLE) as error:
        log.warning("uses, pins and labels are lost: %s", error)
        return {}


def _remember(record: EntryRecord, old: EntryRecord) -> EntryRecord:
    return record._replace(
        tier=old.tier,
        pinned=old.pinned,
        hits=old.hits,
        created_us=old.created_us,
        last_use_us=old.last_use_us,
        prefill_s=old.prefill_s,
        saved_s=old.saved_s,
        expires=old.expires if 0 <= old.expires < END_OF_TIME_S else 0.0,
        label=old.label,
    )


def _inspect(name: str, path: Path) -> _Found | None:
    """Read a blob's header and tokens; None for anything that cannot be trusted.

    Raises:
        StoreError: It could not be read for now. Left out, a sound file would be an orphan.
    """
    try:
        with BlobReader(path) as reader:
            header = reader.header
            packed = reader.read_bytes(TOKENS) if header.kind == "run" else b""
            if len(packed) != (header.end - header.start) * TOKEN_BYTES:
                raise CorruptBlobError(path, "its tokens do not fill its span")
            check_claims(header)
            written = Written(name, reader.nbytes, fs.disk_bytes(path), reader.digest)
    except (StoreError, OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and fs.is_passing(error):
            raise fs.translated(error, "while the index was rebuilt") from error
        log.warning("blob %s is left out of the new index: %s", name, error)
        return None
    return _Found(name, header, written, packed)


def check_claims(header: BlobHeader) -> None:
    """Refuse what no index can hold.

    A seal proves that a header is as it was written, not that a version wrote it that we know.

    Raises:
        ValueError: It names a tier, a date or a fingerprint that does not exist.
    """
    if len(bytes.fromhex(header.fingerprint)) != _FINGERPRINT_BYTES:
        raise ValueError(f"{header.fingerprint!r} is no fingerprint")
    claims = [(header.tier, header.created)]
    claims += [(mark.tier, mark.created) for mark in header.inner_entries]
    for tier, created in claims:
        Tier.parse(tier)
        if not 0 <= created < END_OF_TIME_S:
            raise ValueError(f"{created} is no date")


def _path_tokens(one: _Found, by_name: dict[str, _Found]) -> bytes | None:
    """All tokens up to the end of a blob, if its chain of parents proves them."""
    parts = [one.packed]
    here = one
    while here.header.start > 0:
        if not _has_parent(here, by_name):
            return None
        above = by_name[here.header.parent]
        parts.append(above.packed[: (here.header.start - above.header.start) * TOKEN_BYTES])
        here = above
    packed = b"".join(reversed(parts))
    before = packed[: one.header.start * TOKEN_BYTES]
    return packed if prefix_digest(before) == one.header.prefix else None


def _has_parent(one: _Found, by_name: dict[str, _Found]) -> bool:
    above = by_name.get(one.header.parent)
    return above is not None and above.header.start < one.header.start <= above.header.end


def _place(txn: Writer, one: _Found, packed: bytes) -> bool:
    header = one.header
    fingerprint = bytes.fromhex(header.fingerprint)
    key = namespace_key(fingerprint, header.layout)
    namespace = _namespace(txn, key, header)
    path = tree.walk(txn, namespace.root, packed)
    wanted = EntryRecord.fresh(Tier.parse(header.tier), header.end, header.created)._replace(
        namespace=namespace.number
    )
    if header.kind == "run":
        if path.common != header.start or header.end == header.start:
            return False  # another blob has these tokens already
        blob = add_blob(
            txn,
            one.written,
            namespace=namespace.number,
            kind=BlobKind.RUN,
            created=header.created,
            start=header.start,
            packed=one.packed,
        )
        piece = tree.Piece(blob, header.end - header.start, header.complete)
        node = tree.attach(txn, path, packed, [piece])
        grown = tree.walk(txn, namespace.root, packed)
        if grown.complete_tokens == header.end:
            if header.entry:
                place_entry(txn, key, packed, wanted._replace(node=node))
            for mark in header.inner_entries:
                _place_inner(txn, key, namespace, packed, header, mark)
        return True
    if path.common != header.end or header.end == 0 or _has_checkpoint(txn, path):
        return False
    node = tree.attach(txn, path, packed, [])
    blob = add_blob(
        txn,
        one.written,
        namespace=namespace.number,
        kind=BlobKind.CHECKPOINT,
        created=header.created,
        start=header.start,
        packed=b"",
    )
    place_entry(txn, key, packed, wanted._replace(node=node, checkpoint=blob))
    return True


def _place_inner(
    txn: Writer,
    key: bytes,
    namespace: NamespaceRecord,
    packed: bytes,
    header: BlobHeader,
    mark: EntryMark,
) -> None:
    """Place an entry that ends within a run. One with a state of its own has a file of its own."""
    if not header.start < mark.end < header.end:
        return
    own = packed[: mark.end * TOKEN_BYTES]
    node = tree.attach(txn, tree.walk(txn, namespace.root, own), own, [])
    wanted = EntryRecord.fresh(Tier.parse(mark.tier), mark.end, mark.created)
    place_entry(txn, key, own, wanted._replace(namespace=namespace.number, node=node))


def _has_checkpoint(txn: Reader, path: tree.Walk) -> bool:
    entry = None if path.node is None else txn.entry(path.steps[-1].edge.entry)
    return entry is not None and entry.checkpoint != NO_BLOB


def _namespace(txn: Writer, key: bytes, header: BlobHeader) -> NamespaceRecord:
    found = txn.namespaces(key)
    if found:
        return found[0][1]
    record = NamespaceRecord(
        number=txn.add("next_namespace", 1),
        root=tree.new_node(txn),
        identity=header.identity,
        layout=header.layout,
        created=header.created,
    )
    txn.put_namespace(key, record)
    return record


def _finish_leaves(txn: Writer) -> None:
    """Every leaf carries an entry: one whose checkpoint is lost, or whose tail is, may not."""
    while True:
        bare = [
            (key, edge)
            for key, edge in list(txn.edges())
            if not edge.entry and not txn.children(edge.node, limit=1)
        ]
        if not bare:
            return
        for key, edge in bare:
            chain = tree.path_of(txn, edge.node)
            if all(one.complete for _, one in chain):
                _adopt(txn, edge.node)
            else:
                tree.drop_subtree(txn, key, "its state was lost", time.time())


def _adopt(txn: Writer, node: int) -> None:
    """Give a resumable leaf an entry of the lowest tier."""
    chain = tree.path_of(txn, node)
    root = int.from_bytes(chain[0][0][:8], "big")
    packed = tree.tokens_of(txn, node)
    for key, namespace in txn.namespaces():
        if namespace.root == root:
            blob = txn.blob(chain[-1][1].blob)
            created = blob.created if blob else 0.0
            fresh = EntryRecord.fresh(Tier.ASSISTANT, len(packed) // TOKEN_BYTES, created)
            wanted = fresh._replace(namespace=namespace.number, node=node)
            place_entry(txn, key, packed, wanted)
            return
