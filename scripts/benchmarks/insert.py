"""What saving costs: the caller's time, the writer's throughput, memory, and a decode loop."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from scripts.benchmarks import common, kv, plots
from scripts.benchmarks.common import Context, Report, Spread, Table, fresh

NEW_TOKENS = 256
_DECODE_STEPS = 40
_LAZY_REPETITIONS = 3


def run(context: Context) -> Report:
    prefixes: list[int] = context.pick([1024, 2048, 4096], [1024, 2048, 4096, 8192, 16384])
    repetitions = context.pick(5, 9)
    shape = kv.LARGE
    swept = []
    for prefix in prefixes:
        common.say(f"insert: prefix of {prefix} tokens")
        with context.scratch() as scratch:
            place = str(scratch / "store")
            found = fresh(call_insert, folder=place, prefix=prefix, repetitions=repetitions)
        swept.append({"prefix": prefix, **found})
    batch = []
    for prefix in prefixes:
        common.say(f"insert: out of a batch, after {prefix} tokens")
        found = {}
        for way in ("rows", "whole"):
            with context.scratch() as scratch:
                place = str(scratch / "store")
                found[way] = fresh(
                    out_of_batch, folder=place, prefix=prefix, way=way, repetitions=repetitions
                )
        batch.append({"prefix": prefix, **found})
    with context.scratch() as scratch:
        common.say("insert: throughput")
        throughput = fresh(write_entry, folder=str(scratch), repetitions=context.pick(3, 7))
    decode = []
    for number in range(context.pick(1, 3)):
        common.say(f"insert: beside a decode loop, {number + 1}")
        with context.scratch() as scratch:
            decode.append(fresh(decode_beside, folder=str(scratch), blocks=context.pick(4, 6)))
    values = {
        "shape": shape.name,
        "bytes_per_token": shape.bytes_per_token,
        "new_tokens": NEW_TOKENS,
        "swept": swept,
        "batch_shape": kv.SMALL.name,
        "batch": batch,
        "throughput": throughput,
        "decode": decode,
    }
    return Report("insert", "Keeping a prompt", values, _tables(values))


def call_insert(folder: str, prefix: int, repetitions: int) -> dict[str, Any]:
    """Insert `prefix` tokens that are on disk plus `NEW_TOKENS` others, again and again."""
    import mlx.core as mx

    from persist_cache import PromptCache, Store

    mx.set_default_device(mx.cpu)
    total = prefix + NEW_TOKENS
    live = kv.make_cache(kv.LARGE, total, room=256)
    tokens = kv.prompt(prefix)
    owned: list[float] = []
    lazy: list[float] = []
    extra: list[int] = []
    with (
        Store.open(folder, min_free_bytes=0) as store,
        PromptCache(1, store=store, identify=kv.identify) as cache,
    ):

        def insert(samples: list[float], handed: list[Any], seed: int) -> None:
            new = tokens + kv.prompt(NEW_TOKENS, seed)
            started = time.perf_counter()
            cache.insert_cache("model", new, handed, cache_type="user")
            samples.append(time.perf_counter() - started)

        cache.insert_cache("model", tokens, _cut(live, prefix), cache_type="system")
        cache.flush()
        # One after the other: dropping the lazy ones' memory would be counted as the others' time.
        for number in range(repetitions + 1):
            before = _reset_peak()
            insert(owned, _cut(live, total), number + 1)
            cache.flush()
            extra.append(_peak() - before)
        written = cache.stats().written_bytes
        for number in range(min(repetitions, _LAZY_REPETITIONS) + 1):
            insert(lazy, _slices(live, total), number + 1001)
            cache.flush()
            cache.trim_to(n_sequences=0)
    # The first round pays for what is done once: threads, imports within functions.
    return {
        "owned_s": owned[1:],
        "lazy_s": lazy[1:],
        "extra_bytes": max(extra[1:]),
        "written_bytes": written,
    }


def _cut(live: list[Any], num_tokens: int) -> list[Any]:
    """A cache of its own that shares its buffers with `live` until one of them is written."""
    import copy

    cut = copy.deepcopy(live)
    for layer in cut:
        layer.offset = num_tokens
    return cut


def _slices(live: list[Any], num_tokens: int) -> list[Any]:
    """What the server hands over after a batch: unevaluated rows of a larger buffer."""
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache

    layers = []
    for layer in live:
        cut = KVCache()
        cut.keys = mx.contiguous(layer.keys[:, :, :num_tokens])
        cut.values = mx.contiguous(layer.values[:, :, :num_tokens])
        cut.offset = num_tokens
        layers.append(cut)
    return layers


def out_of_batch(folder: str, prefix: int, way: str, repetitions: int) -> dict[str, Any]:
    """Insert one of two sequences of a batch, whose first `prefix` tokens were inserted before.

    Args:
        folder: Of the store.
        prefix: Tokens of both sequences.
        way: How the sequence leaves the batch: `rows` as from the server's, `whole` as from
            mlx-lm's own.
        repetitions: Inserts that are timed.

    Returns:
        Seconds of the inserts, of single decoding steps of the batch with nothing beside them and
        right after an insert, and the peak of memory.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import BatchKVCache

    from persist_cache import PromptCache, Store, tensors

    mx.set_default_device(mx.cpu)
    batch = []
    for layer in kv.make_cache(kv.SMALL, prefix):
        merged = BatchKVCache.merge([layer, layer])
        mx.eval(merged.state)
        batch.append(merged)
    del layer, merged
    tokens = kv.prompt(prefix)

    def take() -> list[Any]:
        if way == "rows":
            return tensors.extract(batch, 0)
        return [layer.extract(0) for layer in batch]

    def append(num_tokens: int) -> float:
        started = time.perf_counter()
        for layer in batch:
            size, heads, _, dim = layer.keys.shape
            rows = mx.ones((size, heads, num_tokens, dim), layer.keys.dtype)
            layer.update_and_fetch(rows, rows)
        mx.eval([layer.state for layer in batch])
        return time.perf_counter() - started

    inserts: list[float] = []
    alone: list[float] = []
    after: list[float] = []
    extra: list[int] = []
    with (
        Store.open(folder, min_free_bytes=0) as store,
        PromptCache(1, store=store, identify=kv.identify) as cache,
    ):
        cache.insert_cache("model", tokens, take(), cache_type="system")
        cache.flush()
        for number in range(repetitions + 1):
            append(NEW_TOKENS)
            alone += [append(1) for _ in range(3)]
            for layer in batch:
                layer.trim(3)
            new = tokens + kv.prompt(NEW_TOKENS, number + 1)
            before = _reset_peak()
            started = time.perf_counter()
            cache.insert_cache("model", new, take(), cache_type="user")
            inserts.append(time.perf_counter() - started)
            after.append(append(1))
            extra.append(_peak() - before)
            cache.flush()
            for layer in batch:
                layer.trim(NEW_TOKENS + 1)
    return {
        "insert_s": inserts[1:],
        "step_alone_s": alone[3:],
        "step_after_s": after[1:],
        "extra_bytes": max(extra[1:]),
    }


