"""Memory that the device and our threads share: written and read beside each other."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from persist_cache import PromptCache
from persist_cache.selftest import caches, material, parts
from persist_cache.selftest.checks import Failed, Result, Setting
from persist_cache.tensors import empty, pool

MIB = 1 << 20
_PIECE_BYTES = 4096
_TASK_BYTES = 64 * 1024
_KIND = caches.KINDS["KVCache"]
_LAYERS = 4


def writer_reads_while_the_device_decodes(setting: Setting) -> Result:
    """Decode while the writer reads other caches' memory; neither may disturb the other."""
    count, length = setting.some(40), 512 if setting.quick else 2048
    alone, _ = _decoded(lambda: False, 60)
    made = {number: _large(number, length) for number in range(count)}
    wanted = {number: _contents(layers) for number, layers in made.items()}
    with material.opened(setting.folder) as store:
        with PromptCache(store=store, identify=caches.identity) as cache:
            for number in range(count):
                prompt = material.tokens(number, length)
                cache.insert_cache("writer", prompt, made.pop(number), cache_type="user")
            beside, steps = _decoded(lambda: cache.stats().queued_jobs > 0, 60)
            if not cache.flush(120):
                raise Failed("the writer did not end")
            written = cache.stats().written_bytes
        if beside != alone:
            raise Failed("what was decoded beside the writer differs from what is decoded alone")
        problems = store.check(read_data=True)
        if problems:
            raise Failed(f"what was written beside decoding is damaged: {problems[0].message}")
    process = parts.start("device:print_digests", setting.folder, count=count, length=length)
    found = json.loads(parts.ended(process, "a process that restores").splitlines()[-1])
    for number, arrays in wanted.items():
        if found[number] != _digest(arrays):
            raise Failed("what was written beside decoding is not what was in memory")
    return Result(
        f"{count} caches, {written / MIB:,.0f} MiB, were written during {steps} decoded steps",
        {"caches": count, "written_bytes": written, "steps_beside": steps},
    )


def print_digests(folder: Path, count: int, length: int) -> None:
    """Part: restore what was written, and print a digest of each."""
    found = []
    with (
        material.opened(folder) as store,
        PromptCache(store=store, identify=caches.identity) as cache,
    ):
        for number in range(count):
            prompt = material.tokens(number, length)
            restored, _ = cache.fetch_nearest_cache("writer", [*prompt, 7])
            found.append(_digest(_contents(restored or [])))
    print(json.dumps(found))


def _contents(layers: list[Any]) -> list[bytes]:
    """The bytes of all rows."""
    return [
        caches.exact(array[..., : layer.offset, :])
        for layer in layers
        for array in (layer.keys, layer.values)
    ]


def _digest(arrays: list[bytes]) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(b"".join(arrays))


def _large(seed: int, length: int) -> list[Any]:
    """A cache of random rows, for which no attention was computed."""
    shape = (1, caches.HEADS, length, caches.DIM)
    keys = iter(mx.random.split(mx.random.key(seed), 2 * _LAYERS))
    layers = [KVCache() for _ in range(_LAYERS)]
    for layer in layers:
        drawn = (mx.random.normal(shape, mx.bfloat16, key=next(keys)) for _ in range(2))
        mx.eval(layer.update_and_fetch(*drawn))
    return layers


def _decoded(goes_on: Any, least: int) -> tuple[str, int]:
    """Decode at least so many steps; a digest of the first of them, and how many there were."""
    cache = caches.made(_KIND, 77)
    outs: list[bytes] = []
    steps = 0
    while steps < least or (goes_on() and steps < 100_000):
        arrays = caches.fed(cache, _KIND, 1, 9000 + steps)
        mx.eval(arrays)
        if steps < least:
            outs += [caches.exact(array) for array in arrays]
        steps += 1
    return _digest(outs), steps


def filled_arrays_reach_the_device(setting: Setting) -> Result:
    """Have threads fill arrays whose memory nobody wrote, and sum them on the device."""
    rounds = setting.some(200)
    started = time.monotonic()
    for number in range(rounds):
        nbytes = (1 + number % 8) * (MIB // 2)
        specs = {
            "a": ("U32", (nbytes // 4,), nbytes),
            "b": ("BF16", (nbytes // 2,), nbytes),
        }
        content = os.urandom(_PIECE_BYTES)
        arrays = _filled(specs, content)
        for name, array in arrays.items():
            if _sum(array if name == "a" else array.view(mx.uint32)) != _sum_of(content, nbytes):
                raise Failed(f"the device saw other bytes than threads wrote ({specs[name][0]})")
    device = str(mx.default_device())
    return Result(
        f"{rounds} rounds of two arrays were right on {device}, "
        f"{(time.monotonic() - started) / rounds * 1000:.1f} ms each",
        {"rounds": rounds, "device": device},
    )


def _filled(
    specs: Mapping[str, tuple[str, tuple[int, ...], int]], content: bytes
) -> dict[str, Any]:
    """Arrays made as a restore makes them, filled by threads with copies of `content`."""
    arrays: dict[str, Any] = {}
    pool.run_mlx(lambda: arrays.update(empty.empty(specs)))
    tasks = [
        _filler(memoryview(array).cast("B")[start : start + _TASK_BYTES], content)
        for array in arrays.values()
        for start in range(0, array.nbytes, _TASK_BYTES)
    ]
    pool.run(tasks, 4)
    return arrays


def _filler(memory: memoryview, content: bytes) -> Callable[[], None]:
    def fill() -> None:
        for place in range(0, len(memory), len(content)):
            memory[place : place + len(content)] = content

    return fill


def _sum(words: Any) -> int:
    """The sum of 32-bit numbers, computed on the device without rounding."""
    total = words.astype(mx.uint64).sum()
    mx.eval(total)
    return int(total.item())


def _sum_of(content: bytes, nbytes: int) -> int:
    """The same of so many bytes made of copies of `content`, computed without it."""
    once: int = sum(number for (number,) in struct.iter_unpack("=I", content))
    return once * (nbytes // len(content))
