"""`persist-cache bench agents` with the demo's model and mlx_lm.server beside it, twice.

The command says how its sessions vary; the second time shows whether that holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Table

TIMES = 2


def run(context: Context) -> Report:
    from persist_cache_cli.demo.model import smollm2
    from persist_cache_cli.demo.openblas import preload_env

    common.say("agents: the model")
    model = smollm2("float32")
    runs, tokens = context.pick((1, 1000), (5, 2000))
    command = [
        str(Path(sys.executable).with_name("persist-cache")),
        *("bench", "agents", "--model", str(model), "--stock", "--json"),
        *("--runs", str(runs), "--tokens", str(tokens)),
    ]
    env = os.environ | preload_env() | {"PERSIST_CACHE_CONFIG": ""}
    found = []
    for number in range(TIMES):
        common.say(f"agents: {number + 1} of {TIMES}")
        with context.scratch() as scratch:
            done = subprocess.run(
                command, env=env | {"TMPDIR": str(scratch)}, stdout=subprocess.PIPE, check=True
            )
        said = json.loads(done.stdout)
        # Nothing that names the machine or its owner.
        said["options"]["model"] = "SmolLM2-135M-Instruct, float32"
        found.append({name: said[name] for name in ("options", "summary", "samples")})
    values = {"runs": runs, "load": os.getloadavg()[0], "times": found}
    return Report("agents", "An agent's sessions, by the command", values, [_table(values)])


def _table(values: dict[str, Any]) -> Table:
    first, second = (time["summary"] for time in values["times"])
    rows, apart = [], []
    for one, again in zip(first, second, strict=True):
        seconds = one["first_s"], again["first_s"]
        rows.append(
            [
                f"{one['server']}: {one['way']}",
                *(_counts(one[name], again[name]) for name in ("prompt_tokens", "cached_tokens")),
                *(f"{median:.2f} ({low:.2f}–{high:.2f})" for median, low, high in seconds),
                *(_faster(row) for row in (one, again)),
            ]
        )
        if abs(seconds[0][0] - seconds[1][0]) > max(high - low for _, low, high in seconds):
            apart.append(f"{one['server']}: {one['way']}")
    note = (
        f"SmolLM2-135M-Instruct, float32; {values['runs']} sessions with words, stores and servers "
        f"of their own, and the same again. Seconds to the first token, and how many times sooner "
        f"than the cold request of the same session. Load of the machine at the end: "
        f"{values['load']:.1f}."
    )
    if values["runs"] > 1:
        note += (
            " The medians of the two times differ by no more than the larger spread of their row"
            + (f"; by more in: {'; '.join(apart)}." if apart else ".")
        )
    head = ["request", "tokens", "cached", "s", "s, again", "times sooner", "times sooner, again"]
    return Table("Seconds to the first token", head, rows, note)


def _counts(first: int, second: int) -> str:
    return f"{first:,}" if first == second else f"{first:,}, {second:,}"


def _faster(row: dict[str, Any]) -> str:
    median, low, high = row["faster"]
    if row["way"].endswith("cold"):
        return "–"
    return f"{low:.1f}–{high:.1f}" if row["is_range"] else f"{median:.1f} ({low:.1f}–{high:.1f})"
