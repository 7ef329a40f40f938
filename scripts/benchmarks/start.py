"""From the start of a server to its first token, with a long prompt restored and without.

Beside mlx-lm's own server, and beside a verified read of the bytes that are restored.
"""

from __future__ import annotations

import contextlib
import os
import socket
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

STOCK = "mlx_lm.server, a short prompt"
SHORT = "ours, a short prompt"
LONG = "ours, a long prompt from the disk"
READ = "a verified read"
CASES = (STOCK, SHORT, LONG, READ)
START_S = 120.0


def run(context: Context) -> Report:
    from persist_cache_cli.demo.model import smollm2
    from persist_cache_cli.demo.openblas import find_openblas, preload_env

    common.say("start: the model")
    model = smollm2("float32")
    env = os.environ | preload_env()
    num_tokens = context.pick(250, 2000)
    with context.scratch() as scratch:
        store = scratch / "store"
        prompt = _prompt(model, num_tokens)
        ours = partial(_first_token, _ours(model, store), env, scratch / "log")
        stock = partial(_first_token, _stock(model), env, scratch / "log")
        common.say("start: the prompt is computed")
        ours(prompt)
        common.sync(store)
        cases = {
            STOCK: partial(stock, "Hi"),
            SHORT: partial(ours, "Hi"),
            LONG: partial(ours, prompt),
            READ: partial(fresh, read_verified, store=str(store)),
        }
        for case in cases.values():
            case()
        samples = common.take_turns(cases, context.pick(2, 15), "start")
    assert all(one["cached"] >= num_tokens - 20 for one in samples[LONG]), samples[LONG]
    values = {
        "model": "SmolLM2-135M-Instruct, float32",
        "openblas": find_openblas() is not None,
        "tokens": num_tokens,
        "bytes": samples[READ][0]["nbytes"],
        "samples": samples,
    }
    return Report("start", "From the start of the process", values, _tables(values))


def _prompt(model: Path, num_tokens: int) -> str:
    from persist_cache.prefill.loading import load_tokenizer
    from persist_cache_cli.demo.prompt import system_text

    tokenizer = load_tokenizer(str(model))
    tokens = tokenizer.encode(system_text())
    return str(tokenizer.decode((tokens * (num_tokens // len(tokens) + 1))[:num_tokens]))


def _ours(model: Path, store: Path) -> list[str]:
    program = str(Path(sys.executable).with_name("persist-cache"))
    return [program, "serve", "--store", str(store), "--min-free", "0", "--model", str(model)]


def _stock(model: Path) -> list[str]:
    return [str(Path(sys.executable).with_name("mlx_lm.server")), "--model", str(model)]


def _first_token(command: list[str], env: dict[str, str], log: Path, prompt: str) -> dict[str, Any]:
    """Start a server, ask it for one token, and end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    started = time.perf_counter()
    with (
        log.open("wb") as out,
        _running([*command, "--port", str(port)], env, out),
        requests.Session() as session,
    ):
        url = f"http://127.0.0.1:{port}/v1/completions"
        while True:
            try:
                answer = session.post(url, json=body, timeout=START_S)
                break
            except requests.ConnectionError:
                assert time.perf_counter() - started < START_S, log.read_text()[-2000:]
                time.sleep(0.005)
        seconds = time.perf_counter() - started
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {"s": seconds, "cached": cached, "prompt_tokens": usage["prompt_tokens"]}


@contextlib.contextmanager
def _running(command: list[str], env: dict[str, str], out: Any) -> Iterator[None]:
    process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def read_verified(store: str) -> dict[str, float]:
    """Read all files of a store, and hold them against their checksums; nothing is made of them."""
    from persist_cache.blobs.reader import BlobReader

    files = sorted((Path(store) / "blobs").rglob("*.safetensors"))
    started = time.perf_counter()
    nbytes = 0
    for path in files:
        with BlobReader(path) as blob:
            blob.verify()
            nbytes += blob.nbytes
    return {"s": time.perf_counter() - started, "nbytes": nbytes}


def difference(values: Any) -> Spread:
    """First token after a long prompt less that after a short one, against a verified read."""
    by_turns = zip(*(values["samples"][case] for case in (LONG, SHORT, READ)), strict=True)
    return Spread.of([(long["s"] - short["s"]) / read["s"] for long, short, read in by_turns])


def against_stock(values: Any) -> Spread:
    """First token after a short prompt, against mlx-lm's own server, by turns."""
    by_turns = zip(values["samples"][SHORT], values["samples"][STOCK], strict=True)
    return Spread.of([ours["s"] / stock["s"] for ours, stock in by_turns])


def _tables(values: Any) -> list[Table]:
    rows = []
    for case in CASES:
        seconds = Spread.of([one["s"] for one in values["samples"][case]])
        rows.append([case, seconds.show(1e3, 0)])
    return [
        Table(
            f"{values['model']}, {'with' if values['openblas'] else 'without'} OpenBLAS, "
            f"{values['tokens']:,} tokens, {values['bytes'] / 2**20:,.0f} MiB",
            ["what", "ms"],
            rows,
            "From the start of the process to the answer of one token. By turns: "
            f"ours against mlx_lm.server, a short prompt: {against_stock(values).show(digits=3)}. "
            "What the long prompt takes longer than the short one, against a verified read of its "
            f"bytes in another process: {difference(values).show(digits=2)}; computing its last "
            "token over all others is in it. Files are in the page cache.",
        )
    ]
