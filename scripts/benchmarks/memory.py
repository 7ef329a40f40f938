"""The cache in memory against mlx-lm's: its trie, and a hit with the first token after it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from scripts.benchmarks import bulk, common, kv
from scripts.benchmarks.common import Context, Report, Spread, Table, fresh

HIT_TOKENS = 2300
"""264 MB of KV, and room for the next token without growing."""


def run(context: Context) -> Report:
    counts: list[int] = context.pick([100], [100, 1_000])
    rounds = context.pick(5, 20)
    tries = []
    for count in counts:
        common.say(f"memory: {count} entries")
        tries.append(
            {
                "entries": count,
                "ours": fresh(use_ours, num_entries=count, rounds=rounds),
                "upstream": fresh(use_upstream, num_entries=count, rounds=rounds),
            }
        )
    with context.scratch() as scratch:
        hits = common.take_turns(
            {
                "ours": partial(hit_ours, folder=str(scratch / "store")),
                "upstream": partial(fresh, hit_upstream),
            },
            context.pick(5, 9),
            "memory: hit",
        )
    values = {"tries": tries, "hits": hits}
    return Report("memory", "In memory", values, _tables(values))


def use_ours(num_entries: int, rounds: int) -> dict[str, Any]:
    from persist_cache.cache.trie import PromptTrie
    from persist_cache.tokens import TOKEN_BYTES, pack_tokens

    trie: PromptTrie[object] = PromptTrie()

    def add(tokens: list[int]) -> None:
        trie.add("model", pack_tokens(tokens), object())

    def search(tokens: list[int]) -> int:
        return trie.search("model", pack_tokens(tokens)).common_prefix

    return _use(num_entries, rounds, add, search) | {"token_bytes": TOKEN_BYTES}


def use_upstream(num_entries: int, rounds: int) -> dict[str, Any]:
    from mlx_lm.models.cache import PromptTrie

    common.limit_memory()
    trie: Any = PromptTrie()

    def add(tokens: list[int]) -> None:
        trie.add("model", tokens, object())

    def search(tokens: list[int]) -> int:
        return trie.search("model", tokens).common_prefix or 0

    return _use(num_entries, rounds, add, search)


def _use(
    num_entries: int,
    rounds: int,
    add: Callable[[list[int]], None],
    search: Callable[[list[int]], int],
) -> dict[str, Any]:
    """Fill a trie with conversations and search in it; the memory it took is counted apart."""
    import tracemalloc

    from persist_cache.tokens import unpack_tokens

    prompts = []
    seen: set[bytes] = set()
    for system, parts in bulk.conversations(num_entries):
        path = system
        for part in [b""] * (system not in seen) + parts:
            path += part
            prompts.append(path)
        seen.add(system)
    adding = []
    num_tokens = 0
    tracemalloc.start()
    for packed in prompts:
        tokens = unpack_tokens(packed)
        add(tokens)
        num_tokens += len(tokens)
    del tokens
    nbytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    for packed in prompts[-50:]:
        # Under another model: nothing of it is there yet but what was added just before.
        tokens = [token + 1 for token in unpack_tokens(packed)]
        started = time.perf_counter()
        add(tokens)
        adding.append(time.perf_counter() - started)
    found: dict[str, list[float]] = {}
    for kind, lists in bulk.queries(num_entries, 30_000, 5).items():
        samples = []
        for _ in range(rounds):
            for tokens in lists:
                started = time.perf_counter()
                search(tokens)
                samples.append(time.perf_counter() - started)
        found[kind] = samples
    return {
        "prompt_tokens": num_tokens,
        "new_tokens": sum(len(p) for p in seen) // 8
        + sum(len(p) for _, parts in bulk.conversations(num_entries) for p in parts) // 8,
        "trie_bytes": nbytes,
        "add_s": adding,
        "search_s": found,
    }


def hit_ours(folder: str) -> float:
    """A fresh process each time, with an empty store."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    return float(fresh(_hit_ours, folder=folder))


def _hit_ours(folder: str) -> float:
    """A cache in memory that is on disk, too: lent, and decoded on."""
    import mlx.core as mx

    from persist_cache import PromptCache, Store

    mx.set_default_device(mx.cpu)
    tokens = kv.prompt(HIT_TOKENS)
    with (
        Store.open(Path(folder), min_free_bytes=0) as store,
        PromptCache(store=store, identify=kv.identify, leave_tokens=1) as cache,
    ):
        live = kv.make_cache(kv.LARGE, HIT_TOKENS)
        cache.insert_cache("model", tokens, live, cache_type="user")
        del live
        cache.flush()
        return _hit(cache, tokens, "memory")


def hit_upstream() -> float:
    import mlx.core as mx
    from mlx_lm.models.cache import LRUPromptCache

    mx.set_default_device(mx.cpu)
    tokens = kv.prompt(HIT_TOKENS)
    cache: Any = LRUPromptCache()
    cache.insert_cache("model", tokens, kv.make_cache(kv.LARGE, HIT_TOKENS), cache_type="user")
    return _hit(cache, tokens, None)


def _hit(cache: Any, tokens: list[int], source: str | None) -> float:
    kv.append_token(kv.make_cache(kv.LARGE, 16))
    started = time.perf_counter()
    found, rest = cache.fetch_nearest_cache("model", [*tokens, 1])
    kv.append_token(found)
    seconds = time.perf_counter() - started
    assert len(rest) == 1
    assert source is None or cache.last_fetch.source == source
    return seconds


def hit_ratio(values: Any) -> float:
    """Our time over upstream's."""
    ours, upstream = (statistics.median(values["hits"][name]) for name in ("ours", "upstream"))
    return float(ours / upstream)


def _tables(values: Any) -> list[Table]:
    rows = []
    for case in values["tries"]:
        for name in ("ours", "upstream"):
            one = case[name]
            rows.append(
                [
                    f"{case['entries']:,}",
                    "persist-cache" if name == "ours" else "mlx-lm",
                    f"{statistics.median(one['add_s']) * 1e3:.2f}",
                    *(
                        f"{statistics.median(one['search_s'][kind]) * 1e3:.2f}"
                        for kind in ("hit", "partial", "miss")
                    ),
                    f"{one['trie_bytes'] / one['prompt_tokens']:.1f}",
                    f"{one['trie_bytes'] / one['new_tokens']:.1f}",
                ]
            )
    trie = Table(
        "Trie of prompts in memory",
        [
            "entries",
            "",
            "add, ms",
            "hit, 28k, ms",
            "partial, ms",
            "miss, ms",
            "bytes per prompt token",
            "bytes per distinct token",
        ],
        rows,
        "Every call begins with a list of integers. Ours keeps the whole key of each entry, 8 "
        "bytes a token; mlx-lm's has a dictionary for each token, which prompts share.",
    )
    ours, upstream = (Spread.of(values["hits"][name]) for name in ("ours", "upstream"))
    hit = Table(
        "A hit in memory and the next token, 264 MB of KV that is on disk already",
        ["", "ms"],
        [
            ["persist-cache lends its cache", ours.show(1e3)],
            ["mlx-lm copies it", upstream.show(1e3)],
            ["ratio", f"{hit_ratio(values):.3f}"],
        ],
    )
    return [trie, hit]
