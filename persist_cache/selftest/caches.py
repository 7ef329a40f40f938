"""Caches of every class: stored, restored in a new process, and continued, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from persist_cache import PromptCache
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.selftest import material, parts
from persist_cache.selftest.checks import Failed, Result, Setting

HEADS, DIM = 2, 64
_STEPS = 6
_DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}


@dataclass(frozen=True)
class Kind:
    """A kind of cache.

    Attributes:
        make: An empty one.
        lengths: Of the chunks that it is fed.
        dtype: Of its rows.
    """

    make: Callable[[], list[Any]]
    lengths: tuple[int, ...]
    dtype: str = "bf16"


def _layers(*makes: Callable[[], Any]) -> Callable[[], list[Any]]:
    return lambda: [make() for make in makes]


def _quantized(bits: int) -> Callable[[], Any]:
    return lambda: QuantizedKVCache(group_size=32, bits=bits)


def _listed() -> Any:
    return CacheList(KVCache(), RotatingKVCache(32))


KINDS = {
    "KVCache": Kind(_layers(KVCache, KVCache), (300, 1, 1)),
    "KVCache-f16": Kind(_layers(KVCache), (300, 1), "f16"),
    "KVCache-f32": Kind(_layers(KVCache), (70, 1), "f32"),
    "KVCache-boundary": Kind(_layers(KVCache), (256,)),
    "QuantizedKVCache-8": Kind(_layers(_quantized(8)), (300, 1)),
    "QuantizedKVCache-4-f16": Kind(_layers(_quantized(4)), (300, 1), "f16"),
    "ConcatenateKVCache": Kind(_layers(ConcatenateKVCache), (40, 1)),
    "RotatingKVCache": Kind(_layers(lambda: RotatingKVCache(64)), (20, 20)),
    "RotatingKVCache-wrapped": Kind(_layers(lambda: RotatingKVCache(32, 4)), (50, *[1] * 40)),
    "RotatingKVCache-f16": Kind(_layers(lambda: RotatingKVCache(32)), (20, 20, 17), "f16"),
    "ChunkedKVCache": Kind(_layers(lambda: ChunkedKVCache(16)), (40, 9, 1, 1)),
    "ArraysCache": Kind(_layers(lambda: ArraysCache(3), KVCache), (40, 1)),
    "CacheList": Kind(_layers(_listed, KVCache), (50, 1)),
}
"""By name, which says class, and type where it is not bf16."""


def caches_continue_bit_for_bit(setting: Setting) -> Result:
    """Store and continue caches, then restore and continue them in a new process; compare."""
    first = _ended("save", setting)
    second = _ended("continue_restored", setting)
    for name in KINDS:
        if second["sources"].get(name) != "disk":
            raise Failed(f"{name} was not restored from disk")
    differing = [name for name in KINDS if first["digests"][name] != second["digests"][name]]
    if differing:
        raise Failed(f"{', '.join(differing)}: a restored cache continued differently")
    return Result(
        f"{len(KINDS)} kinds of cache continued bit for bit on {first['device']}",
        {"kinds": len(KINDS), "steps": _STEPS, "device": first["device"]},
    )


def _ended(part: str, setting: Setting) -> Any:
    process = parts.start(f"caches:{part}", setting.folder)
    return json.loads(parts.ended(process, "a process with caches").splitlines()[-1])


def save(folder: Path) -> None:
    """Part: store a cache of each kind, and continue another one that was made alike."""
    digests = {}
    with material.opened(folder) as store, PromptCache(store=store, identify=identity) as cache:
        for seed, (name, kind) in enumerate(KINDS.items()):
            cache.insert_cache(name, _prompt(seed, kind), made(kind, seed), cache_type="user")
            digests[name] = continued(made(kind, seed), kind, seed)
        if not cache.flush(60):
            raise Failed("not everything was saved")
    print(json.dumps({"digests": digests, "device": str(mx.default_device())}))


def continue_restored(folder: Path) -> None:
    """Part: restore each and continue it."""
    digests, sources = {}, {}
    with material.opened(folder) as store, PromptCache(store=store, identify=identity) as cache:
        for seed, (name, kind) in enumerate(KINDS.items()):
            prompt = _prompt(seed, kind)
            restored, rest = cache.fetch_nearest_cache(name, [*prompt, 7])
            if restored is None or list(rest) != [7]:
                raise Failed(f"{name} was not found: {cache.last_fetch.reason}")
            sources[name] = cache.last_fetch.source
            digests[name] = continued(restored, kind, seed)
    print(json.dumps({"digests": digests, "sources": sources}))


def identity(model: Any) -> Fingerprint:
    """What the caches of a kind are stored under."""
    return Fingerprint.from_fields({"weights": f"selftest {model}"})


def _prompt(seed: int, kind: Kind) -> list[int]:
    return material.tokens(seed, sum(kind.lengths))


def made(kind: Kind, seed: int) -> list[Any]:
    """A cache of that kind, the same one for the same seed."""
    cache = kind.make()
    for step, length in enumerate(kind.lengths):
        mx.eval(fed(cache, kind, length, 1000 * seed + step))
    return cache


def continued(cache: list[Any], kind: Kind, seed: int) -> str:
    """A digest of what some more tokens see, and make of it."""
    digest = hashlib.sha256()
    for step in range(_STEPS):
        arrays = fed(cache, kind, 1, 1000 * seed + 500 + step)
        mx.eval(arrays)
        for array in arrays:
            digest.update(exact(array))
    return digest.hexdigest()


def exact(array: Any) -> bytes:
    """The bytes of an array, in row-major order."""
    array = mx.contiguous(array)
    mx.eval(array)
    return bytes(memoryview(array).cast("B")) if array.size else b""


def fed(cache: Sequence[Any], kind: Kind, length: int, seed: int) -> list[Any]:
    """Append random tokens as a model would; what attention, or a recurrence, makes of them."""
    dtype = _DTYPES[kind.dtype]
    keys_of = iter(mx.random.split(mx.random.key(seed), 64))
    out: list[Any] = []
    for layer in _leaves(cache):
        if isinstance(layer, ArraysCache):
            state = _random(next(keys_of), (1, HEADS, 4, DIM), mx.float32)
            layer[0] = _random(next(keys_of), (1, 3, DIM), dtype)
            layer[1] = state if layer[1] is None else layer[1] * 0.5 + state
            out += [layer[0], layer[1]]
            continue
        if isinstance(layer, ChunkedKVCache):
            layer.maybe_trim_front()
        shape = (1, HEADS, length, DIM)
        queries, keys, values = (_random(next(keys_of), shape, dtype) for _ in range(3))
        seen = layer.update_and_fetch(keys, values)
        out += [array for _, array in tree_flatten(seen)]
        out.append(
            scaled_dot_product_attention(queries, *seen, cache=layer, scale=DIM**-0.5, mask=None)
        )
    return out


def _leaves(cache: Sequence[Any]) -> Iterator[Any]:
    for layer in cache:
        if isinstance(layer, CacheList):
            yield from _leaves(layer.caches)
        else:
            yield layer


def _random(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    return mx.random.normal(shape, key=key).astype(dtype)
