"""What it takes to translate a client's request into a chat, and a model's answer back."""

from __future__ import annotations

import json
import time
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.tool_parsers.json_tools import parse_tool_call

from persist_cache.server.protocols.anthropic_answer import Answer, Usage, as_bytes
from persist_cache.server.protocols.anthropic_request import read_messages
from persist_cache.server.protocols.output import Finish, OutputReader
from scripts.benchmarks.common import Context, Report, Spread, Table
from tests.anthropic_bodies import agent_body

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
    return Report("translation", "Translating", values, [Table(title, columns, rows)])


def _timed(work: Any) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _say(pieces: list[str]) -> int:
    reader = OutputReader(TextStateMachine(_TRANSITIONS), parse=parse_tool_call)
    answer = Answer("m")
    written = len(as_bytes(answer.start()))
    for piece in pieces:
        written += len(as_bytes(answer.say(reader.feed(piece))))
    return written + len(as_bytes(answer.end(reader.finish or Finish("end"), Usage())))
