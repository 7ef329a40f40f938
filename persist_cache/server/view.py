"""What the admin API says of a running server, as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from persist_cache.entry import Tier

if TYPE_CHECKING:
    from persist_cache.cache.stats import PromptCacheStats


def server_json(stats: PromptCacheStats, *, max_size: int, max_bytes: int) -> dict[str, Any]:
    """What a server's cache did since it was started.

    Args:
        stats: Its counters.
        max_size: Caches that memory may hold.
        max_bytes: Bytes that memory may hold.
    """
    return {
        "memory": {
            "tiers": [
                {
                    "tier": tier.label,
                    "entries": stats.memory.get(tier.label, {}).get("n_sequences", 0),
                    "bytes": stats.memory.get(tier.label, {}).get("n_bytes", 0),
                }
                for tier in reversed(Tier)
            ],
            "max_entries": max_size,
            # A limit nobody set is larger than any memory, and than what JavaScript can count.
            "max_bytes": max_bytes if max_bytes < 1 << 53 else None,
        },
        "hits": {source: stats.hits.get(source, 0) for source in ("memory", "disk")},
        "misses": sum(stats.misses.values()),
        "miss_reasons": dict(stats.misses),
        "partial_reasons": dict(stats.partial),
        "tokens_saved": {source: stats.tokens.get(source, 0) for source in ("memory", "disk")},
        "tokens_asked": stats.asked,
        "restore_s": stats.restore_s,
        "restored_bytes": stats.restored_bytes,
        "read_ahead_bytes": stats.read_ahead_bytes,
        "saves": stats.saves,
        "written_bytes": stats.written_bytes,
        "queued_jobs": stats.queued_jobs,
        "queued_bytes": stats.queued_bytes,
        "problems": dict(stats.problems),
        "disk_off": stats.disk_off,
    }
