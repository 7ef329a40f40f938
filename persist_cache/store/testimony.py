"""Index and blobs say the same twice. Where they differ: which is at fault, and setting it right.

A blob proves itself, by a seal over its header and checksums over its data; the index has nothing
of the kind. So a blob that is whole is believed against the index, with one exception: if neither
its bytes nor its tokens are those that the index names, another file lies in its place.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

import xxhash
from msgspec import Struct

from persist_cache.blobs.header import TOKENS
from persist_cache.blobs.reader import BlobReader
from persist_cache.errors import StoreError
from persist_cache.index import tree
from persist_cache.index.audit import Records, broken_invariants, misnumbered, stretches, too_small
from persist_cache.index.records import NO_BLOB, UNREADABLE, BlobKind, BlobRecord, namespace_key
from persist_cache.index.transaction import Reader, Writer
from persist_cache.store import rebuild
from persist_cache.store.session import Disk
from persist_cache.tokens import TOKEN_BYTES

log = logging.getLogger(__name__)


class Testimony(Struct, frozen=True):
    """What a blob says of itself, as far as the index says it, too.

    Attributes:
        is_run: Not a checkpoint.
        complete: It has the rows of all layers.
        namespace: Key of its model and layout.
        layout: The layout's text.
        start: Position of its first token.
        prefix: Hex digest of the tokens before.
        packed: Its tokens.
        nbytes: Its length.
        digest: Of its header.
    """

    is_run: bool
    complete: bool
    namespace: bytes
    layout: str
    start: int
    prefix: str
    packed: bytes
    nbytes: int
    digest: bytes

    @classmethod
    def of(cls, reader: BlobReader) -> Testimony:
        """What a verified blob says.

        Raises:
            CorruptBlobError: Its tokens are not those that were written.
            ValueError: It names a model as none is named.
        """
        header = reader.header
        is_run = header.kind == "run"
        return cls(
            is_run=is_run,
            complete=header.complete,
            namespace=namespace_key(bytes.fromhex(header.fingerprint), header.layout),
            layout=header.layout,
            start=header.start,
            prefix=header.prefix,
            packed=reader.read_bytes(TOKENS) if is_run else b"",
            nbytes=reader.nbytes,
            digest=reader.digest,
        )

    @classmethod
    def taken(cls, path: Path) -> Testimony | None:
        """What the blob at `path` says, if it is whole by its own words; it is read to its end."""
        try:
            with BlobReader(path) as reader:
                reader.verify()
                return cls.of(reader)
        except (OSError, StoreError, ValueError, KeyError):
            return None

    def is_of(self, record: BlobRecord) -> bool:
        """Whether the file is the one that the index names, byte for byte."""
        return (self.nbytes, self.digest) == (record.nbytes, record.digest)

    def fits(self, record: BlobRecord, tokens: bytes) -> bool:
        """Whether it has the tokens that the index gives it, where it does so."""
        return (
            self.is_run == (record.kind == BlobKind.RUN)
            and self.start == record.start
            and self.packed == tokens
        )


def is_whole(disk: Disk, name: str) -> bool:
    """Whether the file of a blob is sound, and the index wrong about its bytes."""
    said = Testimony.taken(disk.folder.path(name))
    with disk.index.read() as txn:
        number = txn.blob_number(bytes.fromhex(name))
        record = None if number is None else txn.blob(number)
        if said is None or number is None or record is None:
            return False
        return said.fits(record, txn.tokens(number, 0, tree.MAX_ROWS))


def contradictions(txn: Reader, said: Mapping[str, Testimony]) -> Iterator[tuple[str, str]]:
    """Where the index says something else than whole blobs; a sentence, and the blob's name.

    Args:
        txn: A view of the index.
        said: What blobs say, by name; those that the index does not know are left out.
    """
    known: dict[int, tuple[str, Testimony]] = {}
    for number, record in txn.blobs():
        name = record.name.hex()
        one = said.get(name)
        if one is None or not one.is_of(record):
            continue
        known[number] = name, one
        if one.is_run != (record.kind == BlobKind.RUN) or one.start != record.start:
            yield "the index gives this blob another kind or start than it has", name
        elif txn.tokens(number, 0, tree.MAX_ROWS) != one.packed:
            yield "the index has other tokens than this blob", name
    records = Records.of(txn)
    states = {number: record.checkpoint for number, record in records.entries.items()}
    for edge, key, before, after in stretches(txn, records, lambda _: xxhash.xxh3_128()):
        found = known.get(edge.blob)
        if found is not None:
            name, one = found
            if edge.complete != one.complete:
                yield "the index is wrong about whether this blob has the rows of all layers", name
            if not edge.first_row and (key, before.hexdigest()) != (
                one.namespace,
                one.prefix,
            ):
                yield "the index puts this blob below another prompt than its own", name
        state = known.get(states.get(edge.entry, NO_BLOB))
        if state is not None:
            name, one = state
            if (key, after.hexdigest()) != (one.namespace, one.prefix):
                yield "the index has another prompt resume from this blob than its own", name


def set_right(disk: Disk, name: str) -> bool:
    """Have the index say of a blob what that says of itself, if that is whole.

    Returns:
        Whether something was changed. If not, it is the blob that is at fault.
    """
    said = Testimony.taken(disk.folder.path(name))
    if said is None:
        return False
    misplaced = False

    def mend(txn: Writer) -> bool:
        nonlocal misplaced
        number = txn.blob_number(bytes.fromhex(name))
        record = None if number is None else txn.blob(number)
        if number is None or record is None:
            return False
        tokens = txn.tokens(number, 0, tree.MAX_ROWS)
        changed = False
        if not said.is_of(record):
            if not said.fits(record, tokens):
                return False  # another file lies in its place
            txn.put_blob(number, record._replace(nbytes=said.nbytes, digest=said.digest))
            changed = True
        edges = [(key, edge) for key, edge in txn.edges() if edge.blob == number]
        for key, edge in edges:
            if edge.complete != said.complete:
                txn.put_edge(key, edge._replace(complete=said.complete))
                changed = True
        if said.is_run and len(tokens) == len(said.packed) and tokens != said.packed:
            _realign(txn, number, said.packed)
            changed = True
        with contextlib.suppress(StoreError, *UNREADABLE):  # an index in pieces says nothing
            misplaced = any(contradictions(txn, {name: said}))
        return changed

    changed = disk.index.update(mend)
    if misplaced:
        # Its records contradict the blob in more than one place: they are made again.
        rebuild.rebuild(disk.index, disk.folder)
        changed = True
    if changed:
        log.warning("the index was wrong about blob %s, which is sound; it was set right", name)
    return changed


def _realign(txn: Writer, number: int, packed: bytes) -> None:
    """Give a run its own tokens, and its edges their keys."""
    txn.put_tokens(number, packed)
    for key, edge in list(txn.edges()):
        right = key[:-TOKEN_BYTES] + packed[edge.first_row * TOKEN_BYTES :][:TOKEN_BYTES]
        # Where another edge is filed already, the contradiction is left, and found.
        if edge.blob == number and right != key and txn.edge(right) is None:
            txn.delete_edge(key, None)
            txn.put_edge(right, edge)


def mend(disk: Disk, names: Iterable[str]) -> bool:
    """Correct what is wrong in an index without making all of it anew, as far as that goes.

    A new index loses the labels and pins of entries that end within a run, so this comes first.

    Args:
        disk: The store.
        names: Blobs that it contradicts.

    Returns:
        Whether it is sound now.
    """
    with contextlib.suppress(StoreError, _UndoError):
        with disk.index.read() as txn:
            numbers = [number for number, _ in misnumbered(txn, Records.of(txn))]
            # Its number is that of its tokens: those may be what is wrong.
            suspects = [*names, *chain.from_iterable(_runs_of(txn, number) for number in numbers)]
        said = {}
        for name in dict.fromkeys(suspects):
            set_right(disk, name)
            one = Testimony.taken(disk.folder.path(name))
            if one is not None:
                said[name] = one
        disk.index.update(partial(_mend_numbers, said=said))
        return True
    return False


class _UndoError(Exception):
    """Ends a transaction without a commit."""


def _mend_numbers(txn: Writer, said: Mapping[str, Testimony]) -> None:
    """Correct numbers, if there is nothing else to be corrected.

    Raises:
        _UndoError: There is.
    """
    found = Records.of(txn)
    for counter, least in list(too_small(txn, found)):
        txn.add(counter, least - txn.counter(counter))
    for number, right in list(misnumbered(txn, found)):
        record = txn.entry(number)
        if record is not None and txn.entry(right) is None:
            txn.delete_entry(number)
            txn.put_entry(right, record)
            tree.set_entry(txn, record.node, right)
    for database in (b"trash", b"pending", b"quarantine", b"departed"):
        txn.sized(database)  # a record that cannot be read is something, too
    txn.counts()
    if broken_invariants(txn) or any(contradictions(txn, said)):
        raise _UndoError


def _runs_of(txn: Reader, entry: int) -> Iterator[str]:
    """Names of the runs with an entry's rows."""
    record = txn.entry(entry)
    for _, edge in tree.path_of(txn, record.node) if record is not None else ():
        blob = txn.blob(edge.blob)
        if blob is not None:
            yield blob.name.hex()
