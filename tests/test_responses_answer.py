"""Answers in the form of OpenAI's Responses, read by the official client.

Nothing is served here: the client is given the bytes of an answer, and must understand them; and
each event has all that the client's types say.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from persist_cache.server.lengths import TooLongError
from persist_cache.server.protocols.answering import Event, Usage, as_bytes
from persist_cache.server.protocols.output import (
    BrokenCall,
    Call,
    Finish,
    Part,
    Reasoning,
    Text,
)
from persist_cache.server.protocols.responses_answer import SIGN_S, ResponseAnswer
from persist_cache.server.protocols.responses_items import unsealed
from persist_cache.server.protocols.responses_request import Manner, read_responses
from persist_cache.server.validation import RefusedError
from tests import official
from tests.responses_bodies import PATCH

USAGE = Usage(input=3, read=20, written=7, output=5, reasoning=2)
CLOCK = Call("clock", {"city": "Zürich", "at": [1, None]})
END = Finish("end")
SPACE = {
    "type": "namespace",
    "name": "mcp__cal",
    "description": "Dates.",
    "tools": [{"type": "function", "name": "day", "parameters": {}}],
}
ANSWERS: list[list[Part]] = [
    [],
    [Text("Hello")],
    [Text("a "), Text("b\n")],
    [Text(" \n")],
    [Reasoning("Hm"), Reasoning("."), Text("\n\nSo")],
    [Text("I look.\n"), CLOCK],
    [Text("\n"), CLOCK, CLOCK, Text("done")],
    [Text("a "), Reasoning("b"), CLOCK, Reasoning("c")],
    [Reasoning("b"), Text("\n"), CLOCK],
    [BrokenCall("<tool_call>{</tool_call>")],
    [Call("patch", {"input": "a\nb"}), Call("mcp__cal__day", {"of": 1})],
]


def client(body: bytes, kind: str = "text/event-stream") -> official.openai.OpenAI:
    """A client whose every request has this answer."""
    answer = httpx2.Response(200, headers={"content-type": kind}, content=body)
    transport = httpx2.MockTransport(lambda _: answer)
    return official.openai.OpenAI(
        api_key="none", max_retries=0, http_client=httpx2.Client(transport=transport)
    )


def manner(**body: Any) -> Manner:
    tools = [PATCH, SPACE, {"type": "function", "name": "clock"}]
    return read_responses({"input": "Hello", "tools": tools, **body})[1]


def answer(**body: Any) -> ResponseAnswer:
    numbers = itertools.count()
    return ResponseAnswer(
        "gpt-large", manner(**body), new_id=lambda: str(next(numbers)), now=lambda: 1_800_000_000
    )


def events(parts: Sequence[Part], finish: Finish = END, **body: Any) -> list[Event]:
    said = answer(**body)
    return [
        *said.start(Usage()),
        *itertools.chain.from_iterable(said.say([part]) for part in parts),
        *said.end(finish, USAGE),
    ]


def whole(parts: Sequence[Part], finish: Finish = END, **body: Any) -> dict[str, Any]:
    said = answer(**body)
    said.say(parts)
    return said.whole(finish, USAGE)


def read(said: Sequence[Event]) -> list[Any]:
    """What the official client makes of events."""
    with client(as_bytes(said)).responses.stream(model="m", input="a") as stream:
        return list(stream)


# ---- form ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", ANSWERS)
@pytest.mark.parametrize("reasoning", [None, {"summary": "auto"}])
def test_stream_adds_up_to_the_whole_response(parts: list[Part], reasoning: Any) -> None:
    body = {"reasoning": reasoning, "include": ["reasoning.encrypted_content"]}
    said = events(parts, **body)
    expected = whole(parts, **body)

    items: list[dict[str, Any]] = []
    for name, data in said:
        if name == "response.output_item.added":
            assert data["output_index"] == len(items)
            items.append({**data["item"]})
        elif name in ("response.content_part.added", "response.reasoning_summary_part.added"):
            member = "content" if "content_index" in data else "summary"
            items[-1][member] = [dict(data["part"])]
        elif name.endswith("_text.delta"):
            member = "content" if "content_index" in data else "summary"
            items[-1][member][0]["text"] += data["delta"]
        elif name.endswith(("arguments.delta", "input.delta")):
            member = "arguments" if "arguments" in name else "input"
            items[-1][member] += data["delta"]
        elif name == "response.output_item.done":
            grown = {**items[-1], "status": "completed"}
            if "encrypted_content" in grown:
                grown["encrypted_content"] = data["item"]["encrypted_content"]
            assert grown == data["item"]
            assert data["output_index"] == len(items) - 1

    final = said[-1][1]["response"]
    assert final == expected
    assert [one["id"] for one in final["output"]] == [one["id"] for one in items]
    assert said[0][1]["response"]["output"] == []


@functools.cache
def _event_types() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(official.openai.types.responses.ResponseStreamEvent)


@pytest.mark.parametrize("parts", ANSWERS)
def test_every_event_is_whole_and_numbered(parts: list[Part]) -> None:
    said = events(parts, reasoning={"summary": "detailed"}) + events(parts)

    for name, data in said:
        _event_types().validate_python({"type": name, **data}, strict=True)
    numbers = [data["sequence_number"] for _, data in said]
    half = len(said) // 2
    assert numbers[:half] == list(range(half))
    official.openai.types.responses.Response.model_validate(whole(parts), strict=True)


@pytest.mark.parametrize("parts", ANSWERS)
def test_official_client_reads_the_same_in_both_ways(parts: list[Part]) -> None:
    found = read(events(parts))[-1].response
    body = json.dumps(whole(parts)).encode()
    plain = client(body, "application/json").responses.create(model="m", input="a")

    assert found.output_text == plain.output_text
    assert [one.type for one in found.output] == [one.type for one in plain.output]
    assert plain.usage is not None
    assert found.usage.total_tokens == plain.usage.total_tokens == 35


# ---- what is said --------------------------------------------------------------------------------


def test_thoughts_are_content_or_the_summary_that_is_asked_for() -> None:
    parts: list[Part] = [Reasoning("Hm."), Text("So.")]

    plain = whole(parts)["output"][0]
    asked = whole(parts, reasoning={"summary": "auto"})["output"][0]
    sealed = whole(parts, include=["reasoning.encrypted_content"])["output"][0]

    assert plain["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert (plain["summary"], plain["encrypted_content"]) == ([], None)
    assert (asked["content"], asked["summary"]) == ([], [{"type": "summary_text", "text": "Hm."}])
    assert unsealed(sealed["encrypted_content"]) == "Hm."


def test_calls_come_back_as_what_the_client_defined() -> None:
    found = whole(
        [Call("patch", {"input": "a"}, "abc"), Call("patch", {"b": 1}), Call("mcp__cal__day", {})]
    )["output"]

    assert [(one["type"], one["name"], one["call_id"]) for one in found] == [
        ("custom_tool_call", "patch", "abc"),
        ("custom_tool_call", "patch", "call_3"),
        ("function_call", "day", "call_5"),
    ]
    assert [one["input"] for one in found[:2]] == ["a", '{"b": 1}']
    assert found[2]["namespace"] == "mcp__cal"


def test_white_space_in_front_of_a_call_is_left_out() -> None:
    assert [one["type"] for one in whole([Text("\n"), CLOCK])["output"]] == ["function_call"]
    assert whole([Text("a\n"), CLOCK])["output"][0]["content"][0]["text"] == "a"
    assert whole([Text("a\n")])["output"][0]["content"][0]["text"] == "a\n"


@pytest.mark.parametrize("finish", [Finish("length"), Finish("context")])
def test_answer_that_is_cut_off_is_incomplete(finish: Finish) -> None:
    said = events([Text("a")], finish)

    assert said[-1][0] == "response.incomplete"
    found = said[-1][1]["response"]
    assert (found["status"], found["output"][0]["status"]) == ("incomplete", "incomplete")
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert read(said)[-1].response.output_text == "a"


def test_what_was_asked_for_is_repeated_as_it_is_done() -> None:
    found = whole(
        [],
        instructions="Be brief.",
        metadata={"a": "b"},
        store=True,
        tool_choice="required",
        parallel_tool_calls=False,
        prompt_cache_key="thread",
        max_output_tokens=9,
        text={"format": {"type": "json_schema", "name": "a", "schema": {}}},
        service_tier="priority",
    )

    assert found["instructions"] == "Be brief."
    assert (found["store"], found["tool_choice"], found["service_tier"]) == (
        *(False, "auto", "default"),
    )
    assert found["parallel_tool_calls"] is False
    assert (found["metadata"], found["prompt_cache_key"]) == ({"a": "b"}, "thread")
    assert found["text"] == {"format": {"type": "text"}}
    assert len(found["tools"]) == 3


def test_usage_says_what_was_read_and_written() -> None:
    assert whole([])["usage"] == {
        "input_tokens": 30,
        "input_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 7},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 35,
    }


# ---- while it takes long, and when it fails ------------------------------------------------------


def test_client_that_waits_gets_an_event_every_fifteen_seconds() -> None:
    at = 0.0
    said = ResponseAnswer("m", manner(), clock=lambda: at)
    begun = said.start(Usage())
    assert SIGN_S == 15

    at = 14.9
    assert said.sign() == []
    at = 15.0
    (sign,) = said.sign()
    at = 29.0
    assert said.sign() == []
    text = said.say([Text("a")])
    at = 43.0
    assert said.sign() == [], "any event is a sign of life"
    at = 45.0
    (late,) = said.sign()

    assert sign[0] == late[0] == "response.in_progress"
    stream = [*begun, sign, *text, late, *said.end(END, USAGE)]
    assert [data["sequence_number"] for _, data in stream] == list(range(len(stream)))
    assert read(stream)[-1].response.output_text == "a"


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (RefusedError(500, "The model failed."), "server_error"),
        (RefusedError(400, "The template refuses it."), "invalid_prompt"),
        (TooLongError(9, 8, "messages"), "context_length_exceeded"),
    ],
)
def test_stream_that_fails_ends_with_a_failed_response(refusal: RefusedError, code: str) -> None:
    said = answer()
    stream = [*said.start(Usage()), *said.say([Text("a")]), *said.fail(refusal)]

    last = read(stream)[-1]

    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert (last.response.error.code, last.response.error.message) == (code, str(refusal))
