"""Answers in the form of Anthropic's Messages, read by the official client.

Nothing is served here: the client is given the bytes of an answer, and must understand them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from persist_cache.server.protocols import anthropic_answer as answers
from persist_cache.server.protocols.answering import Event, Usage, as_bytes
from persist_cache.server.protocols.anthropic_answer import MessageAnswer, usage_json
from persist_cache.server.protocols.output import (
    BrokenCall,
    Call,
    Finish,
    Part,
    Reasoning,
    Text,
)
from persist_cache.server.validation import RefusedError
from tests import official

USAGE = Usage(input=3, read=20, written=7, output=5)
CLOCK = Call("clock", {"city": "Zürich", "at": [1, None]})
END = Finish("end")


def client(
    body: bytes, status: int = 200, kind: str = "text/event-stream"
) -> official.anthropic.Anthropic:
    """A client whose every request has this answer."""
    answer = httpx2.Response(status, headers={"content-type": kind}, content=body)
    transport = httpx2.MockTransport(lambda _: answer)
    return official.anthropic.Anthropic(
        api_key="none", max_retries=0, http_client=httpx2.Client(transport=transport)
    )


def answer() -> MessageAnswer:
    numbers = itertools.count()
    return MessageAnswer("claude-large", new_id=lambda: str(next(numbers)))


def events(parts: Sequence[Part], finish: Finish = END) -> list[Event]:
    said = answer()
    return [
        *said.start(dataclasses.replace(USAGE, output=0)),
        *itertools.chain.from_iterable(said.say([part]) for part in parts),
        *said.end(finish, USAGE),
    ]


def message(parts: Sequence[Part], finish: Finish = END) -> dict[str, Any]:
    said = answer()
    said.say(parts)
    return said.whole(finish, USAGE)


def streamed(parts: Sequence[Part], finish: Finish = END) -> dict[str, Any]:
    """The message that the client makes of the stream."""
    with client(as_bytes(events(parts, finish))).messages.stream(
        model="m", max_tokens=8, messages=[{"role": "user", "content": "a"}]
    ) as stream:
        return stream.get_final_message().to_dict()


ANSWERS: list[list[Part]] = [
    [],
    [Text("Hel"), Text("lo 🙂 ")],
    [Text("\n")],
    [Reasoning("Hm"), Reasoning(".\n"), Text("\n\n"), Text("Yes.")],
    [Text("I look."), Text("\n"), CLOCK, Text("\n"), CLOCK, Text("\n")],
    [Reasoning("Hm."), Text("\n\n"), CLOCK],
    [Text("a"), BrokenCall("<tool_call>{</tool_call>"), Text("b")],
    [Text("a\n"), Reasoning("b"), Text("c"), CLOCK, Text("d")],
]


@pytest.mark.parametrize("parts", ANSWERS)
def test_client_makes_the_same_message_of_the_events_as_of_the_object(parts: list[Part]) -> None:
    whole = json.dumps(message(parts)).encode()

    plain = client(whole, kind="application/json").messages.create(
        model="m", max_tokens=8, messages=[{"role": "user", "content": "a"}]
    )

    assert streamed(parts) == plain.to_dict()


@pytest.mark.parametrize(
    ("parts", "content"),
    [
        (ANSWERS[0], []),
        (ANSWERS[1], [("text", "Hello 🙂 ")]),
        (ANSWERS[2], [("text", "\n")]),
        (ANSWERS[3], [("thinking", "Hm.\n"), ("text", "\n\nYes.")]),
        (ANSWERS[4], [("text", "I look."), ("tool_use", "clock"), ("tool_use", "clock")]),
        (ANSWERS[5], [("thinking", "Hm."), ("tool_use", "clock")]),
        (ANSWERS[6], [("text", "a<tool_call>{</tool_call>b")]),
        (
            ANSWERS[7],
            [
                ("text", "a\n"),
                ("thinking", "b"),
                ("text", "c"),
                ("tool_use", "clock"),
                ("text", "d"),
            ],
        ),
    ],
)
def test_parts_become_blocks_in_their_order(
    parts: list[Part], content: list[tuple[str, str]]
) -> None:
    found = message(parts)["content"]

    assert [
        (one["type"], one["name"] if one["type"] == "tool_use" else one[one["type"]])
        for one in found
    ] == content
    assert all(one["input"] == CLOCK.arguments for one in found if one["type"] == "tool_use")
    assert all(one["signature"] for one in found if one["type"] == "thinking")


@pytest.mark.parametrize(
    ("parts", "finish", "reason", "word"),
    [
        ([Text("a")], END, "end_turn", None),
        ([Text("a")], Finish("length"), "max_tokens", None),
        ([Text("a")], Finish("stop_word", "END"), "stop_sequence", "END"),
        ([CLOCK], END, "tool_use", None),
        ([CLOCK, Text("a")], Finish("length"), "max_tokens", None),
        ([BrokenCall("<tool_call>{</tool_call>")], END, "end_turn", None),
    ],
)
def test_stop_reason_is_the_true_one(
    parts: list[Part], finish: Finish, reason: str, word: str | None
) -> None:
    for found in (message(parts, finish), streamed(parts, finish)):
        assert (found["stop_reason"], found.get("stop_sequence")) == (reason, word)


def test_every_block_is_begun_and_ended_once_and_in_turn() -> None:
    for parts in ANSWERS:
        opened: list[int] = []
        done = 0
        for name, data in events(parts):
            if name == "content_block_start":
                assert not opened
                assert data["index"] == done
                opened.append(data["index"])
            elif name == "content_block_delta":
                assert opened == [data["index"]]
            elif name == "content_block_stop":
                assert opened.pop() == data["index"]
                done += 1
        assert not opened
        assert [name for name, _ in events(parts)][-2:] == ["message_delta", "message_stop"]


def test_text_is_said_as_it_comes() -> None:
    said = answer()

    deltas = [data["delta"]["text"] for name, data in said.say([Text("a b ")]) if "delta" in data]

    assert deltas == ["a b"], "white space waits for what follows it"
    assert [data["delta"]["text"] for _, data in said.say([Text("c")])] == [" c"]


def test_calls_have_ids_of_their_own_or_the_models() -> None:
    found = message([CLOCK, Call("a", {}, "abc123def"), CLOCK])["content"]

    assert [one["id"] for one in found] == ["toolu_1", "abc123def", "toolu_2"]


def test_usage_is_disjoint_and_complete_at_the_end() -> None:
    found = streamed([Text("a")])["usage"]

    assert {name: found[name] for name in found if name.endswith("_tokens")} == {
        "input_tokens": 3,
        "cache_read_input_tokens": 20,
        "cache_creation_input_tokens": 7,
        "output_tokens": 5,
    }
    hour = usage_json(Usage(written=7, kept_s=3600))["cache_creation"]
    assert hour == {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 7}


def test_pings_and_early_starts_change_nothing() -> None:
    said = events([Text("a")])
    with client(as_bytes([said[0], *answer().sign(), *said[1:]])).messages.stream(
        model="m", max_tokens=8, messages=[{"role": "user", "content": "a"}]
    ) as stream:
        found = stream.get_final_message().to_dict()

    assert found == streamed([Text("a")])


@pytest.mark.parametrize(
    ("status", "kind", "error"),
    [
        (400, "invalid_request_error", "BadRequestError"),
        (401, "authentication_error", "AuthenticationError"),
        (403, "permission_error", "PermissionDeniedError"),
        (404, "not_found_error", "NotFoundError"),
        (405, "invalid_request_error", "APIStatusError"),
        (413, "request_too_large", "APIStatusError"),
        (429, "rate_limit_error", "RateLimitError"),
        (500, "api_error", "InternalServerError"),
        (503, "overloaded_error", "APIStatusError"),
    ],
)
def test_refusals_have_the_protocols_form(status: int, kind: str, error: str) -> None:
    body = json.dumps(answers.error_object(RefusedError(status, "No."))).encode()

    with pytest.raises(getattr(official.anthropic, error)) as raised:
        client(body, status, "application/json").messages.create(
            model="m", max_tokens=8, messages=[{"role": "user", "content": "a"}]
        )

    assert raised.value.status_code == status
    assert raised.value.body == {"type": "error", "error": {"type": kind, "message": "No."}}


def test_stream_that_fails_ends_with_an_error_event() -> None:
    said = [*answer().start(Usage()), *answer().fail(RefusedError(500, "The model failed."))]

    with (
        pytest.raises(official.anthropic.APIStatusError, match="The model failed"),
        client(as_bytes(said)).messages.stream(
            model="m", max_tokens=8, messages=[{"role": "user", "content": "a"}]
        ) as stream,
    ):
        stream.get_final_message()
