"""persist-cache: `Store.put` and `Store.fetch`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import KVCache

from persist_cache import Fingerprint, Store, tensors
from scripts.benchmarks.drivers import conversation
from scripts.benchmarks.drivers.conversation import Step

MODEL = Fingerprint.from_fields({"model": "benchmark"})


def store(
    place: Path, tokens: list[int], keys: Sequence[Any], values: Sequence[Any]
) -> tuple[Step, Step]:
    cache = []
    for key, value in zip(keys, values, strict=True):
        layer = KVCache()
        layer.keys, layer.values, layer.offset = key, value, len(tokens)
        cache.append(layer)
    opened = Store.open(place, min_free_bytes=0)
    source = tensors.source(cache, len(tokens))

    def save(count: int) -> None:
        opened.put(MODEL, tokens[:count], source, tier="user")

    return conversation.nothing, save


def restore(place: Path, tokens: list[int]) -> tuple[list[Any], int]:
    with Store.open(place, min_free_bytes=0) as opened:
        found = opened.fetch(MODEL, tokens, tensors.restore)
    assert found is not None
    return found[0], found[1].num_tokens


if __name__ == "__main__":
    conversation.run(store, restore)