def write_entry(folder: str, repetitions: int) -> dict[str, list[float]]:
    """Seconds to save 2,048 tokens durably, against one write and fsync of the same bytes."""
    import mlx.core as mx

    from persist_cache import Store, tensors

    mx.set_default_device(mx.cpu)
    num_tokens = 2048
    source = tensors.source(kv.make_cache(kv.LARGE, num_tokens), num_tokens)
    pieces = [piece for one in source.rows(0, num_tokens).tensors for piece in one.pieces]
    place = Path(folder)

    def ours() -> float:
        with Store.open(place / "store", min_free_bytes=0) as store:
            tokens = kv.prompt(num_tokens, seed=time.monotonic_ns())
            started = time.perf_counter()
            store.put(kv.FINGERPRINT, tokens, source, tier="system")
            seconds = time.perf_counter() - started
            store.evict([entry.id for entry in store.entries()])
        return seconds

    def raw() -> float:
        path = place / "raw"
        started = time.perf_counter()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        for start in range(0, len(pieces), 512):
            os.writev(fd, pieces[start : start + 512])
        os.fsync(fd)
        os.close(fd)
        seconds = time.perf_counter() - started
        path.unlink()
        return seconds

    ours()
    found = common.take_turns({"put": ours, "raw": raw}, repetitions)
    return {**found, "bytes": [float(num_tokens * kv.LARGE.bytes_per_token)]}


