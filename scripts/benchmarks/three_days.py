"""Three days, three servers, one system prompt that ends in the date: `scripts/three_days`."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persist_cache import PersistCacheError
from persist_cache.prefill.loading import load_tokenizer
from persist_cache_cli.demo.openblas import find_openblas, preload_env
from persist_cache_cli.demo.prompt import system_text
from scripts.benchmarks.common import REPOSITORY, Table, machine, machine_line, say
from scripts.benchmarks.gemma3 import gemma3

DAYS = ("Monday, 2 March 2026", "Tuesday, 3 March 2026", "Wednesday, 4 March 2026")
QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Spain?",
    "What is the capital of Italy?",
)
EXPECTED = ("Paris", "Madrid", "Rome")
# The model is a pretrained one: it continues a text and knows no chat template. Without a system
# message there is no first token either, so that the request of `_load` shares nothing with a day.
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'Answer: ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
MAX_TOKENS = 24
MIN_REUSED = 0.9
START_S = 180.0
# Without OpenBLAS the prefill of one day takes minutes on Linux.
ANSWER_S = 1800.0
STOP_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What a server said to one day's question.

    Attributes:
        text: The answer.
        prompt_tokens: Of the request.
        cached_tokens: Those of them that were not computed.
        header: `x-persist-cache`, or the comment in its place; "" from a server without it.
        first_token_s: Seconds until the first piece of text.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int
    header: str
    first_token_s: float


def messages(day: int) -> list[dict[str, str]]:
    """Return the request of one day: the system message with its date, and a question."""
    instructions, _, _ = system_text().partition("# Using tools")
    return [
        {"role": "system", "content": f"{instructions.strip()}\n\nToday is {DAYS[day]}."},
        {"role": "user", "content": QUESTIONS[day]},
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/three_days",
        description="Show that a system prompt which ends in the date hits on the third day.",
    )
    parser.parse_args()
    try:
        model = gemma3(lambda text: print(text, file=sys.stderr, flush=True))
        tokenizer = load_tokenizer(str(model))
        shared = _common_prefix(*(_prompt(tokenizer, day) for day in range(len(DAYS))))
        print("Gemma 3 270M, float32: 15 layers with a window of 512 tokens, 3 without a window.")
        blas = "with OpenBLAS" if find_openblas() else "without OpenBLAS"
        print(f"{machine_line(machine())}; {blas}.")
        print(f"A server for each day; the three prompts share their first {shared} tokens.")
        print("Each server has answered an unrelated request before: the model is loaded.\n")
        with tempfile.TemporaryDirectory(prefix="persist-cache-days-") as made:
            ours, stock = measure(model, Path(made))
    except (PersistCacheError, ServerError) as error:
        sys.exit(f"Error: {error}")
    print(Table("persist-cache serve", COLUMNS, _rows(ours)).markdown(), end="\n\n")
    note = "One process for all days: this server keeps nothing when it ends."
    print(Table("mlx_lm.server", COLUMNS, _rows(stock), note).markdown(), end="\n\n")
    verdicts = judge(ours, stock, shared)
    for holds, sentence in verdicts:
        print("holds " if holds else "FAILS ", sentence)
    return 0 if all(holds for holds, _ in verdicts) else 1


def measure(model: Path, folder: Path) -> tuple[list[Answer], list[Answer]]:
    """Live through the days with our server, restarted each night, then with upstream's."""
    store = str(folder / "store")
    command = ["persist_cache_cli", "--store", store, "serve", "--min-free", "0"]
    ours = []
    for day in range(len(DAYS)):
        say(f"day {day + 1}")
        with server(command, model, folder / "serve.log") as port:
            ours.append(ask(port, day))
    say("the same with mlx_lm.server")
    with server(["mlx_lm", "server"], model, folder / "stock.log") as port:
        stock = [ask(port, day) for day in range(len(DAYS))]
    say("")
    return ours, stock


def judge(ours: Sequence[Answer], stock: Sequence[Answer], shared: int) -> list[tuple[bool, str]]:
    """Return what has to be true, each with whether it is."""
    third, reference = ours[-1], stock[-1]
    texts = [(mine.text, other.text) for mine, other in zip(ours, stock, strict=True)]
    return [
        (
            third.cached_tokens >= MIN_REUSED * shared and third.header.startswith("disk"),
            f"the third day takes {third.cached_tokens} of the {shared} shared tokens from disk",
        ),
        (
            # Were it to reuse anything, it would be no reference for a server without a cache.
            reference.cached_tokens == 0,
            f"mlx_lm.server reuses {reference.cached_tokens} tokens on the third day",
        ),
        (
            all(mine == other for mine, other in texts),
            f"all answers are mlx_lm.server's, {MAX_TOKENS} greedy tokens each",
        ),
        (
            all(
                expected in mine.splitlines()[0]
                for expected, (mine, _) in zip(EXPECTED, texts, strict=True)
            ),
            "and they are right: " + ", ".join(mine.splitlines()[0].strip() for mine, _ in texts),
        ),
    ]


