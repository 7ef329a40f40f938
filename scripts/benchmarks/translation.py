"""What it takes to translate a client's request into a chat, and a model's answer back.

And what of that is seen: the first event of a hit in memory, over Messages and as a chat, of one
server and one prompt, taking turns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.tool_parsers.json_tools import parse_tool_call

from persist_cache.server.protocols.answering import Usage, as_bytes
from persist_cache.server.protocols.anthropic_answer import MessageAnswer
from persist_cache.server.protocols.anthropic_request import read_messages
from persist_cache.server.protocols.output import Finish, OutputReader
from scripts.benchmarks.common import Context, Report, Spread, Table, take_turns
from tests.anthropic_bodies import agent_body
from tests.server_process import running
from tests.tiny_models import build_model_dir

_TRANSITIONS = {
    "normal": [("<think>", "reasoning"), ("<tool_call>", "tool")],
    "reasoning": [("</think>", "normal")],
    "tool": [("</tool_call>", "normal")],
}
_ANSWER = (
    "<think>" + "The tests have to run first. " * 20 + "</think>"
    "I run the tests. "
    * 40
    + '<tool_call>{"name": "tool_1", "arguments": {"path": "a"}}</tool_call>'
)
_PIECE = 4
"""Characters of a token, about."""


def run(context: Context) -> Report:
    repetitions = context.pick(50, 400)
    body = agent_body()
    size = len(json.dumps(body))
    pieces = [_ANSWER[at : at + _PIECE] for at in range(0, len(_ANSWER), _PIECE)]
    request = Spread.of([_timed(lambda: read_messages(body)) for _ in range(repetitions)])
    answer = Spread.of([_timed(lambda: _say(pieces)) for _ in range(repetitions)])
    values = {
        "body_bytes": size,
        "request_s": request.median,
        "pieces": len(pieces),
        "answer_s": answer.median,
    }
    rows = [
        ["request", f"{size // 1000} kB of JSON, decoded", request.show(1e3, 2)],
        ["answer", f"{len(pieces)} pieces, as events", answer.show(1e3, 2)],
    ]
    columns = ["direction", "size", "ms"]
    title = "Anthropic's Messages: median (lowest–highest)"
    tables = [Table(title, columns, rows)]
    with context.scratch() as scratch:
        first = first_events(scratch, context.pick(10, 60))
    ratio = first["messages"].median / first["chat"].median
    values |= {"first_event_ratio": ratio}
    rows = [[name, spread.show(1e3)] for name, spread in first.items()]
    rows.append(["messages / chat", f"{ratio:.2f}"])
    tables.append(Table("First event of a hit in memory", ["protocol", "ms"], rows))
    return Report("translation", "Translating", values, tables)


def first_events(folder: Path, repetitions: int) -> dict[str, Spread]:
    """Seconds until the first event with some of an answer, by protocol."""
    model = build_model_dir(folder / "model")
    system = "Answer the question of the user in a short sentence. " * 400
    asked: dict[str, Callable[[int], dict[str, Any]]] = {
        "/v1/chat/completions": lambda number: {
            "messages": [{"role": "system", "content": system}, _question(number)],
            "temperature": 0,
        },
        "/v1/messages": lambda number: {
            "model": "m",
            "system": system,
            "messages": [_question(number)],
        },
    }
    with running(model, folder / "store", folder, min_free_bytes=0) as server:

        def first(path: str, number: int) -> float:
            body = {**asked[path](number), "stream": True, "max_tokens": 4}
            begun = time.perf_counter()
            answer = server.request("POST", path, json=body, stream=True)
            lines = answer.iter_lines(chunk_size=1)
            next(line for line in lines if line.startswith(b"data: {"))
            found = time.perf_counter() - begun
            for _ in lines:
                pass
            return found

        for path in asked:
            first(path, -1)
        numbers = iter(range(2 * repetitions))
        cases = {path: lambda path=path: first(path, next(numbers)) for path in asked}
        found = take_turns(cases, repetitions)
    return {path.split("/")[2]: Spread.of(samples) for path, samples in found.items()}


def _question(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"Question {number}: what time is it?"}


def _timed(work: Any) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _say(pieces: list[str]) -> int:
    reader = OutputReader(TextStateMachine(_TRANSITIONS), parse=parse_tool_call)
    answer = MessageAnswer("m")
    written = len(as_bytes(answer.start(Usage())))
    for piece in pieces:
        written += len(as_bytes(answer.say(reader.feed(piece))))
    return written + len(as_bytes(answer.end(reader.finish or Finish("end"), Usage())))
