"""What people wait for when they type a command, on a small store and on one with many entries.

Each command is a process of its own, started by the installed console script, with its output
going to a file as in a script: `list` then lays out every entry.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from typing import Any

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Spread, Table, fresh

SIZES = (50, 10_000)
START = "--version"
"""Python, click and our own name: what every command costs before it does anything."""
COMMANDS = (
    START,
    "list",
    "list --limit 100",
    "show ID",
    "evict --dry-run --tier assistant",
    "pin ID",
    "stats",
    "check",
)
_SYSTEMS = 20
_HEAVY = {"mlx", "mlx_lm", "transformers"}


def run(context: Context) -> Report:
    repetitions = context.pick(5, 25)
    found = []
    for entries in SIZES:
        with context.scratch() as scratch:
            store = str(scratch / "store")
            one = fresh(make_store, folder=store, num_entries=entries)
            cases: dict[str, Callable[[], float]] = {}
            imported: set[str] = set()
            for command in COMMANDS:
                call = [str(_script()), "--store", store, *command.replace("ID", one).split()]
                imported |= _imported_by(call)
                cases[command] = _Timed(call)
            samples = common.take_turns(cases, repetitions, f"commands: {entries:,} entries")
        found.append({"entries": entries, "s": samples, "imported": sorted(imported & _HEAVY)})
    values = {"cases": found}
    return Report("commands", "Commands as they are typed", values, _tables(found))


def make_store(folder: str, num_entries: int) -> str:
    """Conversations of three turns below a few system prompts; returns the id of one entry."""
    from persist_cache import Store
    from scripts.benchmarks.kv import FINGERPRINT
    from tests.bulk_store import conversations, fill

    with Store.open(folder, min_free_bytes=0) as store:
        fill(store, conversations(FINGERPRINT, num_entries, systems=_SYSTEMS))
        return store.entries()[0].id


def _script() -> Path:
    return Path(sys.executable).with_name("persist-cache")


def _imported_by(call: list[str]) -> set[str]:
    """Top-level modules that a command imports; it has to succeed."""
    command = [sys.executable, "-X", "importtime", *call]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = (line.rpartition("|")[2].strip() for line in done.stderr.splitlines())
    return {name.partition(".")[0] for name in lines}


class _Timed:
    def __init__(self, call: list[str]) -> None:
        self._call = call

    def __call__(self) -> float:
        started = time.perf_counter()
        subprocess.run(self._call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
        return time.perf_counter() - started


def _tables(cases: list[Any]) -> list[Table]:
    rows = []
    for command in COMMANDS:
        cells = [f"`{command}`"]
        for case in cases:
            spread = Spread.of(case["s"][command])
            ratios = list(map(truediv, case["s"][command], case["s"][START]))
            cells += [spread.show(1e3, 0), f"{Spread.of(ratios).median:.1f}"]
        rows.append(cells)
    columns = ["command"]
    for case in cases:
        columns += [f"{case['entries']:,} entries, ms", f"times `{START}`"]
    imported = sorted({name for case in cases for name in case["imported"]})
    said = f"They import {', '.join(imported)}" if imported else "None imports MLX or transformers"
    return [
        Table(
            "Milliseconds a command takes, start and end of its process included",
            columns,
            rows,
            f"Median (fastest–slowest) of {len(cases[0]['s'][START])}, taken in turns. {said}.",
        )
    ]
