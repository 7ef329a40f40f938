"""Requests that come while their prompt, or most of it, is computed for another one.

Real servers and real connections; tokens are counted at the model's call. Beside the server as it
is stands the same one whose requests wait for nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Table
from tests.computed import CountedServer
from tests.loops import words

WITH, WITHOUT = "waiting", "waiting for nobody"
ONE, AT_ONCE, STAGGERED, MIXED, LEFT = (
    "one",
    "four alike at once",
    "four alike, staggered",
    "eight for four prompts that share 90 %",
    "four alike, the first one's client leaves",
)
CASES = (ONE, AT_ONCE, STAGGERED, MIXED, LEFT)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "plain",
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 8192,
        },
    ),
    "gemma3": (
        "sliding",
        {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "max_position_embeddings": 8192,
        },
    ),
    "qwen3_next": ("hybrid", {"max_position_embeddings": 8192}),
}
LENGTHS = {"llama": 3000, "gemma3": 3000, "qwen3_next": 1500}
STEP = 256
_TIMEOUT_S = 600.0


class _WaitsForNobody(CountedServer):
    module = "scripts.benchmarks.flight"


def run(context: Context) -> Report:
    from persist_cache_cli.demo.openblas import preload_env
    from tests.torture.tiny import KINDS, write_model

    os.environ.update(preload_env())
    found = []
    for name in context.pick(("llama",), tuple(MODELS)):
        cache, changes = MODELS[name]
        with context.scratch() as scratch, contextlib.ExitStack() as stack:
            model = write_model(scratch / "model", KINDS[cache], 1, **changes)
            servers = {
                way: stack.enter_context(
                    kind(
                        model,
                        scratch / kind.__name__,
                        scratch / "logs",
                        flags=("--prefill-step-size", str(STEP)),
                        min_free_bytes=0,
                    )
                )
                for way, kind in ((WITH, CountedServer), (WITHOUT, _WaitsForNobody))
            }
            found.append(_measure(name, servers, context.pick(1, 3)))
    return Report("flight", "Nothing is computed twice at once", {"cases": found}, _tables(found))


def _measure(name: str, servers: dict[str, CountedServer], repeats: int) -> dict[str, Any]:
    clients = {way: _Clients(server, LENGTHS[name]) for way, server in servers.items()}
    for one in clients.values():
        one.send([words(1, 20)])
    samples: dict[str, dict[str, list[dict[str, float]]]] = {
        way: {case: [] for case in CASES} for way in servers
    }
    for number in range(repeats):
        for case in CASES:
            for way, one in clients.items():
                if number and way == WITHOUT:
                    continue  # it takes long, and is only there for comparison
                common.say(f"flight: {name}, {case}, {way}, {number + 1} of {repeats}")
                samples[way][case].append(one.measure(case))
    return {"model": name, "tokens": LENGTHS[name], "samples": samples}


class _Clients:
    """Those who ask one server; each measurement has prompts that are new to it."""

    def __init__(self, server: CountedServer, length: int) -> None:
        self._server = server
        self._length = length
        self._seed = 0
        self._one_s = 0.0
        self._url = ("127.0.0.1", server.port)

    def measure(self, case: str) -> dict[str, float]:
        """Seconds from the first request to the last answer, and tokens computed / distinct."""
        self._seed += 1
        prompt = self._words(0, self._length)
        self._server.prefilled()
        started = time.perf_counter()
        distinct = self._length
        if case == ONE:
            self.send([prompt])
        elif case == AT_ONCE:
            self.send([prompt] * 4)
        elif case == STAGGERED:
            self.send([prompt] * 4, self._one_s / 6)
        elif case == MIXED:
            shared = self._length * 9 // 10
            rest = self._length - shared
            head = self._words(0, shared)
            prompts = [f"{head} {self._words(tail, rest)}" for tail in range(1, 5)]
            self.send(prompts * 2)
            distinct = shared + 4 * rest
        elif case == LEFT:
            self._leave(prompt, after_s=self._one_s / 4)
            self.send([prompt] * 3)
        seconds = time.perf_counter() - started
        if case == ONE:
            self._one_s = seconds
        computed = sum(map(len, self._server.prefilled()))
        return {"seconds": seconds, "computed": computed / distinct}

    def send(self, prompts: Sequence[str], pause_s: float = 0.0) -> None:
        """Ask for each, one after `pause_s` behind the other, and wait for all answers."""

        def ask(number: int) -> None:
            time.sleep(number * pause_s)
            body = {"messages": [{"role": "user", "content": prompts[number]}], "max_tokens": 1}
            answer = self._server.request(
                "POST", "/v1/chat/completions", json=body, timeout=_TIMEOUT_S
            )
            assert answer.status_code == 200, answer.text

        with ThreadPoolExecutor(len(prompts)) as threads:
            list(threads.map(ask, range(len(prompts))))

    def _leave(self, prompt: str, after_s: float) -> None:
        """Ask, and close the connection before there is an answer."""
        body = json.dumps({"messages": [{"role": "user", "content": prompt}], "max_tokens": 1})
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(self._url) as connection:
            connection.sendall((head + body).encode())
            time.sleep(after_s)

    def _words(self, part: int, count: int) -> str:
        """Words that no other measurement, and no other part of this one, begins with."""
        start = f"w{self._seed % 80} w{self._seed // 80} w{part}"
        return f"{start} {words(self._seed * 7 + part, count - 3)}"


def ratio(case: Any, way: str, name: str) -> float:
    """Seconds of a case against those of one request, the median over the repetitions."""
    samples = case["samples"][way]
    pairs = zip(samples[name], samples[ONE], strict=True)
    return float(statistics.median(one["seconds"] / alone["seconds"] for one, alone in pairs))


def computed(case: Any, way: str, name: str) -> float:
    """Tokens computed for each distinct one, at most."""
    return max(float(one["computed"]) for one in case["samples"][way][name])


def _tables(cases: Sequence[Any]) -> list[Table]:
    show: dict[str, Callable[[Any, str, str], float]] = {"time": ratio, "computed": computed}
    rows = [
        [f"{case['model']}, {name}"]
        + [f"{of(case, way, name):.2f}" for of in show.values() for way in (WITH, WITHOUT)]
        for case in cases
        for name in CASES
    ]
    columns = ["requests", *(f"{what}, {way}" for what in show for way in (WITH, WITHOUT))]
    lengths = ", ".join(f"{case['model']} {case['tokens']:,}" for case in cases)
    return [
        Table(
            "From the first request to the last answer, against one request alone; tokens computed "
            "/ distinct tokens",
            columns,
            rows,
            f"Prompts of so many tokens, of which nothing is known: {lengths}. Answers of one "
            "token. Times are medians of three, tokens the most of all; what waits for nobody was "
            "sent once. Staggered: each a sixth of the time of one behind the other. Where the "
            "first one's client leaves, it does so after a quarter of that time, and three others "
            "ask then. Tiny random models.",
        )
    ]


def main() -> None:
    """A server that counts, and whose requests wait for nobody."""
    from persist_cache.server.flight import Line

    Line.wait_for_shared = lambda *_, **__: None  # type: ignore[method-assign]
    Line.wait_for_turn = lambda *_: None  # type: ignore[method-assign]
    runpy.run_module("tests.computed", run_name="__main__")


if __name__ == "__main__":
    main()
