"""How long a streamed request sees nothing: until its headers, and until the first line after them.

Beside mlx-lm's own server. The model is tiny; what it takes time for is a long prompt in small
steps, and other requests.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Spread, Table
from tests.server_process import ServerProcess

CASES = {
    "at once": {},
    "with a `seed`": {"seed": 1},
    "with a `seed`, after one with a `seed`": {"seed": 2},
    "batched, after one with a `seed`": {},
}
BEFORE_S = 5.0
"""For which the request before is answered."""
SERVERS = ("ours", "mlx_lm.server")


def run(context: Context) -> Report:
    from tests.tiny_models import build_model_dir

    repetitions = context.pick(1, 3)
    samples: dict[str, dict[str, list[Any]]] = {
        which: {case: [] for case in CASES} for which in SERVERS
    }
    with context.scratch() as scratch, contextlib.ExitStack() as stack:
        model = build_model_dir(scratch / "model", num_hidden_layers=4)
        servers = {which: stack.enter_context(_server(which, model, scratch)) for which in SERVERS}
        for number in range(repetitions):
            for case in CASES:
                for which, server in servers.items():
                    samples[which][case].append(_measured(server, case, f"{number} {case}"))
    return Report("signs", "Signs of life", {"s": samples}, _tables(samples))


def _server(which: str, model: Path, scratch: Path) -> ServerProcess:
    flags = ("--prefill-step-size", "64")
    if which == "ours":
        store = scratch / "store"
        return ServerProcess(model, store, scratch / "logs", min_free_bytes=0, flags=flags)
    return ServerProcess(
        model,
        scratch / "none",
        scratch / "logs",
        module="scripts.benchmarks.stall",
        flags=flags,
        stock=True,
    )


def _measured(server: ServerProcess, case: str, text: str) -> dict[str, float]:
    """Seconds until the headers, the first line after them and the first token."""
    common.say(f"signs: {text}")
    with contextlib.ExitStack() as stack:
        if "after" in case:
            stack.enter_context(_before(server))
        asked = time.perf_counter()
        body = {
            "messages": [{"role": "user", "content": f"{text} " + "once upon a time " * 200}],
            "max_tokens": 2,
            **CASES[case],
        }
        headers_s = line_s = token_s = 0.0
        for line in _streamed(server, body):
            now = time.perf_counter() - asked
            headers_s = headers_s or now
            if line:
                line_s = line_s or now
            if line.startswith(b"data: {"):
                token_s = token_s or now
    return {"headers": headers_s, "line": line_s, "token": token_s}


@contextlib.contextmanager
def _before(server: ServerProcess) -> Iterator[None]:
    """A request that is served alone, until its client leaves."""
    body = {
        "messages": [{"role": "user", "content": "Go on."}],
        "max_tokens": 100_000,
        "logit_bias": {"2": -100},
        "seed": 1,
    }
    lines = _streamed(server, body, leave_after_s=BEFORE_S)
    while not next(lines).startswith(b"data: {"):
        pass
    rest = threading.Thread(target=lambda: list(lines))
    rest.start()
    try:
        yield
    finally:
        rest.join()


def _streamed(
    server: ServerProcess, body: dict[str, Any], *, leave_after_s: float = 600
) -> Iterator[bytes]:
    """An empty line for the headers, then the lines of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    headers = {"Content-Type": "application/json"}
    raw = json.dumps({**body, "stream": True})
    began = time.perf_counter()
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", raw, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        yield b""
        with contextlib.closing(answer):
            while line := answer.readline():
                yield line
                if time.perf_counter() - began > leave_after_s:
                    return


def _tables(samples: dict[str, Any]) -> list[Table]:
    rows = []
    for case in CASES:
        cells = [case]
        for which in SERVERS:
            for what in ("headers", "line", "token"):
                taken = Spread.of([one[what] for one in samples[which][case]])
                cells.append(f"{taken.median:.2f}")
        rows.append(cells)
    columns = ["request"]
    for which in SERVERS:
        columns += [f"{which}: headers", "first line", "first token"]
    note = (
        "A cold prompt in steps of 64 tokens. The request before is served alone for "
        f"{BEFORE_S:.0f} s. Lines are comments or events."
    )
    return [Table("Seconds until a streamed request sees something", columns, rows, note)]
