"""From files to a cache that can decode: against the same bytes read raw, and mlx-lm's own file."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from persist_cache.tokens import pack_tokens
from scripts.benchmarks import common, kv, plots
from scripts.benchmarks.common import Context, Report, Spread, Table, fresh

RUNS = (1, 4, 16, 64)
MERGED = "64 turns, merged"
"""As 64 runs, but with idle moments between the turns, as in a server's life."""
_PROFILE_LINES = 12


def run(context: Context) -> Report:
    sizes: list[int] = context.pick([2048], [512, 2048, 8192, 16384])
    shape = kv.LARGE
    warm = [
        _sweep(context, num_tokens, context.pick(3, 15 if num_tokens < 4096 else 9), cold=False)
        for num_tokens in sizes
    ]
    cold = [] if context.quick else [_sweep(context, 2048, 3, cold=True)]
    return Report(
        "restore",
        "Verified restore, ready to decode",
        {"shape": shape.name, "bytes_per_token": shape.bytes_per_token, "warm": warm, "cold": cold},
        [_times(warm, "files in the page cache"), _ratios(warm)]
        + [_times(cold, "page cache dropped before each reading") for _ in cold]
        + [_profile(sweep) for sweep in warm if sweep["num_tokens"] == 2048],
    )


def _sweep(context: Context, num_tokens: int, repetitions: int, *, cold: bool) -> dict[str, Any]:
    with context.scratch() as scratch:
        fresh(make_files, folder=str(scratch), num_tokens=num_tokens)
        cases: dict[str, Callable[[], Any]] = {
            "raw": partial(fresh, read_raw, folder=str(scratch), threads=1, cold=cold),
            "raw, 2 threads": partial(fresh, read_raw, folder=str(scratch), threads=2, cold=cold),
            "mlx-lm file": partial(fresh, load_file, folder=str(scratch), cold=cold),
        }
        for runs in RUNS:
            cases[f"{runs} runs" if runs > 1 else "1 run"] = partial(
                fresh,
                restore,
                store=str(scratch / f"runs-{runs}"),
                num_tokens=num_tokens,
                cold=cold,
            )
        cases[MERGED] = partial(
            fresh, restore, store=str(scratch / "merged"), num_tokens=num_tokens, cold=cold
        )
        title = f"restore {num_tokens}{', cold' if cold else ''}"
        found = common.take_turns(cases, repetitions, title)
        spent = fresh(profile, folder=str(scratch), num_tokens=num_tokens, runs=RUNS[-1])
    return {"num_tokens": num_tokens, "samples": found, "profile": spent}


def make_files(folder: str, num_tokens: int) -> None:
    """A store per number of runs, and mlx-lm's file, with the same KV."""
    from mlx_lm.models.cache import save_prompt_cache

    place = Path(folder)
    for runs in RUNS:
        kv.fill_store(place / f"runs-{runs}", kv.LARGE, num_tokens, runs)
    kv.fill_store(place / "merged", kv.LARGE, num_tokens, RUNS[-1], idle=True)
    save_prompt_cache(str(place / "mlx-lm.safetensors"), kv.make_cache(kv.LARGE, num_tokens))
    # First uses (threads, imports within functions) are paid with a small one.
    kv.fill_store(place / "small", kv.LARGE, 16, 1)
    save_prompt_cache(str(place / "small.safetensors"), kv.make_cache(kv.LARGE, 16))
    common.sync(place)