def decode_beside(folder: str, blocks: int) -> dict[str, list[float]]:
    """Seconds of single decoding steps, alone and while the writer saves 2,048 tokens at a time.

    The decoder is MLX at work on one thread: matrix products and attention over 1,024 tokens.
    """
    import mlx.core as mx

    from persist_cache import PromptCache, Store

    mx.set_default_device(mx.cpu)
    weights = [mx.random.normal((1024, 1024)) for _ in range(16)]
    past = [mx.random.normal((1, 8, 1024, 128)) for _ in range(16)]
    mx.eval(weights, past)

    def step() -> float:
        started = time.perf_counter()
        x = mx.ones((1, 1024))
        for weight, rows in zip(weights, past, strict=True):
            query = (x @ weight).reshape(1, 8, 1, 128)
            mixed = mx.fast.scaled_dot_product_attention(query, rows, rows, scale=0.1)
            x = mixed.reshape(1, 1024) / 32
        mx.eval(x)
        return time.perf_counter() - started

    saved = kv.make_cache(kv.LARGE, 2048)
    pieces = [memoryview(array).cast("B") for layer in saved for array in layer.state[:2]]
    alone: list[float] = []
    beside: list[float] = []
    control: list[float] = []

    def write_raw() -> None:
        for number in range(2):
            with open(Path(folder) / f"raw-{number}", "wb", buffering=0) as file:
                os.writev(file.fileno(), pieces)
                os.fsync(file.fileno())

    with (
        Store.open(Path(folder) / "store", min_free_bytes=0) as store,
        PromptCache(1, store=store, identify=kv.identify, queue_bytes=1 << 40) as cache,
    ):
        for _ in range(_DECODE_STEPS):
            step()
        for block in range(blocks):
            alone += [step() for _ in range(_DECODE_STEPS)]
            for number in range(2):
                new = kv.prompt(2048, seed=10 * block + number)
                cache.insert_cache("model", new, _cut(saved, 2048), cache_type="user")
            # Not `stats()`, which also reads the store: between the steps it slowed them down.
            while cache.queued_jobs:
                beside.append(step())
            store.evict([entry.id for entry in store.entries()])
            thread = threading.Thread(target=write_raw)
            thread.start()
            while thread.is_alive():
                control.append(step())
            thread.join()
    return {"alone_s": alone, "beside_s": beside, "control_s": control}


