"""What is computed of a prompt whose prefill is interrupted: its client gives up, or the server.

Counted at the model's call. The models are random and of a few thousand weights; each prefill call
sleeps as long as a larger model would compute, so that there is something to interrupt.

Also run as `python -m scripts.benchmarks.interrupted JOB.json`, which is such a server.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Table
from scripts.benchmarks.turns import write_kind
from tests.computed import Call, CountedServer, counting_main
from tests.loops import words

MODELS = ("llama", "qwen3_5", "gpt_oss")
WAYS: dict[str, dict[str, Any]] = {"batched": {}, "seed": {"seed": 1}}
STEP_TOKENS = 128
PROMPT_TOKENS = 3000
GIVES_UP = 4 / 14
"""Of the prefill is over when the client gives up, or the server is told to end."""
KILLED = 2 / 3
PATIENCE_S = 1.0
"""How long a prefill goes on without its client, in the cases in which it is cut."""
CASES = {
    "at once, whole": "gives up, comes back at once",
    "at once, streamed": "the same, streamed",
    "later": "gives up, comes back when it was cut",
    "SIGTERM": "SIGTERM",
    "SIGKILL": "SIGKILL",
}


class SlowServer(CountedServer):
    """A server whose model takes its time for prompts."""

    module = "scripts.benchmarks.interrupted"

    def __init__(self, model: Path, folder: Path, *, token_s: float, **constants: float) -> None:
        """Prepare it; its store in `folder` may be there already.

        Args:
            model: Folder of the model.
            folder: For store and log.
            token_s: What a token of a prompt takes.
            constants: Of `persist_cache.server.underway`, instead of what they are.
        """
        super().__init__(
            model,
            folder / "store",
            folder / "logs",
            flags=("--prefill-step-size", str(STEP_TOKENS)),
            min_free_bytes=0,
            grace_s=0.5,
        )
        job = {"token_s": token_s, "constants": constants}
        self.log.with_suffix(".slow").write_text(json.dumps(job))

    def start(self) -> None:
        super().start()
        self.request("POST", "/v1/completions", json={"prompt": "w79 w78", "max_tokens": 1})
        self.calls()

    def computed(self) -> int:
        """Tokens of prompts that were computed since this was asked last."""
        return sum(map(len, self.prefilled()))


def run(context: Context) -> Report:
    models = context.pick(MODELS[:1], MODELS)
    prefill_s = context.pick(4.5, 14.0)
    found = []
    for name in models:
        for way in WAYS:
            common.say(f"interrupted: {name}, {way}")
            with context.scratch() as scratch:
                one = _interrupt(scratch, name, way, prefill_s)
            found.append({"model": name, "way": way, **one})
    written = {}
    with context.scratch() as scratch:
        for name in models:
            written[name] = _write(scratch / name, name, prefill_s)
    values = {"prefill_s": prefill_s, "cases": found, "written": written}
    return Report("interrupted", "Interrupted prefills", values, _tables(values))


def _body(number: int, **more: Any) -> dict[str, Any]:
    prompt = words(number, PROMPT_TOKENS)
    return {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1, **more}


def _interrupt(scratch: Path, name: str, way: str, prefill_s: float) -> dict[str, Any]:
    """Interrupt prompts of one model in each of the cases."""
    model = write_kind(scratch / name, name)
    token_s = prefill_s / PROMPT_TOKENS
    bodies = {case: _body(number, **WAYS[way]) for number, case in enumerate(CASES, 1)}
    found: dict[str, Any] = {}
    with SlowServer(model, scratch / "right", token_s=0.0) as server:
        right = {}
        for case, body in bodies.items():
            right[case] = _answer(server, body)
            found[case] = {"needed": server.computed()}
    for moment, patience in (("at once", {}), ("later", {"PATIENCE_S": PATIENCE_S})):
        with SlowServer(model, scratch / moment, token_s=token_s, **patience) as server:
            for case in (one for one in CASES if one.startswith(moment)):
                with _asking(server, {**bodies[case], "stream": case.endswith("streamed")}):
                    time.sleep(GIVES_UP * prefill_s)
                if patience:
                    time.sleep(2 * PATIENCE_S)
                said = _answer(server, bodies[case])
                found[case] |= {"computed": server.computed(), "equal": said == right[case]}
    for case, moment_s in (("SIGTERM", GIVES_UP * prefill_s), ("SIGKILL", KILLED * prefill_s)):
        computed = 0
        with SlowServer(model, scratch / case, token_s=token_s) as server:
            with _asking(server, bodies[case]):
                time.sleep(moment_s)
                assert server.process is not None
                server.process.send_signal(getattr(signal, case))
                server.process.wait(60)
            computed += server.computed()
        with SlowServer(model, scratch / case, token_s=token_s) as server:
            said = _answer(server, bodies[case])
            computed += server.computed()
        found[case] |= {"computed": computed, "equal": said == right[case]}
    return {"found": found}


def _write(scratch: Path, name: str, prefill_s: float) -> dict[str, float]:
    """Bytes that a prefill writes which nobody interrupts, and one that saves nothing on its way.

    The store has been idle for as long as it takes to merge what can be.
    """
    from persist_cache import Store

    model = write_kind(scratch / name, name)
    written: dict[str, float] = {}
    for case, save_every_s in (("with", 2.0), ("without", 1e9)):
        folder = scratch / case
        token_s = prefill_s / PROMPT_TOKENS
        with SlowServer(model, folder, token_s=token_s, SAVE_EVERY_S=save_every_s) as server:
            _answer(server, _body(1))
            time.sleep(3.0)
        with Store.open(folder / "store", min_free_bytes=0) as store:
            store.gc()
            written[case] = float(store.stats().written_bytes)
    return written


@contextlib.contextmanager
def _asking(server: CountedServer, body: dict[str, Any]) -> Iterator[None]:
    """A client that has asked, and leaves at the end of the block."""
    said = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(said)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + said)
        yield


def _answer(server: CountedServer, body: dict[str, Any]) -> Any:
    """What is said, with the log probability of each token."""
    answer = server.request("POST", "/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return [choice["text"], choice.get("logprobs")]


def _tables(values: Any) -> list[Table]:
    rows = []
    for case in values["cases"]:
        row = [case["model"], case["way"]]
        for name in CASES:
            found = case["found"][name]
            said = f"{found['computed'] / found['needed']:.3f}"
            row.append(said if found["equal"] else f"{said}, another answer")
        rows.append(row)
    note = (
        f"A prompt of {PROMPT_TOKENS:,} tokens in chunks of {STEP_TOKENS}, "
        f"{values['prefill_s']:.0f} s. Its client gives up, or SIGTERM comes, after "
        f"{GIVES_UP:.0%} of that, SIGKILL after {KILLED:.0%}; then it is asked again. All answers "
        "were equal to those of a server that nobody interrupted, with the log probabilities, "
        "unless it is said."
    )
    written = [
        [name, f"{one['with'] / one['without']:.3f}"] for name, one in values["written"].items()
    ]
    return [
        Table("Tokens computed in all / needed", ["model", "served", *CASES.values()], rows, note),
        Table(
            "Bytes written by a prefill that is not interrupted, against saving at its end only",
            ["model", "ratio"],
            written,
            "After `gc`, which merges what can be.",
        ),
    ]


def main() -> None:
    from mlx_lm.utils import MODEL_REMAPPING

    from persist_cache.server import underway

    MODEL_REMAPPING["qwen3_5_of_words"] = "qwen3_5"
    job = json.loads(Path(sys.argv[1]).with_suffix(".slow").read_text())
    for name, value in job["constants"].items():
        assert hasattr(underway, name), name
        setattr(underway, name, value)

    def slow(call: Call) -> None:
        time.sleep(job["token_s"] * sum(map(len, call.rows)))

    counting_main(slow)


if __name__ == "__main__":
    main()
