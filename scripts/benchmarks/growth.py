"""Bytes written, bytes on disk and files as conversations grow, against snapshots and blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.benchmarks import common, kv, plots
from scripts.benchmarks.common import Context, Report, Table, fresh

SYSTEM_TOKENS = 2_000
USER_TOKENS = 80
REPLY_TOKENS = 220
TURN_TOKENS = USER_TOKENS + REPLY_TOKENS
BLOCK_TOKENS = 256


def run(context: Context) -> Report:
    turns = context.pick(20, 50)
    conversations = context.pick(10, 100)
    with context.scratch() as scratch:
        common.say("growth: turns")
        large = fresh(talk, folder=str(scratch / "large"), layers=kv.LARGE.layers, turns=20)
    with context.scratch() as scratch:
        small = fresh(talk, folder=str(scratch / "small"), layers=kv.SMALL.layers, turns=turns)
    with context.scratch() as scratch:
        common.say("growth: conversations")
        many = fresh(start_many, folder=str(scratch / "many"), conversations=conversations)
    values = {"large": large, "turns": small, "conversations": many}
    return Report("growth", "Bytes as conversations grow", values, _tables(values))


def talk(folder: str, layers: int, turns: int) -> list[dict[str, Any]]:
    """One conversation, saved after each turn; what there is after each."""
    shape = kv.LARGE if layers == kv.LARGE.layers else kv.SMALL
    total = SYSTEM_TOKENS + turns * TURN_TOKENS
    tokens = kv.prompt(total)
    steps = []
    ends = [(SYSTEM_TOKENS, "system")]
    for turn in range(turns):
        start = SYSTEM_TOKENS + turn * TURN_TOKENS
        ends += [(start + USER_TOKENS, "user"), (start + TURN_TOKENS, "assistant")]
        steps.append(ends)
        ends = []
    with _Disk(Path(folder), shape, total) as disk:
        return [
            {"turn": turn, **disk.after([(tokens[:end], tier) for end, tier in ends])}
            for turn, ends in enumerate(steps, 1)
        ]


def start_many(folder: str, conversations: int) -> list[dict[str, Any]]:
    """Conversations of one turn each, all under one system prompt."""
    system = kv.prompt(SYSTEM_TOKENS)
    found = []
    with _Disk(Path(folder), kv.SMALL, SYSTEM_TOKENS + TURN_TOKENS) as disk:
        for number in range(1, conversations + 1):
            own = kv.prompt(TURN_TOKENS, seed=number)
            entries = [(system + own[:USER_TOKENS], "user"), (system + own, "assistant")]
            if number == 1:
                entries.insert(0, (system, "system"))
            found.append({"conversation": number, **disk.after(entries)})
    return found


class _Disk:
    """A store, and the same work as whole snapshots and as fixed blocks, by calculation."""

    def __init__(self, folder: Path, shape: kv.Shape, num_tokens: int) -> None:
        from persist_cache import Store, tensors

        self._folder = folder
        self._shape = shape
        self._store = Store.open(folder, min_free_bytes=0)
        self._source = tensors.source(kv.make_cache(shape, num_tokens), num_tokens)
        self._written = 0
        self._live_tokens = 0
        self._snapshot_bytes = 0
        self._snapshots: dict[tuple[int, ...], int] = {}
        self._blocks: set[tuple[int, ...]] = set()

    def __enter__(self) -> _Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def after(self, entries: list[tuple[list[int], str]]) -> dict[str, Any]:
        """Put the entries of one turn, and count."""
        per_token = self._shape.bytes_per_token
        for tokens, tier in entries:
            put = self._store.put(kv.FINGERPRINT, tokens, self._source, tier=tier)
            self._written += put.nbytes
            self._live_tokens += put.new_tokens
            self._blocks.update(_block_ends(tokens))
        # A snapshot is written once a turn, in place of the last one of its conversation.
        tokens, _ = entries[-1]
        self._snapshot_bytes += len(tokens) * per_token
        self._snapshots[tuple(tokens[: SYSTEM_TOKENS + 1])] = len(tokens)
        return {
            "new_kv_bytes": self._live_tokens * per_token,
            "written": self._written,
            "on_disk": common.disk_bytes(self._folder),
            "blob_bytes": common.disk_bytes(self._folder / "blobs"),
            "files": sum(1 for _ in self._blobs()),
            "snapshot_written": self._snapshot_bytes,
            "snapshot_on_disk": sum(self._snapshots.values()) * per_token,
            "snapshot_files": len(self._snapshots),
            "block_written": len(self._blocks) * BLOCK_TOKENS * per_token,
            "block_files": len(self._blocks),
            "block_lost_tokens": len(tokens) % BLOCK_TOKENS,
        }

    def _blobs(self) -> Iterator[Path]:
        return (self._folder / "blobs").rglob("*.safetensors")


def _block_ends(tokens: list[int]) -> Iterator[tuple[int, ...]]:
    """A name for each full block: where it ends, and a few tokens that tell its path."""
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        own = tokens[SYSTEM_TOKENS] if end > SYSTEM_TOKENS else -1
        yield (end, own)


def written_ratio(steps: Any, turns: int) -> float:
    """Bytes written over bytes of the new tokens' KV, after `turns`."""
    return float(steps[turns - 1]["written"] / steps[turns - 1]["new_kv_bytes"])