def read_raw(folder: str, threads: int, cold: bool) -> dict[str, float]:
    """Read the store's only blob into new memory; nothing is checked or put in place."""
    (blob,) = (Path(folder) / "runs-1" / "blobs").rglob("*.safetensors")
    if cold:
        common.drop_page_cache(blob)
    nbytes = blob.stat().st_size
    fd = os.open(blob, os.O_RDONLY)
    piece = -(-nbytes // (threads * 28)) if threads > 1 else min(nbytes, 1 << 30)
    starts = iter(range(0, nbytes, piece))
    kept: list[mmap.mmap] = []
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            memory = mmap.mmap(-1, min(piece, nbytes - start))
            if os.preadv(fd, [memory], start) != len(memory):
                raise OSError("short read")
            kept.append(memory)

    others = [threading.Thread(target=work) for _ in range(threads - 1)]
    cpu, started = time.process_time(), time.perf_counter()
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
    return {"s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}


def load_file(folder: str, cold: bool) -> dict[str, float]:
    """`mlx_lm.load_prompt_cache`, evaluated, and the first token after it."""
    import mlx.core as mx
    from mlx_lm.models.cache import load_prompt_cache

    mx.set_default_device(mx.cpu)
    small = load_prompt_cache(str(Path(folder) / "small.safetensors"))
    kv.append_token(small)
    path = Path(folder) / "mlx-lm.safetensors"
    if cold:
        common.drop_page_cache(path)
    cpu, started = time.process_time(), time.perf_counter()
    cache = load_prompt_cache(str(path))
    mx.eval([layer.state for layer in cache])
    loaded = time.perf_counter()
    kv.append_token(cache)
    ended = time.perf_counter()
    return {"s": loaded - started, "ready_s": ended - started, "cpu_s": time.process_time() - cpu}


def restore(store: str, num_tokens: int, cold: bool) -> dict[str, float]:
    """`Store.fetch`: look up, read, verify; and the first token after it."""
    import mlx.core as mx

    from persist_cache import Store, tensors

    mx.set_default_device(mx.cpu)
    path = Path(store)
    with Store.open(path.parent / "small", min_free_bytes=0) as opened:
        small = opened.fetch(kv.FINGERPRINT, kv.prompt(16), tensors.restore)
        assert small is not None
        kv.append_token(small[0])
    tokens = kv.prompt(num_tokens)
    with Store.open(path, min_free_bytes=0) as opened:
        if cold:
            common.drop_page_cache(path / "blobs")
        cpu, started = time.process_time(), time.perf_counter()
        found = opened.fetch(kv.FINGERPRINT, tokens, tensors.restore)
        loaded = time.perf_counter()
        assert found is not None
        assert found[1].num_tokens == num_tokens
        kv.append_token(found[0])
        ended = time.perf_counter()
    return {
        "s": loaded - started,
        "ready_s": ended - started,
        "cpu_s": time.process_time() - cpu,
        "runs": len(found[1].runs),
    }


def profile(folder: str, num_tokens: int, runs: int) -> list[tuple[str, int, float]]:
    """Where the time goes: function, calls, its own seconds; of a restore by one thread."""
    import cProfile
    import pstats

    import mlx.core as mx

    from persist_cache import Store, tensors
    from persist_cache.tensors import pool

    mx.set_default_device(mx.cpu)
    with Store.open(Path(folder) / f"runs-{runs}", min_free_bytes=0) as store:
        packed = pack_tokens(kv.prompt(num_tokens))
        work = cProfile.Profile()

        def restored(*found: Any) -> Any:
            # The pool's threads are not seen by the profiler of this one.
            with patch.object(pool, "run", lambda tasks, _: [task() for task in tasks]):
                return tensors.restore(*found)

        for _ in range(2):
            store.fetch(kv.FINGERPRINT, packed, restored)
        work.runcall(store.fetch, kv.FINGERPRINT, packed, restored)
    said: Any = pstats.Stats(work)
    lines = [
        (f"{Path(path).name}: {name}" if line else name.strip("<>{}"), calls, own)
        for (path, line, name), (_, calls, own, *_) in said.stats.items()
    ]
    return sorted(lines, key=lambda one: -one[2])[:_PROFILE_LINES]


def seconds(sweep: Any, case: str, field: str = "s") -> Spread:
    return Spread.of([sample[field] for sample in sweep["samples"][case]])


def raw_median(sweep: Any) -> float:
    """The limit: the faster of the two ways to read the bytes raw."""
    return min(seconds(sweep, "raw").median, seconds(sweep, "raw, 2 threads").median)


def _times(sweeps: list[Any], pages: str) -> Table:
    rows = []
    for sweep in sweeps:
        nbytes = sweep["num_tokens"] * kv.LARGE.bytes_per_token
        cells = [seconds(sweep, case).show(1e3, 0) for case in ("raw", "raw, 2 threads")]
        cells.append(seconds(sweep, "mlx-lm file", "ready_s").show(1e3, 0))
        for runs in RUNS:
            case = f"{runs} runs" if runs > 1 else "1 run"
            cells.append(seconds(sweep, case, "ready_s").show(1e3, 0))
        cells.append(seconds(sweep, MERGED, "ready_s").show(1e3, 0))
        rows.append([f"{sweep['num_tokens']:,}", f"{nbytes / 2**20:,.0f}", *cells])
    columns = ["tokens", "MiB", "raw", "raw, 2 threads", "mlx-lm file + 1 token"]
    columns += [f"{runs} run{'s' if runs > 1 else ''} + 1 token" for runs in RUNS]
    columns.append(f"{MERGED}, + 1 token")
    return Table(f"Milliseconds, {pages}", columns, rows, f"KV of {kv.LARGE.name}.")


def _ratios(sweeps: list[Any]) -> Table:
    rows = []
    for sweep in sweeps:
        one = seconds(sweep, "1 run")
        ready = seconds(sweep, "1 run", "ready_s").median
        file = seconds(sweep, "mlx-lm file", "ready_s").median
        many = [seconds(sweep, f"{runs} runs").median / one.median for runs in RUNS[1:]]
        files = sweep["samples"][MERGED][0]["runs"]
        rows.append(
            [
                f"{sweep['num_tokens']:,}",
                f"{raw_median(sweep) / one.median:.2f}",
                f"{ready / file:.2f}",
                *(f"{ratio:.2f}" for ratio in many),
                f"{seconds(sweep, MERGED).median / one.median:.2f} ({files} runs)",
            ]
        )
    columns = ["tokens", "speed of raw reading", "time of mlx-lm's file, + 1 token each"]
    columns += [f"{runs} runs : 1 run" for runs in RUNS[1:]]
    return Table("Ratios", [*columns, f"{MERGED} : 1 run"], rows)


def _profile(sweep: Any) -> Table:
    whole = seconds(sweep, f"{RUNS[-1]} runs").median * 1e3
    return Table(
        f"Where the time goes: {sweep['num_tokens']:,} tokens from {RUNS[-1]} runs, one thread",
        ["function", "calls", "own ms, under the profiler"],
        [[f"`{name}`", f"{calls:,}", f"{own * 1e3:.1f}"] for name, calls, own in sweep["profile"]],
        f"The profiler adds to what is called often; without it the whole took {whole:.0f} ms.",
    )


def draw(said: Any) -> None:
    sweeps = said["values"]["warm"]
    ready = {
        "1 run, verified": "1 run",
        "64 runs, verified": "64 runs",
        "64 turns, merged while idle": MERGED,
        "mlx-lm file": "mlx-lm file",
    }
    series = {"raw read": [raw_median(sweep) * 1e3 for sweep in sweeps]}
    for name, case in ready.items():
        series[name] = [seconds(sweep, case, "ready_s").median * 1e3 for sweep in sweeps]
    plots.bars(
        "restore",
        said,
        title=f"Restored and one token appended ({said['values']['shape']})",
        y="milliseconds (median), page cache warm",
        groups=[f"{sweep['num_tokens']:,} tokens" for sweep in sweeps],
        series=series,
        log_y=len(sweeps) > 1,
    )
