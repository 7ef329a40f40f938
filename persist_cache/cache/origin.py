"""What caches that are inserted come from: the look-up that their computation began with."""

from __future__ import annotations

from dataclasses import dataclass

from persist_cache.cache.owners import Owner
from persist_cache.prefill.clock import Prefill


@dataclass(slots=True)
class Origin:
    """One request, as far as a cache needs to know it; empty until it is looked up.

    Make one for each request, and give it to its look-up and to each insert that follows. Without
    one, the look-up that an insert belongs to is searched among the latest ones by its tokens.

    Thread safety: used by one thread at a time.

    Attributes:
        owner: Whose KV it was looked up for.
        prefill: What computing it has cost so far.
        queued_tokens: How much of the prompt is on its way to the disk, or was found there by a
            save; 0 while nothing is to be written.
    """

    owner: Owner | None = None
    prefill: Prefill | None = None
    queued_tokens: int = 0
