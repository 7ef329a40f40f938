"""A conversation of 16 turns with KV of 28 layers × 8 heads × 128, bf16; and how it is measured."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LAYERS, HEADS, DIM = 28, 8, 128
TURNS, TURN_TOKENS = 16, 128
NUM_TOKENS = TURNS * TURN_TOKENS
BYTES_PER_TOKEN = LAYERS * HEADS * DIM * 2 * 2

Step = Callable[[int], None]
Store = Callable[[Path, list[int], Sequence[Any], Sequence[Any]], tuple[Step, Step]]
Restore = Callable[[Path, list[int]], tuple[list[Any], int]]


def tokens() -> list[int]:
    source = random.Random(0)
    return [source.randrange(150_000) for _ in range(NUM_TOKENS)]


def rows() -> tuple[list[Any], list[Any]]:
    """Keys and values of each layer, `(1, HEADS, NUM_TOKENS, DIM)`; the same in every process."""
    import mlx.core as mx

    mx.random.seed(0)
    base = mx.random.normal((1, HEADS, NUM_TOKENS, DIM)).astype(mx.bfloat16)
    keys = [base + layer for layer in range(LAYERS)]
    values = [base - layer for layer in range(LAYERS)]
    mx.eval(keys, values)
    return keys, values


def run(store: Store, restore: Restore) -> None:
    """Do what the command line says: store all turns, or restore them in a new process.

    Args:
        store: Opens the store; returns two functions that are called with a number of tokens after
            each turn. The first brings the cache to that length, as a model would, off the clock;
            the second saves it, durably as far as the peer does that.
        restore: Returns the cache that it found and its tokens. The next token is added here, and
            what was restored is compared with what was stored, after the clock has stopped.
    """
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    _, what, folder = sys.argv
    place = Path(folder)
    if what == "store":
        keys, values = rows()
        say(save_turns(place, *store(place, tokens(), keys, values), BYTES_PER_TOKEN))
        return
    started = time.perf_counter()
    cache, found = restore(place, tokens())
    loaded = time.perf_counter()
    row = mx.ones((1, HEADS, 1, DIM), mx.bfloat16)
    for layer in cache:
        layer.update_and_fetch(row, row)
    mx.eval([(layer.keys, layer.values) for layer in cache])
    ended = time.perf_counter()
    for layer, key, value in zip(cache, *rows(), strict=True):
        assert mx.array_equal(layer.keys[:, :, :found], key[:, :, :found])
        assert mx.array_equal(layer.values[:, :, :found], value[:, :, :found])
    say({"s": loaded - started, "ready_s": ended - started, "tokens": found})


def save_turns(place: Path, compute: Step, save: Step, bytes_per_token: int) -> dict[str, Any]:
    """Compute and save each turn; only saving is measured."""
    seconds, written = 0.0, 0
    for turn in range(1, TURNS + 1):
        compute(turn * TURN_TOKENS)
        before, started = _written(), time.perf_counter()
        save(turn * TURN_TOKENS)
        seconds += time.perf_counter() - started
        written += _written() - before
    return {
        "s": seconds,
        "kv_bytes": NUM_TOKENS * bytes_per_token,
        "written": written,
        "on_disk": sum(one.lstat().st_blocks * 512 for one in place.rglob("*")),
        "files": sum(one.is_file() for one in place.rglob("*")),
    }


def nothing(count: int) -> None:
    """For a peer that is given slices of the rows."""


def say(found: dict[str, Any]) -> None:
    print()
    print(json.dumps(found))


def _written() -> int:
    """Bytes this process has handed to write calls; Linux only."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))
