"""Memory of a server whose model is let go when nobody asks, beside one that never had a model.

Resident memory and threads are the system's numbers for the process, so it needs Linux's /proc.
Of the resident memory, pages of program files are told apart: a server that lets its model go gives
those back that no other process uses, if its user may write them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import requests

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Spread, Table
from scripts.benchmarks.start import free_port, long_prompt, ours, running

UNLOADED_S = 600.0
MIB = 1 << 20


def run(context: Context) -> Report:
    from persist_cache_cli.demo.openblas import preload_env

    common.say("unload: the model")
    num_tokens, cycles = context.pick((200, 2), (2000, 50))
    # In a process of its own: pages of program files that this one uses as well would stay.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        model, prompt = other.submit(_prepared, num_tokens).result()
    env = os.environ | preload_env() | {"PERSIST_CACHE_CONFIG": ""}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    with context.scratch() as scratch:
        bare = _bare(model, scratch, env)
        found = _cycles(model, scratch, env, prompt, cycles)
    values = {
        "model": "SmolLM2-135M-Instruct, float32",
        "tokens": num_tokens,
        "load": os.getloadavg()[0],
        "bare_bytes": bare[0],
        "bare_own_bytes": bare[1],
        **found,
    }
    return Report("unload", "A model that nobody asks", values, [_table(values)])


def _prepared(num_tokens: int) -> tuple[Path, str]:
    """The model, and a prompt of so many of its tokens."""
    from persist_cache_cli.demo.model import smollm2

    model = smollm2("float32")
    return model, long_prompt(model, num_tokens)


def _bare(model: Path, scratch: Path, env: dict[str, str]) -> tuple[int, int]:
    """What `_resident` says of a server without a model that has answered for its health only."""
    command = ours(model, scratch / "bare")[:-2]  # all but --model
    port = free_port()
    with (
        (scratch / "bare.log").open("wb") as log,
        running([*command, "--port", str(port)], env, log) as process,
    ):
        _until(lambda: _health(port) is not None)
        return _resident(process.pid)


def _cycles(
    model: Path, scratch: Path, env: dict[str, str], prompt: str, cycles: int
) -> dict[str, Any]:
    """Ask, be idle, and ask again, as often as that."""
    port = free_port()
    command = [*ours(model, scratch / "store"), "--port", str(port), "--unload-after", "1s"]
    found: dict[str, Any] = {
        name: [] for name in ("before", "idle", "idle_own", "threads", "s", "texts")
    }
    with (scratch / "log").open("wb") as log, running(command, env, log) as process:
        _until(lambda: (_health(port) or {}).get("weights") == "loaded")
        for cycle in range(cycles):
            common.say(f"unload: {cycle + 1} of {cycles}")
            started = time.perf_counter()
            answer = requests.post(
                f"http://127.0.0.1:{port}/v1/completions",
                json={"prompt": prompt, "max_tokens": 4, "temperature": 0},
                timeout=600,
            ).json()
            found["s"].append(time.perf_counter() - started)
            found["texts"].append(answer["choices"][0]["text"])
            found["before"].append(_resident(process.pid)[0])
            _until(lambda: (_health(port) or {}).get("weights") == "unloaded")
            time.sleep(0.5)  # what it lets go of goes right behind that
            idle, own = _resident(process.pid)
            found["idle"].append(idle)
            found["idle_own"].append(own)
            found["threads"].append(len(os.listdir(f"/proc/{process.pid}/task")))
    texts = set(found.pop("texts"))
    assert len(texts) == 1, texts
    return found


def _health(port: int) -> Any:
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=60).json()
    except requests.RequestException:
        return None


def _until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + UNLOADED_S
    while not condition():
        assert time.monotonic() < give_up, "the server does not get there"
        time.sleep(0.1)


def _resident(pid: int) -> tuple[int, int]:
    """Bytes of a process in memory, and those of them that are not pages of files."""
    _, pages, of_files, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    size = os.sysconf("SC_PAGE_SIZE")
    return pages * size, (pages - of_files) * size


def _table(values: dict[str, Any]) -> Table:
    bare, bare_own = values["bare_bytes"], values["bare_own_bytes"]
    before, idle, own, seconds = (
        Spread.of(values[name]) for name in ("before", "idle", "idle_own", "s")
    )
    first, *later = values["s"]
    threads = values["threads"]
    rows = [
        ["a server without a model", f"{bare / MIB:.0f}", "1.00", f"{bare_own / MIB:.0f}"],
        [
            "with the model, after an answer",
            before.show(1 / MIB, 0),
            f"{before.median / bare:.2f}",
            "",
        ],
        ["idle", idle.show(1 / MIB, 0), f"{idle.median / bare:.2f}", own.show(1 / MIB, 0)],
    ]
    note = (
        f"{len(threads)} times the same prompt of {values['tokens']:,} tokens, each but the first "
        f"after the model was let go: {first:.2f} s cold, then {Spread.of(later).show(1, 2)} s, "
        f"the load of the model included. All answers were equal. When idle after the first, the "
        f"second and the last: {_at_ends(values['idle'], MIB)} MiB, {_at_ends(threads)} threads; "
        f"each cycle of the second half adds {_growth(values['idle']) / MIB:.2f} MiB. "
        f"Load of the machine: {values['load']:.1f}. Median of all answers: {seconds.median:.2f} s."
    )
    head = ["server", "MiB", "of the bare one", "of these no pages of files"]
    return Table("Resident memory", head, rows, note)


def _growth(samples: list[int]) -> float:
    """What a cycle of the second half adds, by the least-squares line."""
    later = samples[len(samples) // 2 :]
    return common.fit(range(len(later)), later)[1]


def _at_ends(samples: list[int], unit: int = 1) -> str:
    return ", ".join(f"{samples[place] / unit:.0f}" for place in (0, 1, -1))
