"""What caches that are inserted come from: the look-up that their computation began with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Origin:
    """One request, as far as a cache needs to know it; empty until it is looked up.

    Make one for each request, and give it to its look-up and to each insert that follows. Without
    one, the look-up that an insert belongs to is searched among the latest ones by its tokens.

    Thread safety: used by one thread at a time.

    Attributes:
        owner: Whose KV it was looked up for (`cache.owners.Owner`); None before.
        prefill: What computing it has cost so far (`prefill.clock.Prefill`); None before.
        queued_tokens: How much of the prompt is on its way to the disk; 0 while nothing is to be
            written.
    """

    owner: Any = None
    prefill: Any = None
    queued_tokens: int = 0
