"""Every error this package raises on purpose.

PersistCacheError
├─ StoreError                  the store on disk
│  ├─ StoreInUseError          opened twice in this process, or used after a fork
│  │  └─ StoreBusyError        another process holds a lock and does not let go of it
│  ├─ StoreFullError           budget, free-space floor, map or disk full; nothing changed
│  ├─ StoreFormatError         written by an unknown layout or schema version
│  ├─ DamagedIndexError        the index is no LMDB file, or is torn; the blobs give a new one
│  ├─ StoreReadOnlyError       a change was asked of a store opened read-only
│  ├─ StoreAccessError         the folder cannot be read or written, or is not ours
│  └─ CorruptBlobError         a blob whose bytes are not what was written (.path)
├─ UnsupportedCacheError       this KV cache class cannot be saved (.class_name)
├─ ModelError                  a model that cannot be found, fetched or loaded
├─ RemoteError                 the shared object store cannot do what was asked
└─ MissingDependencyError      a feature needs a package that is not installed

A miss is a value, not an error; an absent entry is a `KeyError`.
"""

from __future__ import annotations

from pathlib import Path


class PersistCacheError(Exception):
    """Base of all errors raised on purpose; `str()` is one sentence for the user."""


class StoreError(PersistCacheError):
    """The store on disk cannot do what was asked."""


class StoreInUseError(StoreError):
    """The store is open in this process already, or was opened before a fork."""


class StoreBusyError(StoreInUseError):
    """Another process, which may be stopped, holds a lock of the store; nothing was changed."""


class StoreFullError(StoreError):
    """There is no room within the budget; nothing was changed."""


class StoreFormatError(StoreError):
    """The store or a blob was written by a version this one does not know."""


class DamagedIndexError(StoreError):
    """`data.mdb` cannot be what LMDB wrote; the store rebuilds it from the blobs."""


class StoreReadOnlyError(StoreError):
    """A change was asked of a store that was opened read-only."""


class StoreAccessError(StoreError):
    """The store's folder cannot be read or written, or belongs to somebody else."""


class CorruptBlobError(StoreError):
    """A blob is torn, damaged or not the one its record names."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path.name}: {reason}")
        self.path = path
        self.reason = reason

    @property
    def is_unreadable(self) -> bool:
        """Whether the disk gave an error, instead of other bytes."""
        return isinstance(self.__cause__, OSError)


class UnsupportedCacheError(PersistCacheError):
    """A KV cache of this class cannot be saved; it stays in memory."""

    def __init__(self, class_name: str, reason: str = "its class is not known") -> None:
        super().__init__(f"{class_name} cannot be saved: {reason}.")
        self.class_name = class_name
        self.reason = reason


class ModelError(PersistCacheError):
    """A model cannot be found, fetched, converted or loaded."""


class RemoteError(PersistCacheError):
    """The shared object store cannot do what was asked; the local store is as it was."""


class MissingDependencyError(PersistCacheError):
    """A feature needs a package that is not installed."""
