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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.common import REPOSITORY, machine, machine_line
from bench.gemma3 import gemma3
from persist_cache import PersistCacheError
from persist_cache.warm import common_prefix, load_tokenizer
from persist_cache_cli.demo.openblas import find_openblas, preload_env
from persist_cache_cli.demo.prompt import system_text

DAYS = ("Monday, 2 March 2026", "Tuesday, 3 March 2026", "Wednesday, 4 March 2026")
QUESTIONS = (
    "What is the capital of France?",
    "How many days are there in a week?",
    "What is the capital of Italy?",
)
EXPECTED = ("Paris", "7", "Rome")
# The model is a pretrained one: it continues a text and knows no chat template.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
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
        header: `x-persist-cache`; "" from a server without it.
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
    parser.add_argument("--no-stock", action="store_true", help="do not run mlx_lm.server itself")
    options = parser.parse_args()
    try:
        model = gemma3(lambda text: print(text, file=sys.stderr, flush=True))
        tokenizer = load_tokenizer(str(model))
    except PersistCacheError as error:
        sys.exit(f"Error: {error}")
    prompts = [
        tokenizer.apply_chat_template(
            messages(day), chat_template=TEMPLATE, add_generation_prompt=True
        )
        for day in range(len(DAYS))
    ]
    shared = common_prefix(*prompts)
    blas = "with OpenBLAS" if find_openblas() else "without OpenBLAS"
    print("Gemma 3 270M, float32: 15 layers with a window of 512 tokens, 3 without.")
    print(f"{machine_line(machine())}; {blas}.")
    print(f"The three prompts share their first {shared} tokens.\n")
    with tempfile.TemporaryDirectory(prefix="persist-cache-days-") as made:
        folder = Path(made)
        store = ["-m", "persist_cache_cli", "--store", str(folder / "store"), "serve"]
        ours = []
        for day in range(len(DAYS)):
            with server([*store, "--min-free", "0"], model, folder) as port:
                ours.append(ask(port, day))
            _show(day, ours[-1], ours[0])
        # The stock server forgets all at its end, so it gets the three days in one process.
        with server(["-m", "mlx_lm", "server"], model, folder) as port:
            stock = [ask(port, day) for day in range(len(DAYS))]
    return 0
