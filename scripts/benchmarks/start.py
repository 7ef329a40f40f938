"""From the start of a server to its first token, and what a long prompt from the disk adds.

Beside mlx-lm's own server, and beside a verified read of the bytes that are restored.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import requests

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Spread, Table, fresh

STOCK = "mlx_lm.server: from its start to the answer of a short prompt"
OURS = "ours: the same"
DISK = "then a long prompt, from the disk"
MEMORY = "then the same, from memory"
READ = "a verified read of its bytes into new memory"
START_S = 120.0


def run(context: Context) -> Report:
    from persist_cache_cli.demo.model import smollm2
    from persist_cache_cli.demo.openblas import find_openblas, preload_env

    common.say("start: the model")
    model = smollm2("float32")
    env = os.environ | preload_env()
    # As installed packages have it.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    num_tokens = context.pick(250, 2000)
    with context.scratch() as scratch:
        store = scratch / "store"
        log = scratch / "log"
        text = long_prompt(model, num_tokens)
        prompts = [f"{place} {text}" for place in ("Here", "There")]
        common.say("start: the prompts are computed")
        _asked(ours(model, store), env, log, prompts)
        common.sync(store)
        # Memory holds one of them, so that each is read again when its turn comes.
        one_at_a_time = [
            *ours(model, store)[:-2],
            "--prompt-cache-size",
            "1",
            "--model",
            str(model),
        ]
        pairs = context.pick(2, 6)
        turns = [prompts[turn % 2] for turn in range(pairs) for _ in (DISK, MEMORY)]
        cases = {
            STOCK: partial(_asked, _stock(model), env, log, ["Hi"]),
            OURS: partial(_asked, one_at_a_time, env, log, ["Hi", *turns]),
            READ: partial(fresh, read_verified, store=str(store), prompts=2),
        }
        for case in cases.values():
            case()
        samples = common.take_turns(cases, context.pick(2, 15), "start")
    for answers in samples[OURS]:
        hits = [one["source"] for one in answers]
        assert hits == ["miss", *["disk", "memory"] * pairs], answers
        assert all(one["cached"] > num_tokens - 20 for one in answers[1:]), answers
    values = {
        "model": "SmolLM2-135M-Instruct, float32",
        "openblas": find_openblas() is not None,
        "tokens": num_tokens,
        "bytes": samples[READ][0]["nbytes"],
        "s": {
            STOCK: [answers[0]["s"] for answers in samples[STOCK]],
            OURS: [answers[0]["s"] for answers in samples[OURS]],
            DISK: [one["s"] for answers in samples[OURS] for one in answers[1::2]],
            MEMORY: [one["s"] for answers in samples[OURS] for one in answers[2::2]],
            READ: [one["s"] for one in samples[READ]],
        },
    }
    return Report("start", "From the start of the process", values, _tables(values))


def long_prompt(model: Path, num_tokens: int) -> str:
    """A text of so many tokens."""
    from persist_cache.prefill.loading import load_tokenizer
    from persist_cache_cli.demo.prompt import system_text

    tokenizer = load_tokenizer(str(model))
    tokens = tokenizer.encode(system_text())
    return str(tokenizer.decode((tokens * (num_tokens // len(tokens) + 1))[:num_tokens]))


def ours(model: Path, store: Path) -> list[str]:
    """The command line of our server; the model is at its end."""
    program = str(Path(sys.executable).with_name("persist-cache"))
    return [program, "serve", "--store", str(store), "--min-free", "0", "--model", str(model)]


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stock(model: Path) -> list[str]:
    return [str(Path(sys.executable).with_name("mlx_lm.server")), "--model", str(model)]


def _asked(
    command: list[str], env: dict[str, str], log: Path, prompts: list[str]
) -> list[dict[str, Any]]:
    """Start a server and have it answer with one token, prompt after prompt.

    Returns:
        For each the seconds, of the first one since the start of the process, and the tokens that
        were not computed.
    """
    port = free_port()
    found = []
    started = time.perf_counter()
    with (
        log.open("wb") as out,
        running([*command, "--port", str(port)], env, out),
        requests.Session() as session,
    ):
        for prompt in prompts:
            body: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
            while True:
                try:
                    answer = session.post(
                        f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=START_S
                    )
                    break
                except requests.ConnectionError:
                    assert time.perf_counter() - started < START_S, log.read_text()[-2000:]
                    time.sleep(0.005)
            answered = time.perf_counter()
            assert answer.status_code == 200, answer.text
            details = answer.json()["usage"].get("prompt_tokens_details", {})
            source = answer.headers.get("x-persist-cache", "").partition(";")[0]
            cached = details.get("cached_tokens", 0)
            found.append({"s": answered - started, "cached": cached, "source": source})
            time.sleep(0.5)  # what follows an answer is not of the next one
            started = time.perf_counter()
    return found


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str], out: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process, which is ended with the block."""
    process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def read_verified(store: str, prompts: int) -> dict[str, float]:
    """Read all files of a store into new memory, held against their checksums.

    Returns:
        Seconds and bytes of one prompt, of so many that are alike.
    """
    from persist_cache.blobs.reader import BlobReader

    files = sorted((Path(store) / "blobs").rglob("*.safetensors"))
    started = time.perf_counter()
    nbytes = 0
    kept = []
    for path in files:
        with BlobReader(path) as blob:
            for name, info in blob.header.tensors.items():
                memory = mmap.mmap(-1, info.nbytes)
                blob.read(name, [memoryview(memory)])
                kept.append(memory)
            nbytes += blob.nbytes
    return {"s": (time.perf_counter() - started) / prompts, "nbytes": nbytes // prompts}


def restoring(values: Any) -> Spread:
    """What the disk adds to a hit in memory, against a verified read: by turns, in pairs."""
    read = statistics.median(values["s"][READ])
    pairs = zip(values["s"][DISK], values["s"][MEMORY], strict=True)
    return Spread.of([(disk - memory) / read for disk, memory in pairs])


def against_stock(values: Any) -> Spread:
    """From the start to the answer of a short prompt, against mlx-lm's own server, by turns."""
    by_turns = zip(values["s"][OURS], values["s"][STOCK], strict=True)
    return Spread.of([ours / stock for ours, stock in by_turns])


def _tables(values: Any) -> list[Table]:
    rows = [[case, Spread.of(seconds).show(1e3, 0)] for case, seconds in values["s"].items()]
    return [
        Table(
            f"{values['model']}, {'with' if values['openblas'] else 'without'} OpenBLAS; the long "
            f"prompt has {values['tokens']:,} tokens, {values['bytes'] / 2**20:,.0f} MiB",
            ["what", "ms"],
            rows,
            "Answers of one token. By turns: the start, ours against mlx_lm.server: "
            f"{against_stock(values).show(digits=3)}. What the disk adds to the hit in memory, "
            f"against the verified read in a process of its own: {restoring(values).show()}. "
            "Files are in the page cache.",
        )
    ]
