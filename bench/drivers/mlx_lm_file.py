"""mlx-lm: `save_prompt_cache` after each turn, `load_prompt_cache`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

from bench.drivers import conversation


def store(
    place: Path, tokens: list[int], keys: Sequence[Any], values: Sequence[Any]
) -> Callable[[int], None]:
    def save(count: int) -> None:
        cache = []
        for key, value in zip(keys, values, strict=True):
            layer = KVCache()
            layer.update_and_fetch(key[:, :, :count], value[:, :, :count])
            cache.append(layer)
        mx.eval([layer.state for layer in cache])
        save_prompt_cache(str(place / "cache.safetensors"), cache)

    return save


def restore(place: Path, tokens: list[int]) -> tuple[list[Any], int]:
    cache = load_prompt_cache(str(place / "cache.safetensors"))
    mx.eval([layer.state for layer in cache])
    return cache, cache[0].offset


if __name__ == "__main__":
    conversation.run(store, restore)
