"""How long a stream stands still while the same server restores a large entry for somebody else.

A real server and real connections: one client reads a stream and notes when each token comes,
another asks for a prompt that memory holds, or the disk.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Spread, Table
from tests.server_process import ServerProcess

SENTENCE = "Answer the question of the user in a short sentence. "
CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
OPENINGS = ("First. ", "Second. ")
"""Of the two large entries, so that neither begins as the other does."""
BYTES_PER_TOKEN = 16 * 8 * 128 * 2 * 4
"""Keys and values of that model, in float32."""
DISK = "disk, in the page cache"
DROPPED = "disk, page cache dropped"
LATE = "disk, restored on the generation thread"
STOCK = "memory, in mlx_lm.server itself"
CASES = (STOCK, "memory", DISK, DROPPED, LATE)


def run(context: Context) -> Report:
    from persist_cache.prefill.loading import load_tokenizer
    from persist_cache_cli.demo.openblas import find_openblas, preload_env
    from tests.tiny_models import build_model_dir

    os.environ.update(preload_env())
    with context.scratch() as scratch, contextlib.ExitStack() as stack:
        model = build_model_dir(scratch / "model", **CONFIG)
        tokenizer = load_tokenizer(str(model))
        (token,) = tokenizer.encode(" the", add_special_tokens=False)[-1:]
        repeats = context.pick(50, 150)
        talk = _Talk(int(token), SENTENCE * repeats)

        def server(**options: Any) -> ServerProcess:
            started = ServerProcess(
                model, scratch / "store", scratch / "logs", min_free_bytes=0, **options
            )
            return stack.enter_context(started)

        holding = server()
        common.say("stall: the entries are made")
        made = [talk.ask(holding, turn)["tokens"] for turn in range(len(OPENINGS))]
        num_tokens = max(made)
        assert holding.request("POST", "/v1/cache/flush").status_code == 200
        common.sync(scratch / "store" / "blobs")
        # Memory for one of the entries and the stream: asked for by turns, each is on disk.
        room = int(1.5 * num_tokens * BYTES_PER_TOKEN)
        reading = server(memory_bytes=room)
        late = server(memory_bytes=room, module="scripts.benchmarks.stall")
        stock = server(stock=True, module="scripts.benchmarks.stall")
        for turn in range(len(OPENINGS)):
            talk.ask(stock, turn)
        blobs = scratch / "store" / "blobs"
        cases = {
            STOCK: partial(talk.measure, stock),
            "memory": partial(talk.measure, holding),
            DISK: partial(talk.measure, reading),
            DROPPED: partial(talk.measure, reading, blobs),
            LATE: partial(talk.measure, late),
        }
        for case in cases.values():
            case()
        samples = common.take_turns(cases, context.pick(3, 20), "stall")
        for name in CASES:
            wanted = name.partition(",")[0]
            assert {one["source"] for one in samples[name]} == {wanted}, (name, samples[name])
    values = {
        "tokens": num_tokens,
        "bytes": num_tokens * BYTES_PER_TOKEN,
        "openblas": find_openblas() is not None,
        "samples": samples,
    }
    return Report("stall", "A stream beside a restore", values, _tables(values))


class _Talk:
    """The two clients.

    Attributes:
        token: What the stream repeats, so that each token is text and comes alone.
        system: What the system prompts of the large entries have in common.
    """

    def __init__(self, token: int, system: str) -> None:
        self.token = token
        self.system = system
        self._turns: Counter[int] = Counter()

    def measure(self, server: ServerProcess, dropped: Path | None = None) -> dict[str, Any]:
        """Ask for the large entry while a stream is read."""
        with self._stream(server) as times:
            time.sleep(1.0)
            if dropped is not None:
                common.drop_page_cache(dropped)
            before = _restore_s(server)
            asked = time.perf_counter()
            self._turns[server.port] += 1
            answer = self.ask(server, self._turns[server.port])
            answered = time.perf_counter()
            time.sleep(0.5)
            restore_s = _restore_s(server) - before
            seen = list(times)
        calm = [b - a for a, b in pairwise(seen) if b < asked]
        # The cache of the answer is kept after it was sent, which takes the loop's time, too.
        during = [b - a for a, b in pairwise(seen) if b > asked and a < answered + 0.3]
        median = statistics.median(calm)
        return {
            "source": answer["source"],
            "tokens": answer["tokens"],
            "restore_s": restore_s,
            "median_gap_s": median,
            "calm_max_gap_s": max(calm),
            "max_gap_s": max(during),
            "long_gaps_s": [gap for gap in during if gap > 2 * median],
            "delay_s": sum(during) - len(during) * median,
            "answer_s": answered - asked,
        }

    def ask(self, server: ServerProcess, turn: int) -> dict[str, Any]:
        system = OPENINGS[turn % len(OPENINGS)] + self.system
        answer = server.chat(("system", system), ("user", "Who?"), max_tokens=1)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        tokens = usage["prompt_tokens_details"]["cached_tokens"]
        if tokens < usage["prompt_tokens"] / 2:
            return {"source": "miss", "tokens": usage["prompt_tokens"]}
        header = answer.headers.get("x-persist-cache", "memory")
        return {"source": header.partition(";")[0], "tokens": tokens}

    @contextlib.contextmanager
    def _stream(self, server: ServerProcess) -> Iterator[list[float]]:
        """The moments at which tokens of a stream came; it goes on while the block runs."""
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = {
            "messages": [{"role": "user", "content": "Go on."}],
            "stream": True,
            "max_tokens": 100_000,
            "logit_bias": {str(self.token): 100},
        }
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        times: list[float] = []
        done = threading.Event()

        def read() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                while not done.is_set() and (line := answer.readline()):
                    if line.startswith(b"data: {"):
                        times.append(time.perf_counter())

        reader = threading.Thread(target=read)
        reader.start()
        try:
            while len(times) < 20:
                time.sleep(0.01)
            yield times
        finally:
            done.set()
            reader.join()
            answer.close()
            connection.close()
            time.sleep(0.5)  # the server notices at its next token


def _restore_s(server: ServerProcess) -> float:
    """Seconds that it spent in restoring so far; 0 for mlx-lm's own, which restores nothing."""
    if "Page: " not in server.log.read_text():
        return 0.0
    return float(server.get("/v1/cache/stats")["server"]["restore_s"])


