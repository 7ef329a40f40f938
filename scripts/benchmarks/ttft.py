"""Seconds to the first token on a real model: cold, from memory, and from disk after a restart."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from scripts.benchmarks import common, kv, plots
from scripts.benchmarks.common import Context, Report, Spread, Table

QUESTION = "\nUser: What is the capital of France?\nAssistant:"
CASES = ("cold", "memory", "disk")


def run(context: Context) -> Report:
    from persist_cache_cli.demo.model import smollm2
    from persist_cache_cli.demo.openblas import find_openblas, preload_env

    lengths: list[int] = context.pick([250, 2000], [250, 500, 1000, 2000])
    common.say("ttft: the model")
    model = str(smollm2("float32"))
    env = preload_env()
    found = []
    for length in lengths:
        with context.scratch() as scratch:
            arguments = {"model": model, "folder": str(scratch / "store"), "length": length}
            job = partial(common.run_python, "scripts.benchmarks.ttft", env=env)
            repetitions = 1 if context.quick else (3 if length < 2000 else 2)
            common.say(f"ttft: {length} tokens, cold")
            first = job("before_restart", arguments={**arguments, "repetitions": repetitions})
            disk = [job("after_restart", arguments=arguments) for _ in range(3)]
        found.append(
            {
                "length": length,
                **first,
                "disk": [one["s"] for one in disk],
                "restored_s": [one["restored_s"] for one in disk],
            }
        )
    values = {
        "model": "SmolLM2-135M-Instruct, float32",
        "openblas": find_openblas() is not None,
        "question_tokens": found[0]["question_tokens"],
        "cases": found,
    }
    return Report("ttft", "Time to first token", values, _tables(values))


def before_restart(model: str, folder: str, length: int, repetitions: int) -> dict[str, Any]:
    """Compute a system prompt and the first token after a question; ask again from memory."""
    session = _Session(model, length)
    cold, memory = [], []
    from persist_cache import PromptCache, Store
    from persist_cache.prefill.run import new_cache, prefill, snapshot

    with Store.open(folder, min_free_bytes=0) as store:
        for number in range(repetitions):
            on_disk = store if number == repetitions - 1 else None
            with PromptCache(store=on_disk, identify=kv.identify, leave_tokens=1) as cache:
                started = time.perf_counter()
                live = new_cache(session.model)
                prefill(session.model, live, session.system)
                kept = snapshot(live)
                session.first_token(live, session.question)
                cold.append(time.perf_counter() - started)
                cache.insert_cache("model", session.system, kept, cache_type="system")
                del live, kept
                for _ in range(3):
                    seconds, source, _ = session.ask(cache)
                    assert source == "memory"
                    memory.append(seconds)
    return {"cold": cold, "memory": memory, "question_tokens": len(session.question)}


def after_restart(model: str, folder: str, length: int) -> dict[str, float]:
    """Ask in a process that has computed nothing yet."""
    session = _Session(model, length)
    from persist_cache import PromptCache, Store

    with (
        Store.open(Path(folder), min_free_bytes=0) as store,
        PromptCache(store=store, identify=kv.identify, leave_tokens=1) as cache,
    ):
        seconds, source, restored_s = session.ask(cache)
    assert source == "disk"
    return {"s": seconds, "restored_s": restored_s}


class _Session:
    """The model, and a prompt whose first `length` tokens are shared by all conversations."""

    def __init__(self, model: str, length: int) -> None:
        from persist_cache.prefill.loading import load_model
        from persist_cache_cli.demo.prompt import system_text

        self.model, tokenizer = load_model(model)
        text = tokenizer.encode(system_text())
        self.system = (text * (length // len(text) + 1))[:length]
        self.question = tokenizer.encode(QUESTION)
        # The weights are read when they are first used; in every process before it is measured.
        from persist_cache.prefill.run import new_cache

        self.first_token(new_cache(self.model), self.question)

    def ask(self, cache: Any) -> tuple[float, str, float]:
        """Seconds to the first token of an answer, where the prompt was found, seconds for that."""
        started = time.perf_counter()
        live, rest = cache.fetch_nearest_cache("model", [*self.system, *self.question])
        restored = time.perf_counter()
        assert len(rest) == len(self.question)
        self.first_token(live, rest)
        ended = time.perf_counter()
        return ended - started, cache.last_fetch.source, restored - started

    def first_token(self, live: list[Any], tokens: list[int]) -> int:
        import mlx.core as mx

        logits = self.model(mx.array([list(tokens)]), cache=live)
        token: Any = mx.argmax(logits[0, -1]).item()
        return int(token)


def ratio(case: Any) -> float:
    """Cold over disk after a restart."""
    return float(statistics.median(case["cold"]) / statistics.median(case["disk"]))


def break_even(values: Any) -> float:
    """Tokens from which on reading the disk is faster than computing, by the lines' crossing."""
    xs = [float(case["length"]) for case in values["cases"]]
    cold = common.fit(xs, [statistics.median(case["cold"]) for case in values["cases"]])
    disk = common.fit(xs, [statistics.median(case["disk"]) for case in values["cases"]])
    return max(0.0, (disk[0] - cold[0]) / (cold[1] - disk[1]))


def _tables(values: Any) -> list[Table]:
    rows = []
    for case in values["cases"]:
        rows.append(
            [
                f"{case['length']:,}",
                Spread.of(case["cold"]).show(1, 2),
                Spread.of(case["memory"]).show(1e3, 0),
                Spread.of(case["disk"]).show(1e3, 0),
                Spread.of(case["restored_s"]).show(1e3, 0),
                f"{ratio(case):.0f}",
            ]
        )
    return [
        Table(
            f"{values['model']}, {'with' if values['openblas'] else 'without'} OpenBLAS",
            [
                "system tokens",
                "cold, s",
                "memory, ms",
                "disk after restart, ms",
                "of that restoring, ms",
                "cold : disk",
            ],
            rows,
            f"A system prompt, then a question of {values['question_tokens']} tokens that is "
            f"always computed. Reading the disk pays from about {break_even(values):.0f} tokens "
            "on. Files are in the page cache; loading the model is not counted.",
        )
    ]


def draw(said: Any) -> None:
    cases = said["values"]["cases"]
    xs = [case["length"] for case in cases]

    def medians(name: str) -> list[float]:
        return [statistics.median(case[name]) for case in cases]

    plots.lines(
        "ttft",
        said,
        title=f"Time to first token, {said['values']['model']}",
        x="tokens in the system prompt",
        y="seconds (median)",
        series={
            "cold": (xs, medians("cold")),
            "from disk, after a restart": (xs, medians("disk")),
            "from memory": (xs, medians("memory")),
        },
        log_x=True,
        log_y=True,
    )
