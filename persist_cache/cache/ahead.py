"""What was read from the disk for a request that waits, before the generation thread has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from persist_cache.entry import Match


@dataclass(slots=True, eq=False)
class Ahead:
    """A cache that was read for one request.

    Thread safety: made by one thread, then used by another.

    Attributes:
        held: It, as memory holds it (`cache.live_caches.Held`).
        match: What was found on the disk.
        seconds: How long reading it took.
        is_used: The request it was read for has it.
        is_shared: Memory has it, for others as well.
    """

    held: Any
    match: Match
    seconds: float
    is_used: bool = False
    is_shared: bool = True
