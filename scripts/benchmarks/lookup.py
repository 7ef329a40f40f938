"""Finding a prompt among many, opening the index, and what the index takes on disk."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks import bulk, common, kv, plots
from scripts.benchmarks.common import Context, Report, Spread, Table, fresh

LENGTHS = (1_000, 10_000, 30_000)
KINDS = ("hit", "partial", "miss")
_QUERIES = 20


def run(context: Context) -> Report:
    entries: list[int] = context.pick([100, 10_000, 100_000], [100, 1_000, 10_000, 100_000])
    rounds = context.pick(10, 40)
    upstream_entries = [count for count in entries if count <= context.pick(100, 1_000)]
    scan_entries = [count for count in entries if count <= 1_000]
    found = []
    for count in entries:
        common.say(f"lookup: {count} entries")
        with context.scratch() as scratch:
            store = str(scratch / "store")
            size = fresh(make_store, folder=store, num_entries=count)
            opened = [fresh(open_store, folder=store) for _ in range(context.pick(5, 9))]
            ours = fresh(search_store, folder=store, num_entries=count, rounds=rounds)
        case = {"entries": count, "open_s": opened, "size": size, "ours": ours}
        if count in upstream_entries:
            case["upstream"] = fresh(search_upstream, num_entries=count, rounds=rounds)
        if count in scan_entries:
            case["scan"] = fresh(search_list, num_entries=count, rounds=rounds)
        found.append(case)
    return Report("lookup", "Looking up a prompt", {"cases": found}, _tables(found))


def make_store(folder: str, num_entries: int) -> dict[str, Any]:
    empty = Path(folder).with_name("empty")
    bulk.fill(empty, 0)
    num_tokens = bulk.fill(Path(folder), num_entries)
    sizes = [common.disk_bytes(place / "data.mdb") for place in (empty, Path(folder))]
    return {"tokens": num_tokens, "index_bytes": sizes[1] - sizes[0]}


def open_store(folder: str) -> float:
    from persist_cache import Store

    started = time.perf_counter()
    store = Store.open(folder, min_free_bytes=0)
    seconds = time.perf_counter() - started
    store.close()
    return seconds


def search_store(folder: str, num_entries: int, rounds: int) -> dict[str, Any]:
    """`Store.match`, with the prompt as a list and, apart, as bytes that were packed before."""
    from persist_cache import Store
    from persist_cache.tokens import pack_tokens

    before = _resident_bytes()
    with Store.open(folder, min_free_bytes=0) as store:

        def packed_first(tokens: Sequence[int]) -> Callable[[], int]:
            packed = pack_tokens(tokens)
            return lambda: store.match(kv.FINGERPRINT, packed).num_tokens

        def as_list(tokens: Sequence[int]) -> Callable[[], int]:
            return lambda: store.match(kv.FINGERPRINT, tokens).num_tokens

        found = {
            "list": _measure(num_entries, rounds, as_list),
            "packed": _measure(num_entries, rounds, packed_first),
        }
    return {**found, "resident_bytes": max(0, _resident_bytes() - before)}


def search_upstream(num_entries: int, rounds: int) -> dict[str, Any]:
    """mlx-lm's `PromptTrie`, which holds a dictionary a token."""
    from mlx_lm.models.cache import PromptTrie

    from persist_cache.tokens import unpack_tokens

    common.limit_memory()
    trie: Any = PromptTrie()
    started = time.perf_counter()
    tokens_below: dict[bytes, int] = {}
    for system, parts in bulk.conversations(num_entries):
        path = unpack_tokens(system)
        if system not in tokens_below:
            tokens_below[system] = len(path)
            trie.add("model", path, object())
        for part in parts:
            path = path + unpack_tokens(part)
            trie.add("model", path, object())
    built = time.perf_counter() - started

    def searched(tokens: Sequence[int]) -> Callable[[], int]:
        def search() -> int:
            match = trie.search("model", tokens)
            return max(match.common_prefix or 0, len(match.shorter or ()), len(match.exact or ()))

        return search

    return {"list": _measure(num_entries, max(1, rounds // 20), searched), "build_s": built}


def search_list(num_entries: int, rounds: int) -> dict[str, Any]:
    """All prompts in a list, each compared with the one looked for."""
    from persist_cache.tokens import common_prefix_tokens, pack_tokens

    stored: list[bytes] = []
    seen: set[bytes] = set()
    for system, parts in bulk.conversations(num_entries):
        path = system
        if system not in seen:
            seen.add(system)
            stored.append(path)
        for part in parts:
            path += part
            stored.append(path)

    def searched(tokens: Sequence[int]) -> Callable[[], int]:
        def search() -> int:
            packed = pack_tokens(tokens)
            return max(common_prefix_tokens(one, packed) for one in stored)

        return search

    return {"list": _measure(num_entries, max(1, rounds // 20), searched)}


def _measure(
    num_entries: int, rounds: int, prepare: Callable[[Sequence[int]], Callable[[], int]]
) -> dict[str, dict[str, list[float]]]:
    """By length and kind: median, 99th percentile, and tokens found."""
    found: dict[str, dict[str, list[float]]] = {}
    for length in LENGTHS:
        found[str(length)] = {}
        for kind, prompts in bulk.queries(num_entries, length, _QUERIES).items():
            searches = [prepare(tokens) for tokens in prompts]
            tokens = [search() for search in searches]
            samples = []
            for _ in range(rounds):
                for search in searches:
                    started = time.perf_counter()
                    search()
                    samples.append(time.perf_counter() - started)
            samples.sort()
            p99 = samples[min(len(samples) - 1, int(len(samples) * 0.99))]
            found[str(length)][kind] = [
                statistics.median(samples),
                p99,
                statistics.median(tokens),
                samples[0],
            ]
    return found


def _resident_bytes() -> int:
    import resource

    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def growth_exponent(cases: Sequence[Any], length: int, kind: str) -> float:
    """How the median of a packed look-up grows with the number of entries: 0 is not at all."""
    return common.slope(
        [case["entries"] for case in cases],
        [case["ours"]["packed"][str(length)][kind][0] for case in cases],
    )


def open_exponent(cases: Sequence[Any]) -> float:
    return common.slope(
        [case["entries"] for case in cases],
        [statistics.median(case["open_s"]) for case in cases],
    )


def _tables(cases: list[Any]) -> list[Table]:
    rows = []
    for case in cases:
        for kind in KINDS:
            cells = [f"{case['entries']:,}", kind]
            for length in LENGTHS:
                packed, with_list = (
                    case["ours"][how][str(length)][kind] for how in ("packed", "list")
                )
                cells.append(f"{packed[0] * 1e6:.0f} / {packed[1] * 1e6:.0f}")
                cells.append(f"{with_list[0] * 1e6:.0f}")
            cells += [_peer(case, "upstream", kind), _peer(case, "scan", kind)]
            rows.append(cells)
    columns = ["entries", "prompt"]
    for length in LENGTHS:
        columns += [f"{length // 1000}k: p50 / p99", "with packing"]
    columns += ["`PromptTrie`, 30k", "scan of a list, 30k"]
    looked = Table(
        "Microseconds a look-up",
        columns,
        rows,
        "Look-ups of packed prompts; `with packing` begins with a list of integers, as a request "
        "does. mlx-lm's trie and the scan begin with a list and keep all prompts in memory; "
        "they are left out where they would take gigabytes.",
    )
    opened = Table(
        "Open time and index size",
        ["entries", "open, ms", "index bytes per entry", "per token", "resident MiB after"],
        [
            [
                f"{case['entries']:,}",
                Spread.of(case["open_s"]).show(1e3),
                f"{case['size']['index_bytes'] / case['entries']:,.0f}",
                f"{case['size']['index_bytes'] / case['size']['tokens']:.1f}",
                f"{case['ours']['resident_bytes'] / 2**20:.1f}",
            ]
            for case in cases
        ],
        "Resident memory is the pages of the index that look-ups touched; the system may take "
        "them back.",
    )
    exponents = Table(
        "Growth with the number of entries: exponent of the best fit (0: none, 1: in proportion)",
        ["", *(f"{length // 1000}k {kind}" for length in LENGTHS for kind in KINDS), "open"],
        [
            [
                "exponent",
                *(f"{growth_exponent(cases, n, kind):.2f}" for n in LENGTHS for kind in KINDS),
                f"{open_exponent(cases):.2f}",
            ]
        ],
    )
    return [looked, opened, exponents]


def _peer(case: Any, name: str, kind: str) -> str:
    if name not in case:
        return "–"
    return f"{case[name]['list'][str(LENGTHS[-1])][kind][0] * 1e6:,.0f}"


def draw(said: Any) -> None:
    cases = said["values"]["cases"]
    longest = str(LENGTHS[-1])

    def points(name: str, how: str) -> tuple[list[float], list[float]]:
        having = [case for case in cases if name in case]
        return (
            [case["entries"] for case in having],
            [case[name][how][longest]["hit"][0] * 1e3 for case in having],
        )

    plots.lines(
        "lookup",
        said,
        title="Finding the next turn of a 28,000-token conversation",
        x="entries stored",
        y="milliseconds (median)",
        series={
            "persist-cache (on disk)": points("ours", "list"),
            "mlx-lm PromptTrie (in memory)": points("upstream", "list"),
            "scan of a list (in memory)": points("scan", "list"),
        },
        log_x=True,
        log_y=True,
    )
