"""What looking, pulling and publishing need of one remote, as one value."""

from __future__ import annotations

from msgspec import Struct

from persist_cache.remote.breaker import Breaker
from persist_cache.remote.counting import Counters
from persist_cache.remote.keys import Keys
from persist_cache.remote.settings import RemoteSettings
from persist_cache.remote.transport import Failure, Transport, TransportError
from persist_cache.remote.trust import Seal
from persist_cache.store.store import Store


class Means(Struct, frozen=True):
    """One remote, as one process uses it for one store.

    Thread safety: may be shared between threads, as all that it has.

    Attributes:
        store: The local one.
        settings: Where the remote is, and what may be done with it.
        transport: Asks it.
        keys: Make the names.
        seal: Vouches for manifests.
        breaker: Says whether to ask it.
        counters: Of what happens.
    """

    store: Store
    settings: RemoteSettings
    transport: Transport
    keys: Keys
    seal: Seal
    breaker: Breaker
    counters: Counters

    def note_failure(self, error: TransportError, *, at_once: bool = False) -> None:
        """Count a request that failed, and have the breaker know.

        Args:
            error: What it met; an end of this process is no failure.
            at_once: Somebody waited for it: once is enough for the breaker.
        """
        if error.kind != Failure.CLOSED:
            self.counters.add(f"errors:{error.kind.value}")
            self.breaker.failed(str(error), at_once=at_once)
