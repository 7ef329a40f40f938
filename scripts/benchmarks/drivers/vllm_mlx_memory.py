"""vllm-mlx: `MemoryAwarePrefixCache`, saved after each turn; its server saves at shutdown only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from vllm_mlx.memory_cache import MemoryAwarePrefixCache

from scripts.benchmarks.drivers import conversation
from scripts.benchmarks.drivers.conversation import Step
from scripts.benchmarks.drivers.mlx_lm_file import growing

MODEL = SimpleNamespace(args=SimpleNamespace(model_type="benchmark"))


def store(
    place: Path, tokens: list[int], keys: Sequence[Any], values: Sequence[Any]
) -> tuple[Step, Step]:
    prefixes = MemoryAwarePrefixCache(MODEL)
    cache, compute = growing(keys, values)

    def save(count: int) -> None:
        assert prefixes.store(tokens[:count], cache)
        assert prefixes.save_to_disk(str(place))

    return compute, save


def restore(place: Path, tokens: list[int]) -> tuple[list[Any], int]:
    prefixes = MemoryAwarePrefixCache(MODEL)
    prefixes.load_from_disk(str(place))
    cache, remaining = prefixes.fetch(tokens)
    assert cache is not None
    mx.eval([layer.state for layer in cache])
    return cache, len(tokens) - len(remaining)


if __name__ == "__main__":
    conversation.run(store, restore)
