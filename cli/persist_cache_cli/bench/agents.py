"""An agent's session against servers: cold, from memory, after SIGKILL, in another folder."""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persist_cache.prefill.loading import load_tokenizer
from persist_cache.server.lengths import context_tokens
from persist_cache.server.rendering import read_request, render
from persist_cache_cli.bench.sessions import as_chat, session
from persist_cache_cli.bench.timing import BenchError, Process

COLD, MEMORY, KILLED, FOLDER = (
    "first request, cold",
    "tool turns, from memory",
    "after SIGKILL",
    "another folder",
)
WAYS = (COLD, MEMORY, KILLED, FOLDER)
_SIDE = "beside"
_HERE, _THERE = "/home/me/projects/first-one", "/home/me/code/another"
_TURNS, _TOOLS = 4, 12
_UNEQUAL = 1.5
"""Cold runs that differ by more than this make a range of a factor."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request of a run.

    Attributes:
        server: That answered.
        run: Its number.
        way: What was known of its prompt; `beside` for titles and sub-agents.
        first_s: Seconds to the first token.
        total_s: Seconds in all.
        prompt_tokens: Of the prompt.
        cached_tokens: Of these, that were not computed.
        output_tokens: Of the answer.
    """

    server: str
    run: int
    way: str
    first_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one way with one server.

    Attributes:
        server: That answered.
        way: What was known of the prompts.
        prompt_tokens: Median.
        cached_tokens: Median of those that were not computed.
        first_s: Median, lowest and highest of the runs.
        faster: Median, lowest and highest of: cold / this way, of the same run.
        is_range: Cold runs differ so much that only the range of that says something.
    """

    server: str
    way: str
    prompt_tokens: int
    cached_tokens: int
    first_s: tuple[float, float, float]
    faster: tuple[float, float, float]
    is_range: bool


def measure(
    model: str,
    folder: Path,
    *,
    servers: Sequence[str],
    runs: int,
    tokens: int,
    output_tokens: int,
    tell: Callable[[str], None],
) -> list[Sample]:
    """Hold the sessions.

    Args:
        model: Folder or hub id.
        folder: For stores and logs.
        servers: `OURS` and `STOCK`, or one of them.
        runs: Sessions with each, every one with words of its own.
        tokens: Of the first prompt, about.
        output_tokens: Of each answer.
        tell: Says what is being done.

    Raises:
        BenchError: What was measured says nothing, such as answers of unequal length.
    """
    tokenizer = load_tokenizer(model)
    known = context_tokens_of(model)
    is_bounded = known is not None and known < 2 * tokens
    if known is not None and is_bounded:
        tokens = known // 2
    words = fitting_words(tokenizer, tokens)
    longest = _num_tokens(tokenizer, _bodies(words, 0, _HERE)[-1]) + output_tokens
    if known is not None and known < longest:
        raise BenchError(
            f"{model} has a context of {known:,} tokens, and the last turn needs {longest:,}; "
            "take another model"
        )
    if is_bounded:
        tell(f"{model} has a context of {known:,} tokens: the first prompt takes half of it")
    # An answer that ended by itself would be of another length with another model.
    ends = {str(one): -100 for one in tokenizer.eos_token_ids}
    more = {"max_tokens": output_tokens, "temperature": 0.0, "logit_bias": ends}
    samples: list[Sample] = []
    for run in range(runs):
        here = [{**as_chat(one), **more} for one in _bodies(words, run, _HERE)]
        there = {**as_chat(_bodies(words, run, _THERE)[1]), **more}
        for server in servers:
            place = folder / f"{server}-{run}"
            place.mkdir(parents=True)
            begin = f"{server}, run {run + 1} of {runs}: "
            samples += _run(server, model, place, run, here, there, begin, tell)
    lengths = sorted({one.output_tokens for one in samples})
    if lengths != [output_tokens]:
        raise BenchError(
            f"answers have {', '.join(map(str, lengths))} tokens instead of {output_tokens} each; "
            "times of unequal answers say nothing"
        )
    return samples


def _bodies(words: int, run: int, folder: str) -> list[dict[str, Any]]:
    size = {"user_turns": 1, "tool_turns": _TURNS, "tools": _TOOLS, "words": words}
    return list(session(**size, seed=run, hosted=False, folder=folder))


def _run(
    server: str,
    model: str,
    place: Path,
    run: int,
    here: list[Any],
    there: Any,
    begin: str,
    tell: Callable[[str], None],
) -> list[Sample]:
    """One session: its title, its turns with a sub-agent between, a kill before the last one."""
    found: list[Sample] = []
    told: set[str] = set()

    def ask(process: Process, body: Any, way: str) -> None:
        if way not in told and way != _SIDE:
            told.add(way)
            tell(f"{begin}{way}")
        said = process.ask(body)
        values = (said.prompt_tokens, said.cached_tokens, said.output_tokens)
        found.append(Sample(server, run, way, said.first_s, said.total_s, *values))

    flags = ["--stabilize", "env,date"]
    main = [body for body in here[1:] if _is_of(body, here[1])]
    with Process(server, model, place, flags) as process:
        for body in here[:-1]:
            is_main = any(body is one for one in main)
            ask(process, body, COLD if body is here[1] else MEMORY if is_main else _SIDE)
        process.settle()
        process.kill()
    with Process(server, model, place, flags) as process:
        ask(process, here[-1], KILLED)
        ask(process, there, FOLDER)
    return found


def _is_of(body: Any, first: Any) -> bool:
    """Whether a request goes on with the conversation that another one began."""
    return bool(body["messages"][:2] == first["messages"][:2])


def fitting_words(tokenizer: Any, tokens: int) -> int:
    """The size of a session whose first prompt has so many tokens, about."""

    def counted(words: int) -> int:
        return _num_tokens(tokenizer, _bodies(words, 0, _HERE)[1])

    small, large = counted(10), counted(60)
    each = max(1.0, (large - small) / 50)
    return max(1, round(10 + (tokens - small) / each))


def _num_tokens(tokenizer: Any, body: dict[str, Any]) -> int:
    """Of the prompt of a request."""
    logging.disable(logging.WARNING)  # mlx-lm warns of tools, which are the bench's own
    try:
        request = read_request(as_chat(body))
        return len(render(tokenizer, request, template_args={}).tokens)
    finally:
        logging.disable(logging.NOTSET)


def context_tokens_of(model: str) -> int | None:
    """Tokens that a model was made for, if its configuration says so."""
    from persist_cache.fingerprint.model_files import folder_of
    from persist_cache.prefill import loadable

    folder = folder_of(model)
    return None if folder is None else context_tokens(loadable.read_config(folder))


def summary(samples: Sequence[Sample]) -> list[Row]:
    """A row for each server and way."""
    rows = []
    for server in dict.fromkeys(one.server for one in samples):
        by_run = {
            way: [
                statistics.median(one.first_s for one in samples if _is(one, server, way, run))
                for run in sorted({one.run for one in samples})
            ]
            for way in WAYS
        }
        cold = by_run[COLD]
        for way in WAYS:
            these = [one for one in samples if one.server == server and one.way == way]
            factors = [before / now for before, now in zip(cold, by_run[way], strict=True)]
            rows.append(
                Row(
                    server,
                    way,
                    round(statistics.median(one.prompt_tokens for one in these)),
                    round(statistics.median(one.cached_tokens for one in these)),
                    _spread(by_run[way]),
                    _spread(factors),
                    max(cold) > _UNEQUAL * min(cold),
                )
            )
    return rows


def _is(one: Sample, server: str, way: str, run: int) -> bool:
    return (one.server, one.way, one.run) == (server, way, run)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def as_json(
    samples: Sequence[Sample], rows: Sequence[Row], options: dict[str, Any]
) -> dict[str, Any]:
    """All that was measured, with what it depends on."""
    import platform
    from importlib import metadata

    names = ("persist-cache", "mlx-lm", "mlx")
    return {
        "options": options,
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
        "versions": {name: metadata.version(name) for name in names},
        "summary": [asdict(row) for row in rows],
        "samples": [asdict(one) for one in samples],
    }


def cells(row: Row) -> list[str]:
    """A row of the table, without the server."""
    median, low, high = row.faster
    faster = f"{low:.1f}–{high:.1f} ×" if row.is_range else f"{median:.1f} × ({low:.1f}–{high:.1f})"
    first, least, most = row.first_s
    return [
        row.way,
        f"{row.prompt_tokens:,}",
        f"{row.cached_tokens:,}",
        f"{first:.2f} s ({least:.2f}–{most:.2f})",
        "–" if row.way == COLD else faster,
    ]