def beside_memory(values: Any, case: str) -> Spread:
    """The longest gap against that of the hit in memory beside it."""
    pairs = zip(values["samples"][case], values["samples"]["memory"], strict=True)
    return Spread.of([one["max_gap_s"] / other["max_gap_s"] for one, other in pairs])


def spread(values: Any, case: str, field: str) -> Spread:
    return Spread.of([sample[field] for sample in values["samples"][case]])


def _tables(values: Any) -> list[Table]:
    rows = []
    for case in CASES:
        from_disk = case.startswith("disk")
        load = spread(values, case, "restore_s")
        gap = spread(values, case, "max_gap_s")
        median = spread(values, case, "median_gap_s")
        rows.append(
            [
                case,
                load.show(1e3, 0) if from_disk else "–",
                median.show(1e3),
                gap.show(1e3, 0),
                f"{gap.median / median.median:.0f}",
                "–" if case == "memory" else beside_memory(values, case).show(digits=2),
                spread(values, case, "delay_s").show(1e3, 0),
            ]
        )
    return [
        Table(
            f"An entry of {values['tokens']:,} tokens, {values['bytes'] / 2**20:,.0f} MiB",
            [
                "where it is",
                "load, ms",
                "gap between tokens before, ms",
                "longest gap, ms",
                "longest gap : gap before",
                "longest gap : memory's, by pairs",
                "delay in all, ms",
            ],
            rows,
            "One server decodes a stream while another request takes up the entry. The load is "
            "what the server says it spent in restoring. A hit in memory makes the stream wait as "
            "well, because mlx-lm merges the entry into the batch and takes it out again, and "
            "copies it each time; what is beyond that is the disk's. The pairs are neighbours in "
            "time. The delay is the time of all "
            "gaps from the request until its cache was kept, less as many gaps as before. A tiny "
            "model with "
            f"16 layers × 8 heads × 128 in float32, {'with' if values['openblas'] else 'without'} "
            "OpenBLAS.",
        )
    ]


def main() -> None:
    """A server as `tests.server_process` runs it that loads nothing ahead; or mlx-lm's own."""
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["options"].get("stock"):
        from mlx_lm import server

        sys.argv = ["mlx_lm.server", *job["flags"]]
        server.main()
        return
    from persist_cache.cache.prompt_cache import PromptCache
    from tests import server_process

    PromptCache.load_ahead = lambda *_, **__: None  # type: ignore[method-assign]
    server_process.main()


if __name__ == "__main__":
    main()