def _reset_peak() -> int:
    """Begin to measure the peak of resident memory anew; returns what is resident now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def decode_ratio(values: Any, beside: str = "beside_s") -> Spread:
    """Speed beside a writer over speed alone, of each process."""
    return Spread.of(
        [
            statistics.median(one["alone_s"]) / statistics.median(one[beside])
            for one in values["decode"]
        ]
    )


def write_ratio(values: Any) -> float:
    """Speed of a durable put over that of a raw write and fsync."""
    put, raw = (statistics.median(values["throughput"][name]) for name in ("put", "raw"))
    return float(raw / put)


def batch_growth(values: Any) -> float:
    """Time of an insert out of a batch after the longest prefix, over that after the shortest."""
    first, last = (statistics.median(values["batch"][at]["rows"]["insert_s"]) for at in (0, -1))
    return float(last / first)


def _tables(values: Any) -> list[Table]:
    called = Table(
        f"Milliseconds of `insert_cache` for {NEW_TOKENS} new tokens",
        ["tokens before", "entry, MiB", "evaluated cache", "lazy slices of a batch", "extra MiB"],
        [
            [
                f"{one['prefix']:,}",
                f"{(one['prefix'] + NEW_TOKENS) * values['bytes_per_token'] / 2**20:,.0f}",
                Spread.of(one["owned_s"]).show(1e3, 2),
                Spread.of(one["lazy_s"]).show(1e3),
                f"{one['extra_bytes'] / 2**20:.1f}",
            ]
            for one in values["swept"]
        ],
        f"KV of {values['shape']}; {NEW_TOKENS} tokens are "
        f"{NEW_TOKENS * values['bytes_per_token'] / 2**20:.0f} MiB. `evaluated cache`: what a "
        "generation loop hands over, a cache that owns its buffers. `lazy slices`: what "
        "mlx-lm's batches hand over; their copy out of the batch, which it leaves to the "
        "next request, is evaluated here. `extra MiB`: peak of resident memory until the bytes "
        "are on disk.",
    )
    out = Table(
        f"`insert_cache` out of a batch of two, {NEW_TOKENS} new tokens",
        [
            "tokens before",
            *("ms", "extra MiB", "next step, ms"),
            *("all rows, ms", "extra MiB", "next step, ms", "a step alone, ms"),
        ],
        [
            [
                f"{one['prefix']:,}",
                *(
                    text
                    for way in ("rows", "whole")
                    for text in (
                        Spread.of(one[way]["insert_s"]).show(1e3),
                        f"{one[way]['extra_bytes'] / 2**20:.0f}",
                        Spread.of(one[way]["step_after_s"]).show(1e3),
                    )
                ),
                Spread.of(one["rows"]["step_alone_s"]).show(1e3),
            ]
            for one in values["batch"]
        ],
        f"KV of {values['batch_shape']}. Each insert follows one of the tokens before. `all rows`: "
        "the same with what mlx-lm's own batch hands over. `extra MiB`: peak of resident memory "
        "until the next step has ended. `next step`: the batch writes one token for both "
        "sequences, right after the insert; no model is computed. After "
        f"{values['batch'][-1]['prefix']:,} tokens an insert takes {batch_growth(values):.1f} "
        f"times as long as after {values['batch'][0]['prefix']:,}.",
    )
    nbytes = values["throughput"]["bytes"][0]
    put, raw = (Spread.of(values["throughput"][name]) for name in ("put", "raw"))
    written = Table(
        "Saving 2,048 tokens durably",
        ["", "ms", "GB/s"],
        [
            ["`Store.put`", put.show(1e3, 0), f"{nbytes / put.median / 1e9:.2f}"],
            ["one raw write + fsync", raw.show(1e3, 0), f"{nbytes / raw.median / 1e9:.2f}"],
            ["ratio of speeds", f"{write_ratio(values):.2f}", ""],
        ],
    )
    beside = Table(
        "A decode loop beside the writer",
        ["speed alone = 1", "while our writer works", "while a thread writes raw files"],
        [
            [
                "median of the processes",
                decode_ratio(values).show(1, 2),
                decode_ratio(values, "control_s").show(1, 2),
            ]
        ],
        "Both write without a pause, which no conversation makes a writer do. What a bare thread "
        "with `write` and `fsync` of the same bytes costs is the machine's, not ours.",
    )
    return [called, out, written, beside]


def draw(said: Any) -> None:
    values = said["values"]
    xs = [one["prefix"] for one in values["swept"]]
    plots.lines(
        "insert",
        said,
        title=f"insert_cache: caller's time for {NEW_TOKENS} new tokens",
        x=f"tokens stored before ({values['shape']})",
        y="milliseconds (median)",
        series={
            "evaluated cache": (
                xs,
                [statistics.median(one["owned_s"]) * 1e3 for one in values["swept"]],
            ),
            "lazy slices of a batch": (
                xs,
                [statistics.median(one["lazy_s"]) * 1e3 for one in values["swept"]],
            ),
        },
        log_x=True,
        log_y=True,
    )
