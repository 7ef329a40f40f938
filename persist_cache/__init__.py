"""A prompt cache for mlx-lm that survives restarts.

`PromptCache` replaces `mlx_lm.models.cache.LRUPromptCache`; `Store` is the folder on disk behind
it. Importing this package loads neither MLX nor mlx-lm, and its own modules only when a name of
theirs is used, so that the command line starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persist_cache.cache.ahead import Ahead
    from persist_cache.cache.origin import Origin
    from persist_cache.cache.prompt_cache import KnownPrompt, PromptCache
    from persist_cache.cache.stats import Fetch, FromRemote, PromptCacheStats, RecentFetch
    from persist_cache.codec import (
        Blob,
        BlobInfo,
        Codec,
        LiveCaches,
        Payload,
        Source,
        Tensor,
        TensorInfo,
        Witness,
    )
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
    from persist_cache.fingerprint.identifier import Identifier, IdentifyOptions, identify
    from persist_cache.fingerprint.loads import Unidentified
    from persist_cache.fingerprint.value import FieldChange, Fingerprint
    from persist_cache.prefill.loading import load
    from persist_cache.store.budget import Usage
    from persist_cache.store.catalog import StoreStats
    from persist_cache.store.check import Problem
    from persist_cache.store.erase import Erased
    from persist_cache.store.put import PutResult
    from persist_cache.store.quotas import Used
    from persist_cache.store.scratch import Scratch
    from persist_cache.store.store import Store, default_store_path
    from persist_cache.store.trail import Trail
    from persist_cache.store.upkeep import Collected

__version__ = "0.1.0"

_HOME_OF = {
    "Ahead": "cache.ahead",
    "Origin": "cache.origin",
    "KnownPrompt": "cache.prompt_cache",
    "PromptCache": "cache.prompt_cache",
    "Fetch": "cache.stats",
    "FromRemote": "cache.stats",
    "PromptCacheStats": "cache.stats",
    "RecentFetch": "cache.stats",
    "Blob": "codec",
    "BlobInfo": "codec",
    "Codec": "codec",
    "LiveCaches": "codec",
    "Payload": "codec",
    "Source": "codec",
    "Tensor": "codec",
    "TensorInfo": "codec",
    "Witness": "codec",
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
    "Identifier": "fingerprint.identifier",
    "IdentifyOptions": "fingerprint.identifier",
    "identify": "fingerprint.identifier",
    "Unidentified": "fingerprint.loads",
    "FieldChange": "fingerprint.value",
    "Fingerprint": "fingerprint.value",
    "load": "prefill.loading",
    "Usage": "store.budget",
    "StoreStats": "store.catalog",
    "Problem": "store.check",
    "PutResult": "store.put",
    "Collected": "store.upkeep",
    "Erased": "store.erase",
    "Used": "store.quotas",
    "Scratch": "store.scratch",
    "Store": "store.store",
    "default_store_path": "store.store",
    "Trail": "store.trail",
}

__all__ = [
    "Ahead",
    "Blob",
    "BlobInfo",
    "Codec",
    "Collected",
    "CorruptBlobError",
    "Entry",
    "Erased",
    "Fetch",
    "FieldChange",
    "Fingerprint",
    "FromRemote",
    "Identifier",
    "IdentifyOptions",
    "KnownPrompt",
    "LiveCaches",
    "Match",
    "MissReason",
    "MissingDependencyError",
    "ModelError",
    "Origin",
    "Payload",
    "PersistCacheError",
    "Problem",
    "PromptCache",
    "PromptCacheStats",
    "PutResult",
    "RecentFetch",
    "Run",
    "Scratch",
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
    "Tensor",
    "TensorInfo",
    "Tier",
    "Trail",
    "Unidentified",
    "UnsupportedCacheError",
    "Usage",
    "Used",
    "Witness",
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
