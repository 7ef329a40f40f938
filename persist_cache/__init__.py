"""A prompt cache for mlx-lm that survives restarts.

`PromptCache` replaces `mlx_lm.models.cache.LRUPromptCache`; `Store` is the folder on disk behind
it. Importing this package loads neither MLX nor mlx-lm, and its own modules only when a name of
theirs is used, so that the command line starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persist_cache.cache.prompt_cache import PromptCache
    from persist_cache.cache.stats import Fetch, PromptCacheStats
    from persist_cache.codec import Source
    from persist_cache.entry import Entry, Match, MissReason, Run, Tier
    from persist_cache.errors import (
        CorruptBlobError,
        MissingDependencyError,
        ModelError,
        PersistCacheError,
        StoreAccessError,
        StoreBusyError,
        StoreError,
        StoreFormatError,
        StoreFullError,
        StoreInUseError,
        StoreReadOnlyError,
        UnsupportedCacheError,
    )
    from persist_cache.fingerprint.identifier import Identifier, identify
    from persist_cache.fingerprint.loads import Unidentified
    from persist_cache.fingerprint.value import Fingerprint
    from persist_cache.prefill.loading import load
    from persist_cache.store.catalog import StoreStats
    from persist_cache.store.check import Problem
    from persist_cache.store.put import PutResult
    from persist_cache.store.store import Store, default_store_path

__version__ = "0.1.0"

_HOME_OF = {
    "Fetch": "cache.stats",
    "PromptCache": "cache.prompt_cache",
    "PromptCacheStats": "cache.stats",
    "StoreStats": "store.catalog",
    "Entry": "entry",
    "Match": "entry",
    "MissReason": "entry",
    "Run": "entry",
    "Tier": "entry",
    "CorruptBlobError": "errors",
    "MissingDependencyError": "errors",
    "ModelError": "errors",
    "PersistCacheError": "errors",
    "StoreAccessError": "errors",
    "StoreBusyError": "errors",
    "StoreError": "errors",
    "StoreFormatError": "errors",
    "StoreFullError": "errors",
    "StoreInUseError": "errors",
    "StoreReadOnlyError": "errors",
    "UnsupportedCacheError": "errors",
    "Fingerprint": "fingerprint.value",
    "Identifier": "fingerprint.identifier",
    "Unidentified": "fingerprint.loads",
    "identify": "fingerprint.identifier",
    "Problem": "store.check",
    "PutResult": "store.put",
    "Source": "codec",
    "load": "prefill.loading",
    "Store": "store.store",
    "default_store_path": "store.store",
}

__all__ = [
    "CorruptBlobError",
    "Entry",
    "Fetch",
    "Fingerprint",
    "Identifier",
    "Match",
    "MissReason",
    "MissingDependencyError",
    "ModelError",
    "PersistCacheError",
    "Problem",
    "PromptCache",
    "PromptCacheStats",
    "PutResult",
    "Run",
    "Source",
    "Store",
    "StoreAccessError",
    "StoreBusyError",
    "StoreError",
    "StoreFormatError",
    "StoreFullError",
    "StoreInUseError",
    "StoreReadOnlyError",
    "StoreStats",
    "Tier",
    "Unidentified",
    "UnsupportedCacheError",
    "default_store_path",
    "identify",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
