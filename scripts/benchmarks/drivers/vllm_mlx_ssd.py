"""vllm-mlx's SSD tier, spilled to after each turn; its server spills what memory evicts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from vllm_mlx.memory_cache import MemoryAwarePrefixCache
from vllm_mlx.scheduler import Scheduler
from vllm_mlx.ssd_cache import SSDCacheConfig, SSDCacheTier

from scripts.benchmarks.drivers import conversation
from scripts.benchmarks.drivers.conversation import Step
from scripts.benchmarks.drivers.mlx_lm_file import growing
from scripts.benchmarks.drivers.vllm_mlx_memory import MODEL


def store(
    place: Path, tokens: list[int], keys: Sequence[Any], values: Sequence[Any]
) -> tuple[Step, Step]:
    tier = _open(place)
    # It is given what memory evicts, which was cut to its length and copied when it was stored.
    prefixes = MemoryAwarePrefixCache(MODEL)
    cache, grow = growing(keys, values)
    entries: list[Any] = []

    def compute(count: int) -> None:
        grow(count)
        entries[:] = [prefixes.prepare_store(tokens[:count], cache)]

    def save(count: int) -> None:
        before, entry = tier.get_stats()["spill_count"], entries[0]
        assert tier.enqueue_spill(entry.tokens, entry.cache, entry.memory_bytes)
        while tier.get_stats()["spill_count"] == before:
            time.sleep(0.001)

    return compute, save


def restore(place: Path, tokens: list[int]) -> tuple[list[Any], int]:
    tier = _open(place)
    prefixes = MemoryAwarePrefixCache(MODEL)
    prefixes.set_ssd_tier(tier)
    found = prefixes.check_ssd(tokens)
    assert found is not None
    read = tier.async_promote(
        found["matched_key"], prefixes.try_reserve_memory, prefixes.release_reserved_memory
    )
    # What `Scheduler.promote_from_ssd` does with it; that itself wants a whole scheduler.
    cache = Scheduler._reconstruct_ssd_layers(None, asyncio.run(read))
    mx.eval([(layer.keys, layer.values) for layer in cache])
    return cache, found["matched_tokens"]


def _open(place: Path) -> Any:
    """As `Scheduler.ensure_ssd_tier`."""
    tier = SSDCacheTier(SSDCacheConfig(cache_dir=str(place)))
    tier.start_writer()
    tier.reconcile()
    return tier


if __name__ == "__main__":
    conversation.run(store, restore)
