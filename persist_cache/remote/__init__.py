"""A shared cold tier on an object store: many machines compute a prompt once.

Entries are published as immutable, content-addressed objects under keyed names, and looked up by
the digests of their beginnings. Everything that comes from there is verified before it enters the
store, through the store's own put. docs/format.md has the bytes, docs/sharing.md the set-up.
"""

from typing import TYPE_CHECKING, Any

from persist_cache.errors import RemoteError
from persist_cache.remote.settings import (
    RemoteSettings,
    check_settings,
    checked_url,
    read_settings,
    write_settings,
)
from persist_cache.remote.told import (
    COUNTERS,
    Brought,
    Probe,
    Published,
    PublishOutcome,
    RemoteStatus,
    Why,
)
from persist_cache.remote.trust import default_secret_path, make_publisher_key, make_secret

if TYPE_CHECKING:
    from persist_cache.remote.remote import Remote

__all__ = [
    "COUNTERS",
    "Brought",
    "Probe",
    "PublishOutcome",
    "Published",
    "Remote",
    "RemoteError",
    "RemoteSettings",
    "RemoteStatus",
    "Why",
    "check_settings",
    "checked_url",
    "default_secret_path",
    "make_publisher_key",
    "make_secret",
    "read_settings",
    "write_settings",
]


def __getattr__(name: str) -> Any:
    """Import `Remote` when it is asked for: what reads settings alone needs no event loop."""
    if name == "Remote":
        from persist_cache.remote.remote import Remote

        return Remote
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
