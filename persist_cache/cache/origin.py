"""What caches that are inserted come from: the look-up that their computation began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from persist_cache.entry import Tier


@dataclass(slots=True)
class Origin:
    """One request, as far as a cache needs to know it; empty until it is looked up.

    Make one for each request, and give it to its look-up and to each insert that follows. Without
    one, the look-up that an insert belongs to is searched among the latest ones by its tokens.

    Thread safety: used by one thread at a time.

    Attributes:
        owner: Whose KV it was looked up for (`cache.owners.Owner`); None before.
        prefill: What computing it has cost so far (`prefill.clock.Prefill`); None before.
        counts_written: Whether `written_tokens` is asked for, which takes a look more.
        stored_tokens: Of the prompt, that prompts on the disk, or on their way there, had rows of
            when it was looked up.
        arrived: How many prompts had arrived on the disk then.
        keep_s: By tier, for how many seconds behind each use its client asks to keep what is stored
            of it.
        group: That its client counts it to, or "".
        salt: Digest of its salt (`fingerprint.value.salt_digest`), or "": it finds what was stored
            with the same one, and nothing else.
        keeps_nothing: What it computes is not kept, neither in memory nor on disk, and what it uses
            is not noted.
        memory_only: What it computes is kept in memory alone.
        written_tokens: Of the prompt, that were queued for the disk because it was computed.
    """

    owner: Any = None
    prefill: Any = None
    counts_written: bool = False
    stored_tokens: int = 0
    arrived: int = 0
    keep_s: Mapping[Tier, int] = field(default_factory=dict)
    group: str = ""
    salt: str = ""
    keeps_nothing: bool = False
    memory_only: bool = False
    written_tokens: int = 0
