"""A server's first token: cold, from a remote that another machine published to, with a dead one.

The remote is a folder, so that what is told is what persist-cache does, and no network. Each
machine is a server with a store and a home of its own. A dead remote is a port that nobody listens
on; after three requests that were in vain it is left alone, and what it costs then is compared with
a server without a remote, by turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Spread, Table
from scripts.benchmarks.start import free_port, long_prompt, ours, running

READY_S = 600.0
SECRET = "the secret of the benchmark's machines"
_SHORT_TOKENS = 400
_PRIOR = 4
"""Requests after which a dead remote is left alone."""


def run(context: Context) -> Report:
    from persist_cache_cli.demo.model import smollm2

    common.say("shared: the model")
    model = smollm2("float32")
    num_tokens, times, pairs = context.pick((600, 1, 4), (2000, 5, 20))
    prompt = long_prompt(model, num_tokens)
    with context.scratch() as scratch:
        (scratch / "bucket").mkdir()
        (scratch / "secret").write_text(SECRET)
        first = _published(model, scratch, prompt)
        cold, found = [], []
        for number in range(times):
            common.say(f"shared: {number + 1} of {times}")
            cold.append(_first_request(model, scratch, f"cold-{number}", prompt, remote=False))
            found.append(_first_request(model, scratch, f"found-{number}", prompt, remote=True))
        dead = _dead(model, scratch, pairs)
    assert {one["text"] for one in (first, *cold, *found)} == {first["text"]}
    assert all(one["source"] == "remote" for one in found), found
    values = {
        "model": "SmolLM2-135M-Instruct, float32",
        "tokens": num_tokens,
        "load": os.getloadavg()[0],
        "cold_s": [one["first_s"] for one in cold],
        "found_s": [one["first_s"] for one in found],
        "found_tokens": found[0]["tokens"],
        **dead,
    }
    return Report("shared", "Prompts of another machine", values, [_table(values)])


def _published(model: Path, scratch: Path, prompt: str) -> dict[str, Any]:
    """Have a machine compute and publish the prompt."""
    with _server(model, scratch, "first", "--publish-tiers", "user", "--publish-plain") as ask:
        answer: dict[str, Any] = ask(prompt)
        give_up = time.monotonic() + READY_S
        while not list((scratch / "bucket").glob("pc1/a/*/*")):
            assert time.monotonic() < give_up, "it was not published"
            ask(prompt)
            time.sleep(0.5)
    return answer


def _first_request(
    model: Path, scratch: Path, name: str, prompt: str, *, remote: bool
) -> dict[str, Any]:
    with _server(model, scratch, name, remote=remote) as ask:
        answer: dict[str, Any] = ask(prompt)
    return answer


def _dead(model: Path, scratch: Path, pairs: int) -> dict[str, Any]:
    """First tokens beside a dead remote and without one, by turns; prompts are new each time."""
    access = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
    }
    text = long_prompt(model, _SHORT_TOKENS)
    found: dict[str, list[float]] = {"dead_s": [], "without_s": [], "opening_s": []}
    with (
        _server(model, scratch, "dead", url="s3://team/prompts", environment=access) as dead,
        _server(model, scratch, "without", remote=False) as without,
    ):
        for number in range(_PRIOR):
            found["opening_s"].append(dead(f"{number} opening {text}")["first_s"])
            without(f"{number} opening {text}")
        for number in range(pairs):
            turns = [("dead_s", dead), ("without_s", without)]
            for name, ask in turns if number % 2 else turns[::-1]:
                found[name].append(ask(f"{number} new {text}")["first_s"])
    return found


@contextlib.contextmanager
def _server(
    model: Path,
    scratch: Path,
    name: str,
    *flags: str,
    remote: bool = True,
    url: str = "",
    environment: dict[str, str] | None = None,
) -> Iterator[Any]:
    """A machine; yields what asks it to complete a text."""
    from persist_cache_cli.demo.openblas import preload_env

    place, port = scratch / name, free_port()
    place.mkdir()
    home = {"PERSIST_CACHE_HOME": str(place / "home"), "PERSIST_CACHE_CONFIG": ""}
    env = os.environ | preload_env() | home | (environment or {})
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    shared = ["--remote", url or str(scratch / "bucket")] if remote else []
    shared += ["--remote-secret-file", str(scratch / "secret")] if remote else []
    command = [*ours(model, place / "store"), "--port", str(port), *shared, *flags]
    with (place / "log").open("wb") as log, running(command, env, log):
        address = f"http://127.0.0.1:{port}"
        give_up = time.monotonic() + READY_S
        while not _is_loaded(address):
            assert time.monotonic() < give_up, "the server does not get there"
            time.sleep(0.1)
        yield lambda text: _complete(address, text)


def _is_loaded(address: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        said = requests.get(f"{address}/health", timeout=60).json()
        return bool(said.get("weights") == "loaded")
    return False


def _complete(address: str, text: str) -> dict[str, Any]:
    """Ask for a text to be completed: seconds to the first token, what, and where from."""
    body: Any = {"prompt": text, "max_tokens": 4, "temperature": 0, "stream": True}
    started, first_s, said, pieces = time.perf_counter(), 0.0, "", []
    with requests.post(
        f"{address}/v1/completions", json=body, stream=True, timeout=READY_S
    ) as answer:
        said = answer.headers.get("x-persist-cache", "")
        for line in answer.iter_lines(chunk_size=1):
            if line.startswith(b": x-persist-cache: "):
                said = line.decode().removeprefix(": x-persist-cache: ")
            if line.startswith(b"data: {"):
                first_s = first_s or time.perf_counter() - started
                event = json.loads(line.removeprefix(b"data: "))
                pieces += [one.get("text", "") for one in event.get("choices", ())]
    source, _, rest = said.partition("; tokens=")
    tokens = int(rest.partition(";")[0] or 0)
    return {"first_s": first_s, "text": "".join(pieces), "source": source, "tokens": tokens}


def _table(values: dict[str, Any]) -> Table:
    cold, found, dead, without, opening = (
        Spread.of(values[f"{name}_s"]) for name in ("cold", "found", "dead", "without", "opening")
    )
    rows = [
        [f"{values['tokens']:,} tokens, computed", cold.show(1, 2), "1.00"],
        [
            f"the same from the remote ({values['found_tokens']:,} tokens)",
            found.show(1, 2),
            f"{found.median / cold.median:.3f}",
        ],
        [f"{_SHORT_TOKENS} tokens, computed, no remote", without.show(1, 3), "1.00"],
        [
            "the same beside a dead remote",
            dead.show(1, 3),
            f"{dead.median / without.median:.3f}",
        ],
    ]
    note = (
        f"Load of the machine: {values['load']:.1f}. All answers to the long prompt were equal. "
        f"The {opening.count} requests before the dead remote was left alone: "
        f"{opening.show(1, 3)} s."
    )
    return Table("Seconds to the first token", ["", "s", "of that"], rows, note)
