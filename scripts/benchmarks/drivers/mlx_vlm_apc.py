"""mlx-vlm's automatic prefix caching: `APCManager` over a `DiskBlockStore`, as its server uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_vlm.apc import APCManager, DiskBlockStore

from scripts.benchmarks.drivers import conversation
from scripts.benchmarks.drivers.conversation import Step


def store(
    place: Path, tokens: list[int], keys: Sequence[Any], values: Sequence[Any]
) -> tuple[Step, Step]:
    disk = DiskBlockStore(place, namespace="benchmark")
    manager = APCManager(disk=disk)

    def save(count: int) -> None:
        blocks = manager.store_kv_blocks(
            tokens[:count],
            [key[:, :, :count] for key in keys],
            [value[:, :, :count] for value in values],
        )
        manager.release(blocks)
        disk.flush()

    return conversation.nothing, save


def restore(place: Path, tokens: list[int]) -> tuple[list[Any], int]:
    manager = APCManager(disk=DiskBlockStore(place, namespace="benchmark"))
    cache, count = manager.lookup_prefix_disk_cache(tokens)
    assert cache is not None
    mx.eval([(layer.keys, layer.values) for layer in cache])
    return cache, count


if __name__ == "__main__":
    conversation.run(store, restore)
