"""vllm-mlx: `MemoryAwarePrefixCache`, saved after each turn; its server saves at shutdown only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache
from vllm_mlx.memory_cache import MemoryAwarePrefixCache

from bench.drivers import conversation

MODEL = SimpleNamespace(args=SimpleNamespace(model_type="benchmark"))


def store(
    place: Path, tokens: list[int], keys: Sequence[Any], values: Sequence[Any]
) -> Callable[[int], None]:
    prefixes = MemoryAwarePrefixCache(MODEL)

    def save(count: int) -> None:
        cache = layers(keys, values, count)
        assert prefixes.store(tokens[:count], cache)
        assert prefixes.save_to_disk(str(place))

    return save


def layers(keys: Sequence[Any], values: Sequence[Any], count: int) -> list[Any]:
    cache = []
    for key, value in zip(keys, values, strict=True):
        layer = KVCache()
        layer.update_and_fetch(key[:, :, :count], value[:, :, :count])
        cache.append(layer)
    mx.eval([layer.state for layer in cache])
    return cache


def restore(place: Path, tokens: list[int]) -> tuple[list[Any], int]:
    prefixes = MemoryAwarePrefixCache(MODEL)
    prefixes.load_from_disk(str(place))
    cache, remaining = prefixes.fetch(tokens)
    assert cache is not None
    mx.eval([layer.state for layer in cache])
    return cache, len(tokens) - len(remaining)


if __name__ == "__main__":
    conversation.run(store, restore)
