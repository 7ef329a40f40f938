"""Cutting an entry of the store into blobs that many machines make alike.

Blocks begin at multiples of a length that follows from the bytes of a token, and their headers say
nothing of the entry, the machine or the day. So equal rows become equal bytes, whose name follows
from their digest, and prompts that begin alike share them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

from persist_cache import fs
from persist_cache.blobs.header import TOKENS, BlobHeader, header_bytes, prefix_digest
from persist_cache.blobs.reader import BlobReader
from persist_cache.blobs.rows import copy_rows, whole
from persist_cache.codec import Tensor
from persist_cache.entry import Tier
from persist_cache.errors import CorruptBlobError, RemoteError, StoreError
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.index import tree
from persist_cache.index.records import NO_BLOB
from persist_cache.portable.entries import Stretch, spans_of
from persist_cache.portable.identity import portable
from persist_cache.store.catalog import identity_of, known_blob
from persist_cache.store.store import Store
from persist_cache.tokens import TOKEN_BYTES

BLOCK_BYTES = 8 << 20
"""Most bytes of rows in one block, so that little memory is enough and little is sent again."""
PART_BYTES = 16 << 20
"""A blob that is larger, such as a state, lies in several objects."""
MAX_BLOCK_TOKENS = 512
_MAX_OPEN = 64
"""Of a longer path each file is opened when it is read; macOS allows a process 256."""


class StoredEntry(Struct, frozen=True):
    """One entry of the store, as of one look at the index.

    Attributes:
        id: Its id.
        fingerprint: Identity of its model, without paths.
        layout: JSON of the cache classes and their geometry.
        tier: Role class.
        pinned: It is pinned.
        label: The user's name for it.
        packed: Its tokens.
        created: UTC seconds.
        prefill_s: Seconds that computing it took, 0 when nobody measured.
        hits: That the index knows of.
        runs: Names of blobs, and which tokens are used of each.
        state: Name of the blob with its state, or "".
    """

    id: str
    fingerprint: Fingerprint
    layout: str
    tier: Tier
    pinned: bool
    label: str
    packed: bytes
    created: float
    prefill_s: float
    hits: int
    runs: tuple[tuple[str, int, int], ...]
    state: str

    @property
    def num_tokens(self) -> int:
        return len(self.packed) // TOKEN_BYTES

    @classmethod
    def of(cls, store: Store, entry: str) -> StoredEntry:
        """Look an entry up.

        Raises:
            KeyError: It is not stored.
            StoreError: The index is damaged.
        """
        with store.read() as txn:
            record = txn.entry(int(entry, 16))
            if record is None:
                raise KeyError(entry)
            namespace = next(
                (one for _, one in txn.namespaces() if one.number == record.namespace), None
            )
            if namespace is None:
                raise tree.damaged("an entry names a namespace without record")
            runs: list[tuple[str, int, int]] = []
            position = 0
            for _, edge in tree.path_of(txn, record.node):
                name = known_blob(txn, edge.blob).name.hex()
                start = position
                if runs and runs[-1][0] == name:
                    start = runs.pop()[1]
                position += edge.rows
                runs.append((name, start, position))
            state = ""
            if record.checkpoint != NO_BLOB:
                state = known_blob(txn, record.checkpoint).name.hex()
            return cls(
                id=entry,
                fingerprint=portable(identity_of(namespace)),
                layout=namespace.layout,
                tier=record.tier,
                pinned=record.pinned,
                label=record.label,
                packed=tree.tokens_of(txn, record.node),
                created=record.created_us / 1e6,
                prefill_s=record.prefill_s,
                hits=record.hits,
                runs=tuple(runs),
                state=state,
            )


class Cutter:
    """Makes blobs of an open entry; each stored blob is verified before its rows are read.

    Attributes:
        complete: Rows suffice to resume the entry at any position.
        block_tokens: Blocks begin at multiples of it.
    """

    def __init__(self, entry: StoredEntry, readers: list[BlobReader]) -> None:
        self._entry = entry
        self._stretches = [
            Stretch(reader, start, end)
            for reader, (_, start, end) in zip(readers, entry.runs, strict=True)
        ]
        self._verified: set[str] = set()
        self._identity = Fingerprint(entry.fingerprint.fields).to_json().decode()
        self.complete = all(reader.header.complete for reader in readers)
        self.block_tokens = _block_tokens(readers[0].header)

    def block(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes of the blob with the rows of the tokens `[start, end)`."""
        parts = [one for one in self._stretches if one.start < end and start < one.end]
        for part in parts:
            if part.reader.name not in self._verified:
                part.reader.verify()
                self._verified.add(part.reader.name)
        view = memoryview(self._entry.packed)
        own = view[start * TOKEN_BYTES : end * TOKEN_BYTES]
        tensors = [Tensor(TOKENS, "I64", (end - start,), [own])]
        tensors += [copy_rows(spans) for spans in spans_of(parts, start, end)]
        complete = all(part.reader.header.complete for part in parts)
        header = self._header("run", complete, "{}", start, end)
        yield from _bytes_of(header, tensors)

    def checkpoint(self, reader: BlobReader) -> Iterator[memoryview]:
        """The bytes of the blob with the state at the entry's end."""
        end = self._entry.num_tokens
        tensors = [whole(reader, name) for name in reader.header.tensors if name != TOKENS]
        header = self._header("checkpoint", False, reader.header.detail, end, end)
        yield from _bytes_of(header, tensors)

    def _header(self, kind: str, complete: bool, detail: str, start: int, end: int) -> BlobHeader:
        return BlobHeader(
            kind=kind,
            complete=complete,
            fingerprint=self._entry.fingerprint.hex,
            identity=self._identity,
            layout=self._entry.layout,
            detail=detail,
            start=start,
            end=end,
            prefix=prefix_digest(memoryview(self._entry.packed)[: start * TOKEN_BYTES]),
            parent="",
            tier=Tier.ASSISTANT.label,
            entry=False,
            created=0.0,
        )


