"""A ticket for each request of a server: what the cache had for it when it left the queue.

The thread that answers makes the ticket, the generation thread notes the first look on it, and the
header and the usage of the answer say what it says, whatever the cache is asked for afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.cache.stats import Fetch
from persist_cache.store.trail import Trail

Part = Literal["", "prompt", "system"]


class Ticket:
    """One request, from its arrival to its answer.

    Thread safety: the generation thread calls `looked` and `settle`; any thread may `wait`, and
    read `fetch` after that.

    Attributes:
        part: What a request of our own leaves in the cache; "" for one of a client's, which is
            counted and leaves all of it.
        system_tokens: Length of the prompt's system part; known once it is tokenized.
        in_batch: It is computed in a batch, which copies the cache that it begins with.
        fetch: What the first look found; None before, and for a request that failed before.
        trail: The prompt's way through the store's index, for all looks of the request.
    """

    def __init__(self, part: Part = "") -> None:
        self.part: Part = part
        self.system_tokens = 0
        self.in_batch = False
        self.fetch: Fetch | None = None
        self.trail = Trail()
        self._settled = threading.Event()

    def __reduce__(self) -> tuple[type[Ticket], tuple[Part]]:
        # The ranks of a distributed group send each other their requests.
        return Ticket, (self.part,)

    def looked(self, fetch: Fetch) -> None:
        """Note what the cache had. Only the first look counts."""
        if self.fetch is None:
            self.fetch = fetch
        self._settled.set()

    def settle(self) -> None:
        """Let go of who waits: if there was no look yet, there will be none."""
        self._settled.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the first look; False when it is not known in time whether there is one."""
        return self._settled.wait(timeout_s)


class Desk(Protocol):
    """Who knows which request is being served: a server's generator."""

    def now_serving(self) -> Ticket: ...

    def complete(
        self, ticket: Ticket, model: Hashable, tokens: Sequence[int], cache: Any, rest: Any, /
    ) -> tuple[Any | None, Sequence[int]]: ...


class TicketedCache:
    """A `PromptCache` as mlx-lm's generation loop uses it, which tells tickets what it finds.

    Thread safety: for the generation thread alone.
    """

    def __init__(self, cache: PromptCache, desk: Desk) -> None:
        self._cache = cache
        self._desk = desk

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    def stats_by_type(self) -> Mapping[str, Mapping[str, int]]:
        return self._cache.stats_by_type()

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        self._cache.trim_to(n_sequences=n_sequences, n_bytes=n_bytes)

    def insert_cache(
        self, model: Hashable, tokens: Sequence[int], cache: Any, *, cache_type: str = "assistant"
    ) -> None:
        self._cache.insert_cache(model, tokens, cache, cache_type=cache_type)

    def fetch_nearest_cache(
        self, model: Hashable, tokens: Sequence[int]
    ) -> tuple[Any | None, Sequence[int]]:
        """The one look of a request; what is computed beforehand is no part of what it found."""
        ticket = self._desk.now_serving()
        cache, rest, fetch = self._cache.look_up(
            model,
            tokens,
            counted=not ticket.part,
            trail=ticket.trail,
            to_copy=ticket.in_batch,
        )
        ticket.trail.forget()
        ticket.looked(fetch)
        return self._desk.complete(ticket, model, tokens, cache, rest)


def cache_header(fetch: Fetch) -> str:
    """The value of `x-persist-cache`: `disk|memory|miss; tokens=N`, and why it is no more."""
    value = f"{fetch.source}; tokens={fetch.num_tokens}"
    if fetch.reason:
        reason = (
            fetch.reason.replace("→", "->").encode("ascii", "replace").decode().replace('"', "'")
        )
        value += f'; reason="{" ".join(reason.split())[:200]}"'
    return value
