"""What only damage makes: records with wrong fields, lost records, raw keys.

The product has no words for it, so this is the one module of the tests that reaches into private
parts of the product, also to look at the shape of a trie. Everything else uses public words
(`tests/test_forge.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from persist_cache.blobs.folder import BlobFolder
from persist_cache.cache.trie import PromptTrie
from persist_cache.index import tree
from persist_cache.index.environment import Index
from persist_cache.index.transaction import Writer
from persist_cache.store.store import Store

T = TypeVar("T")


def index(store: Store) -> Index:
    """The index of an open store."""
    return store._disk.index


def folder(store: Store) -> BlobFolder:
    """The folder of its blobs, to write some that nobody recorded."""
    return store._disk.folder


def change(store: Store, act: Callable[[Writer], T]) -> T:
    """Commit what `act` does to the index, without what the store would do besides."""
    return index(store).update(act)


def records(txn: Writer, table: bytes) -> list[tuple[bytes, bytes]]:
    """All keys and values of a table, as bytes, in their order."""
    return [(bytes(k), bytes(v)) for k, v in txn._txn.cursor(db=txn._db[table])]


def put(txn: Writer, table: bytes, key: bytes, value: bytes) -> None:
    """Write one record, and none of those that belong to it."""
    txn._txn.put(key, value, db=txn._db[table])


def delete(txn: Writer, table: bytes, key: bytes) -> None:
    """Lose one record, and none of those that belong to it."""
    txn._txn.delete(key, db=txn._db[table])


def drop(txn: Writer, table: bytes) -> None:
    """Lose a table, as in a store of a version that has none."""
    txn._txn.drop(txn._db[table])


def forget_order(txn: Writer, entry: int) -> None:
    """Lose an entry's places in the orders of eviction and of expiry."""
    txn._forget_order(entry)


def unrefer(txn: Writer, blob: int) -> None:
    """Let go of a blob that an entry still names."""
    tree._unrefer(txn, blob, 0.0)


def environment(index: Index) -> Any:
    """LMDB's part of an index."""
    return index._env


def evict(store: Store, *, nbytes: int) -> None:
    """Evict in order until so many bytes are freed; nothing of it is removed from the disk."""
    change(store, lambda txn: store._evictor.free(txn, nbytes, frozenset()))


def grow(store: Store, entry: str) -> None:
    """Have an entry count as stored since runs were merged last."""
    store._upkeep.note(int(entry, 16))


def roots(trie: PromptTrie[Any]) -> dict[Hashable, Any]:
    """The root of each model in a trie, for a look at its shape."""
    return trie._roots