def disk_ratio(steps: Any) -> float:
    """Bytes on disk, index included, over bytes of live KV, at the end."""
    return float(steps[-1]["on_disk"] / steps[-1]["new_kv_bytes"])


def _tables(values: Any) -> list[Table]:
    def rows(steps: Any, key: str) -> list[list[str]]:
        shown = sorted({1, 5, 10, 20, 50, 100} & {step[key] for step in steps})
        return [
            [
                f"{step[key]}",
                f"{step['new_kv_bytes'] / 2**20:,.0f}",
                f"{step['written'] / step['new_kv_bytes']:.3f}",
                f"{step['snapshot_written'] / step['new_kv_bytes']:.2f}",
                f"{step['block_written'] / step['new_kv_bytes']:.3f}",
                f"{step['on_disk'] / step['new_kv_bytes']:.3f}",
                f"{step['snapshot_on_disk'] / step['new_kv_bytes']:.2f}",
                f"{step['files']} / {step['snapshot_files']} / {step['block_files']}",
                f"{step['block_lost_tokens']}",
            ]
            for step in steps
            if step[key] in shown
        ]

    columns = [
        "new KV, MiB",
        "written",
        "snapshots",
        "blocks",
        "on disk",
        "snapshots",
        "files: ours / snapshots / blocks",
        "tokens that blocks lose",
    ]
    note = (
        f"In multiples of the new tokens' KV. A system prompt of {SYSTEM_TOKENS:,} tokens, then "
        f"turns of {USER_TOKENS} + {REPLY_TOKENS}. `on disk`: all files and folders, the index "
        f"included. Snapshots (one file a conversation, written anew each turn) and blocks of "
        f"{BLOCK_TOKENS} tokens (the last, partial one is not kept) are calculated, without any "
        "header or index."
    )
    return [
        Table(f"Turns, {kv.LARGE.name}", ["turns", *columns], rows(values["large"], "turn"), note),
        Table(f"Turns, {kv.SMALL.name}", ["turns", *columns], rows(values["turns"], "turn")),
        Table(
            f"Conversations under one system prompt, {kv.SMALL.name}",
            ["conversations", *columns],
            rows(values["conversations"], "conversation"),
        ),
    ]


def draw(said: Any) -> None:
    steps = said["values"]["turns"]
    xs = [step["turn"] for step in steps]

    def mib(name: str) -> list[float]:
        return [step[name] / 2**20 for step in steps]

    plots.lines(
        "growth",
        said,
        title=f"Bytes written in one conversation ({kv.SMALL.name})",
        x=f"turns of {TURN_TOKENS} tokens after a system prompt of {SYSTEM_TOKENS:,}",
        y="MiB written",
        series={
            "a whole snapshot each turn": (xs, mib("snapshot_written")),
            f"blocks of {BLOCK_TOKENS} tokens": (xs, mib("block_written")),
            "persist-cache": (xs, mib("written")),
        },
    )
