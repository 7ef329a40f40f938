"""KV caches of two well-known shapes, filled with numbers; what a model computes does not matter.

Imports MLX when called, so that benchmarks without it stay light.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persist_cache import Fingerprint, Store
from persist_cache.entry import Tier

TOKENS_IN_VOCABULARY = 150_000


@dataclass(frozen=True)
class Shape:
    """The KV of a model: `layers` times K and V of `(1, heads, T, dim)`, bfloat16."""

    name: str
    layers: int
    heads: int
    dim: int

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.heads * self.dim * 2 * 2


LARGE = Shape("28 layers × 8 heads × 128, bf16", 28, 8, 128)
SMALL = Shape("30 layers × 3 heads × 64, bf16", 30, 3, 64)

FINGERPRINT = Fingerprint.from_fields({"model": "benchmark"})


def identify(_: object) -> Fingerprint:
    """Every model is the same one here."""
    return FINGERPRINT


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    source = random.Random(seed)
    return [source.randrange(TOKENS_IN_VOCABULARY) for _ in range(num_tokens)]


def make_cache(shape: Shape, num_tokens: int, *, room: int = 0) -> list[Any]:
    """A plain KVCache a layer, as mlx-lm leaves it after a prefill of `num_tokens`.

    Args:
        shape: Its geometry.
        num_tokens: Tokens it holds.
        room: Unused rows, beyond those up to the next multiple of 256.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache

    mx.set_default_device(mx.cpu)
    rows = -(-num_tokens // 256) * 256 + room
    base = mx.random.normal((1, shape.heads, min(rows, 2048), shape.dim)).astype(mx.bfloat16)
    layers = []
    for index in range(shape.layers):
        layer = KVCache()
        pair = []
        for sign in (1, -1):
            array = mx.tile(base + sign * index / 8, (1, 1, -(-rows // base.shape[2]), 1))
            pair.append(mx.contiguous(array[:, :, :rows]))
        mx.eval(pair)
        layer.keys, layer.values = pair
        layer.offset = num_tokens
        layers.append(layer)
    mx.clear_cache()
    return layers


def append_token(cache: Sequence[Any]) -> None:
    """What the next decoding step does to each layer of a plain KV cache."""
    import mlx.core as mx

    arrays = []
    for layer in cache:
        _, heads, _, dim = layer.keys.shape
        row = mx.ones((1, heads, 1, dim), layer.keys.dtype)
        layer.update_and_fetch(row, row)
        # The slices that `update_and_fetch` returns are for attention, which is not measured.
        arrays += [layer.keys, layer.values]
    mx.eval(arrays)


def fill_store(
    path: Path, shape: Shape, num_tokens: int, num_runs: int, *, idle: bool = False
) -> dict[str, Any]:
    """Put one prompt into a new store, as a conversation of `num_runs` turns would.

    Args:
        path: Its folder.
        shape: Geometry of the KV.
        num_tokens: Tokens of the prompt.
        num_runs: Turns, of equal length.
        idle: Between the turns do what a server does while nobody asks it anything.

    Returns:
        `bytes`: of its KV.
    """
    from persist_cache import tensors

    source = tensors.source(make_cache(shape, num_tokens), num_tokens)
    tokens = prompt(num_tokens)
    with Store.open(path, min_free_bytes=0, run_tokens=num_tokens) as store:
        for turn in range(1, num_runs + 1):
            end = num_tokens * turn // num_runs
            tier = Tier.SYSTEM if turn == 1 else Tier.USER
            store.put(FINGERPRINT, tokens[:end], source, tier=tier)
            if idle:
                store.merge_runs()
    return {"bytes": num_tokens * shape.bytes_per_token}
