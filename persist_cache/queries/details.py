"""What one entry is made of: its runs, its tokens, what it shares."""

from __future__ import annotations

from msgspec import Struct

from persist_cache.entry import Entry
from persist_cache.index import tree
from persist_cache.index.records import NO_BLOB, NO_ENTRY, BlobRecord, entry_id
from persist_cache.index.transaction import Reader
from persist_cache.queries.models import Model, as_model
from persist_cache.store.catalog import known_blob, load_entry, namespace_of
from persist_cache.store.store import Store
from persist_cache.tokens import unpack_tokens


class RunDetails(Struct, frozen=True):
    """One blob on the path of an entry.

    Attributes:
        blob: Its name.
        path: Its file.
        start: Position of its first token.
        num_tokens: Tokens of it that the entry uses.
        blob_tokens: Tokens that it has.
        nbytes: Length of the file.
        entries: Entries that use it.
        created: UTC seconds.
    """

    blob: str
    path: str
    start: int
    num_tokens: int
    blob_tokens: int
    nbytes: int
    entries: int
    created: float


class Details(Struct, frozen=True):
    """Everything about one entry.

    Attributes:
        entry: The entry.
        model: Whose it is.
        layout: JSON of the cache classes and their geometry.
        runs: The blobs with its rows, in order.
        checkpoint: The blob with the state at its end, or None when rows suffice.
        children: Ids of the entries that go on right after it.
    """

    entry: Entry
    model: Model
    layout: str
    runs: tuple[RunDetails, ...]
    checkpoint: RunDetails | None
    children: tuple[str, ...]


def details_of(store: Store, entry: str) -> Details | None:
    """What an entry is made of, or None when it is not stored.

    Reads what is above and below the entry, not the whole index.

    Raises:
        StoreError: The index contradicts itself.
    """
    number = int(entry, 16)
    with store.read() as txn:
        found = load_entry(txn, number)
        record = txn.entry(number)
        if found is None or record is None:
            return None
        key, namespace = namespace_of(txn, record)
        checkpoint = None
        if record.checkpoint != NO_BLOB:
            checkpoint = _run(store, known_blob(txn, record.checkpoint), 0, 1)
        return Details(
            entry=found,
            model=as_model(key, namespace),
            layout=namespace.layout,
            runs=_runs(store, txn, record.node),
            checkpoint=checkpoint,
            children=tuple(sorted(map(entry_id, tree.entries_behind(txn, record.node)))),
        )


def _runs(store: Store, txn: Reader, node: int) -> tuple[RunDetails, ...]:
    """The blobs on the way to `node`, each with the number of entries that use it."""
    runs: list[RunDetails] = []
    users = 0
    lower = None
    for _, edge in reversed(tree.path_of(txn, node)):
        users += edge.entry != NO_ENTRY
        for _, beside in txn.children(edge.node):
            if beside.node != lower:
                users += (beside.entry != NO_ENTRY) + sum(
                    one.entry != NO_ENTRY for one in tree.edges_below(txn, beside.node)
                )
        blob = known_blob(txn, edge.blob)
        rows = edge.rows
        if runs and runs[-1].blob == blob.name.hex():
            rows += runs.pop().num_tokens
        runs.append(_run(store, blob, rows, users))
        lower = edge.node
    return tuple(reversed(runs))


def _run(store: Store, blob: BlobRecord, rows: int, users: int) -> RunDetails:
    name = blob.name.hex()
    path = str(store.blob_path(name))
    return RunDetails(
        name, path, blob.start, rows, blob.num_tokens, blob.nbytes, users, blob.created
    )


def tokens_of(store: Store, entry: str) -> list[int]:
    """The token ids of an entry.

    Raises:
        KeyError: It is not stored.
    """
    with store.read() as txn:
        record = txn.entry(int(entry, 16))
        if record is None:
            raise KeyError(entry)
        return unpack_tokens(tree.tokens_of(txn, record.node))
