"""mlx-lm: `save_prompt_cache` after each turn, `load_prompt_cache`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

from scripts.benchmarks.drivers import conversation
from scripts.benchmarks.drivers.conversation import Step


def store(
    place: Path, tokens: list[int], keys: Sequence[Any], values: Sequence[Any]
) -> tuple[Step, Step]:
    cache, compute = growing(keys, values)
    return compute, lambda count: save_prompt_cache(str(place / "cache.safetensors"), cache)


def growing(keys: Sequence[Any], values: Sequence[Any]) -> tuple[list[Any], Step]:
    """A cache as a model has it, and what appends the next turn to it."""
    cache = [KVCache() for _ in keys]

    def compute(count: int) -> None:
        for layer, key, value in zip(cache, keys, values, strict=True):
            turn = slice(layer.offset, count)
            layer.update_and_fetch(key[:, :, turn], value[:, :, turn])
        mx.eval([(layer.keys, layer.values) for layer in cache])

    return cache, compute


def restore(place: Path, tokens: list[int]) -> tuple[list[Any], int]:
    cache = load_prompt_cache(str(place / "cache.safetensors"))
    mx.eval([layer.state for layer in cache])
    return cache, cache[0].offset


if __name__ == "__main__":
    conversation.run(store, restore)