COLUMNS = ("Day", "Prompt tokens", "Cached tokens", "x-persist-cache", "First token", "Sooner")


def _rows(answers: Sequence[Answer]) -> list[list[str]]:
    first = answers[0].first_token_s
    return [
        [
            day,
            str(answer.prompt_tokens),
            str(answer.cached_tokens),
            answer.header or "–",
            f"{answer.first_token_s:.2f} s",
            f"{first / answer.first_token_s:.1f} ×",
        ]
        for day, answer in zip(DAYS, answers, strict=True)
    ]


def _prompt(tokenizer: Any, day: int) -> list[int]:
    return list(
        tokenizer.apply_chat_template(
            messages(day), chat_template=TEMPLATE, add_generation_prompt=True
        )
    )


# --- servers -------------------------------------------------------------------------------------


class ServerError(RuntimeError):
    """A server did not start, answer or end as it must."""


@contextmanager
def server(command: Sequence[str], model: Path, log: Path) -> Iterator[int]:
    """Run `python -m COMMAND` on a free port, which is yielded; ended by SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    # fmt: off
    arguments = [
        sys.executable, "-m", *command, "--model", str(model), "--port", str(port),
        "--chat-template", TEMPLATE,
    ]
    # fmt: on
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            cwd=REPOSITORY,
            env=os.environ | preload_env(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        _await_health(port, process)
        _load(port)
        yield port
        process.terminate()
        # Upstream has no handler for the signal, and ours ends in order.
        if process.wait(STOP_S) not in (0, -signal.SIGTERM):
            raise ServerError(f"it ended with status {process.returncode}")
    except (OSError, ValueError, http.client.HTTPException, subprocess.TimeoutExpired) as error:
        raise ServerError(_said(command, str(error), log)) from error
    except ServerError as error:
        raise ServerError(_said(command, str(error), log)) from error
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _said(command: Sequence[str], problem: str, log: Path) -> str:
    end = log.read_text(errors="replace")[-2000:]
    return f"{command[0]}: {problem}; the end of what it printed:\n{end}"


def _await_health(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None:
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            with closing(connection):
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
        if time.monotonic() > deadline:
            raise ServerError(f"it was not healthy within {START_S:.0f} s")
        time.sleep(0.1)
    raise ServerError("it did not start")


def _load(port: int) -> None:
    """Let the server load the model, which it does after it says that it is healthy."""
    _chat(port, [{"role": "user", "content": "Hello"}], 1)


def ask(port: int, day: int) -> Answer:
    """Ask one day's question, greedily, and take the time until the answer begins.

    Raises:
        ServerError: There was no such answer.
    """
    answer = _chat(port, messages(day), MAX_TOKENS)
    if not answer.text.strip():
        raise ServerError("it sent an answer without text")
    return answer


def _chat(port: int, said: Sequence[Mapping[str, str]], max_tokens: int) -> Answer:
    body = {
        "messages": said,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)) as connection:
        started = time.monotonic()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ServerError(f"status {response.status}: {response.read()[:500]!r}")
        text, usage, first_token_s = "", None, 0.0
        outcome = response.headers.get("x-persist-cache", "")
        for line in response:
            name, _, data = line.decode().strip().partition(": ")
            if not name and data.startswith("x-persist-cache: "):
                # The stream began before the request left the queue.
                outcome = data.removeprefix("x-persist-cache: ")
            if name != "data" or data == "[DONE]":
                continue
            event = json.loads(data)
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                piece = choice["delta"].get("content")
                if piece:
                    first_token_s = first_token_s or time.monotonic() - started
                    text += piece
    if usage is None:
        raise ServerError("it sent an answer that breaks off")
    return Answer(
        text=text,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        header=outcome,
        first_token_s=first_token_s,
    )


if __name__ == "__main__":
    sys.exit(main())


def _common_prefix(*sequences: Sequence[int]) -> int:
    """Number of leading tokens that all sequences share."""
    count = 0
    for together in zip(*sequences, strict=False):
        if len(set(together)) > 1:
            break
        count += 1
    return count