@contextlib.contextmanager
def opened(store: Store, entry: StoredEntry) -> Iterator[tuple[Cutter, BlobReader | None]]:
    """The blobs of an entry, which stay while the block lasts, and the one with its state.

    Raises:
        RemoteError: One is gone or damaged, also within the block.
    """
    with store.serving([entry.id]), contextlib.ExitStack() as stack, _errors():
        readers = []
        for name, _, _ in entry.runs:
            reader = stack.enter_context(store.open_blob(name))
            if len(entry.runs) > _MAX_OPEN:
                reader.release()
            readers.append(reader)
        state = stack.enter_context(store.open_blob(entry.state)) if entry.state else None
        yield Cutter(entry, readers), state


def parts_of(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    """The same bytes in parts of `PART_BYTES`, the last of which may be shorter."""
    held: list[memoryview] = []
    nbytes = 0
    for piece in pieces:
        rest = piece
        while nbytes + len(rest) >= PART_BYTES:
            cut = PART_BYTES - nbytes
            held.append(rest[:cut])
            yield b"".join(held)
            held, nbytes, rest = [], 0, rest[cut:]
        if rest:
            held.append(rest)
            nbytes += len(rest)
    if held:
        yield b"".join(held)


def _bytes_of(header: BlobHeader, tensors: Sequence[Tensor]) -> Iterator[memoryview]:
    yield memoryview(header_bytes(header, tensors))
    for tensor in tensors:
        yield from tensor.pieces


def _block_tokens(header: BlobHeader) -> int:
    """The power of two of which the rows are at most `BLOCK_BYTES`."""
    nbytes = sum(info.nbytes for name, info in header.tensors.items() if name != TOKENS)
    per_token = nbytes // (header.end - header.start) + 1
    fitting = min(max(1, BLOCK_BYTES // per_token), MAX_BLOCK_TOKENS)
    return 1 << fitting.bit_length() - 1


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except CorruptBlobError as error:
        raise RemoteError(
            f"Blob {error.path.name} is damaged ({error.reason}), so the entry is not published; "
            "run `persist-cache check --repair`."
        ) from error
    except FileNotFoundError as error:
        raise RemoteError(
            "The entry was evicted, or its files were merged, while it was published; try again."
        ) from error
    except OSError as error:
        raise RemoteError(str(fs.translated(error, "while an entry was published"))) from error
    except StoreError as error:
        raise RemoteError(str(error)) from error
