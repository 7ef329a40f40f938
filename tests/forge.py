"""What only damage makes: records with wrong fields, lost records, raw keys.

The product has no words for it, so this is the one module of the tests that reaches into private
parts of the store. Everything else asks what the product offers (`tests/test_walls.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from persist_cache.blobs.folder import BlobFolder
from persist_cache.index.environment import Index, Writer
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


def forget_order(txn: Writer, entry: int) -> None:
    """Lose an entry's places in the orders of eviction and of expiry."""
    txn._forget_order(entry)
