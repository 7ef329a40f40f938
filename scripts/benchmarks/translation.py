"""What it takes to translate a client's request into a chat, and a model's answer back.

Of Anthropic's Messages and of OpenAI's Responses. And what of that is seen: the first event of a
hit in memory, over both and as a chat, of one server and one prompt, taking turns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.tool_parsers.json_tools import parse_tool_call

from persist_cache.server.protocols.answering import Answer, Usage, as_bytes
from persist_cache.server.protocols.anthropic_answer import MessageAnswer
from persist_cache.server.protocols.anthropic_request import read_messages
from persist_cache.server.protocols.output import Finish, OutputReader
from persist_cache.server.protocols.responses_answer import ResponseAnswer
from persist_cache.server.protocols.responses_request import Manner, read_responses
from persist_cache.server.protocols.responses_tools import Toolbox
from scripts.benchmarks.common import Context, Report, Spread, Table, take_turns
from tests import anthropic_bodies, responses_bodies
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
_MOST = 1 << 16
_LIMIT = {"/v1/responses": "max_output_tokens"}


def run(context: Context) -> Report:
    repetitions = context.pick(50, 400)
    pieces = [_ANSWER[at : at + _PIECE] for at in range(0, len(_ANSWER), _PIECE)]
    protocols: dict[str, tuple[dict[str, Any], Callable[[Any], Any], Callable[[], Answer]]] = {
        "messages": (anthropic_bodies.agent_body(), read_messages, lambda: MessageAnswer("m")),
        "responses": (
            responses_bodies.agent_body(),
            read_responses,
            lambda: ResponseAnswer("m", Manner(Toolbox(), {})),
        ),
    }
    values: dict[str, Any] = {"pieces": len(pieces)}
    rows = []
    for name, (body, read, begin) in protocols.items():
        size = len(json.dumps(body))
        request = Spread.of([_timed(read, body) for _ in range(repetitions)])
        answer = Spread.of([_timed(_say, begin(), pieces) for _ in range(repetitions)])
        values[name] = {
            "body_bytes": size,
            "request_s": request.median,
            "answer_s": answer.median,
        }
        rows += [
            [name, "request", f"{size // 1000} kB of JSON, decoded", request.show(1e3, 2)],
            [name, "answer", f"{len(pieces)} pieces, as events", answer.show(1e3, 2)],
        ]
    columns = ["protocol", "direction", "size", "ms"]
    tables = [Table("Translating: median (lowest–highest)", columns, rows)]
    with context.scratch() as scratch:
        first = first_events(scratch, context.pick(10, 60))
    rows = [[name, spread.show(1e3)] for name, spread in first.items()]
    for name in protocols:
        ratio = first[name].median / first["chat"].median
        values[name]["first_event_ratio"] = ratio
        rows.append([f"{name} / chat", f"{ratio:.2f}"])
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
        "/v1/responses": lambda number: {"instructions": system, "input": [_question(number)]},
    }
    with running(model, folder / "store", folder, min_free_bytes=0) as server:

        def first(path: str, number: int) -> float:
            body = {**asked[path](number), "stream": True, _LIMIT.get(path, "max_tokens"): 4}
            begun = time.perf_counter()
            answer = server.request("POST", path, json=body, stream=True)
            # As it arrives: a line may be long, since Responses repeat their instructions.
            said = b""
            while b"data: {" not in said:
                said += answer.raw.read1(_MOST)
            found = time.perf_counter() - begun
            while answer.raw.read1(_MOST):
                pass
            return found

        for path in asked:
            first(path, -1)
        numbers = iter(range(len(asked) * repetitions))
        cases = {path: lambda path=path: first(path, next(numbers)) for path in asked}
        found = take_turns(cases, repetitions)
    return {path.split("/")[2]: Spread.of(samples) for path, samples in found.items()}


def _question(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"Question {number}: what time is it?"}


def _timed(work: Callable[..., object], *given: Any) -> float:
    begun = time.perf_counter()
    work(*given)
    return time.perf_counter() - begun


def _say(answer: Answer, pieces: list[str]) -> int:
    reader = OutputReader(TextStateMachine(_TRANSITIONS), parse=parse_tool_call)
    written = len(as_bytes(answer.start(Usage())))
    for piece in pieces:
        written += len(as_bytes(answer.say(reader.feed(piece))))
    return written + len(as_bytes(answer.end(reader.finish or Finish("end"), Usage())))
