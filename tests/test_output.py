"""What a model said is read as `mlx_lm.server` reads it for chat, and nothing is lost."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm import server as upstream
from mlx_lm.generate import TextStateMachine
from mlx_lm.tool_parsers import json_tools, mistral, pythonic

from persist_cache.server.protocols.output import (
    BrokenCall,
    Call,
    Finish,
    OutputReader,
    Part,
    Reasoning,
    Text,
    joined,
)

TRANSITIONS = {
    "normal": [("<think>", "reasoning"), ("<tool_call>", "tool"), ("<|sep|>", "normal")],
    "reasoning": [("</think>", "normal"), ("<tool_call>", "tool")],
    "tool": [("</tool_call>", "normal")],
}
CLOCK = '<tool_call>{"name": "clock", "arguments": {"city": "Bern <b>"}}</tool_call>'
BROKEN = '<tool_call>{"name": "clock", "arguments": {"city": </tool_call>'

Piece = tuple[str, int, str | None]


def read(pieces: Sequence[Piece], **options: Any) -> tuple[list[Part], Finish | None]:
    """All parts of an output, with neighbours of one kind joined."""
    options = {"parse": json_tools.parse_tool_call, **options}
    reader = OutputReader(TextStateMachine(options.pop("transitions", TRANSITIONS)), **options)
    found = [part for piece in pieces for part in reader.feed(*piece)]
    return joined([*found, *reader.close()]), reader.finish


def cut(text: str, drawn: random.Random, finish: str) -> list[Piece]:
    """A text in pieces as they come, with the reason why it ended."""
    pieces: list[str] = []
    while text:
        size = drawn.randrange(1, 9)
        pieces.append(text[:size])
        text = text[size:]
    if finish == "stop":
        pieces.append("")  # the token that ends an answer has no text
    pieces = pieces or [""]
    reasons = [*[None] * (len(pieces) - 1), finish]
    return [(piece, 1, reason) for piece, reason in zip(pieces, reasons, strict=True)]


def said_by_upstream(pieces: Sequence[Piece], initial: str) -> dict[str, Any]:
    """The message and the finish reason that upstream's chat handler answers with."""
    context = SimpleNamespace(
        tool_parser=json_tools.parse_tool_call,
        text_sm=TextStateMachine(TRANSITIONS),
        initial_state=initial,
        prompt=[1],
        prompt_cache_count=0,
        stop=lambda: None,
    )
    answer = (SimpleNamespace(text=a, token=b, finish_reason=c) for a, b, c in pieces)
    handler: Any = object.__new__(upstream.APIHandler)
    vars(handler).update(
        stream=False,
        requested_model="m",
        requested_draft_model="m",
        adapter=None,
        request_id="r",
        system_fingerprint="f",
        object_type="chat.completion",
        created=0,
        wfile=io.BytesIO(),
        response_generator=SimpleNamespace(generate=lambda *_, **__: (context, answer)),
        send_header=lambda *_: None,
        end_headers=lambda: None,
        _set_completion_headers=lambda *_: None,
    )
    for kind in (
        upstream.SamplingArguments,
        upstream.LogitsProcessorArguments,
        upstream.GenerationArguments,
    ):
        for field in dataclasses.fields(kind):
            setattr(handler, field.name, None)
    handler.top_logprobs = -1
    handler.handle_completion(SimpleNamespace(tools=None), [])
    choice: dict[str, Any] = json.loads(handler.wfile.getvalue())["choices"][0]
    return choice


def as_upstream(parts: Sequence[Part], finish: Finish | None) -> dict[str, Any]:
    """Parts as upstream reports them: by kind, without what it cannot parse."""
    assert finish is not None
    calls = [
        (part.name, json.dumps(part.arguments, ensure_ascii=False))
        for part in parts
        if isinstance(part, Call)
    ]
    tried = any(isinstance(part, (Call, BrokenCall)) for part in parts)
    reason = "length" if finish.reason == "length" else "tool_calls" if tried else "stop"
    return {
        "content": "".join(part.text for part in parts if isinstance(part, Text)),
        "reasoning": "".join(part.text for part in parts if isinstance(part, Reasoning)),
        "calls": calls,
        "finish": reason,
    }


def test_parts_are_those_of_upstreams_chat_handler() -> None:
    for seed in range(300):
        check_against_upstream(random.Random(seed))


def check_against_upstream(drawn: random.Random) -> None:
    fragments = [
        *("Hello ", "a < b", "<", "<to", "</", "é🙂\n\n", "<|se", "<|sep|>", "tool_call>", "x"),
        *("<think>\n", "</think>\n\n", "<tool_call>", "</tool_call>", CLOCK, BROKEN, CLOCK),
    ]
    text = "".join(drawn.choices(fragments, k=drawn.randrange(12)))
    # At the end of its own, upstream drops what may be a mark; that is a test of its own.
    finish = drawn.choice(["stop", "length"])
    text += "." if finish == "stop" else ""
    initial = drawn.choice(["normal", "reasoning"])
    pieces = cut(text, drawn, finish)

    parts, finished = read(pieces, initial=initial)

    theirs = said_by_upstream(pieces, initial)
    message = theirs["message"]
    assert as_upstream(parts, finished) == {
        "content": message.get("content") or "",
        "reasoning": message.get("reasoning") or "",
        "calls": [
            (one["function"]["name"], one["function"]["arguments"])
            for one in message.get("tool_calls") or []
        ],
        "finish": theirs["finish_reason"],
    }


def test_parts_do_not_depend_on_how_the_text_was_cut() -> None:
    text = f"<think>Is it\nlate?</think>\n\nLet me <look>.{CLOCK}\n{BROKEN}{CLOCK} END more"
    options: dict[str, Any] = {"stop_words": {" END": (7, 8), "later": (9,)}}

    parts, finish = read([(text, 1, "length")], **options)

    for seed in range(100):
        pieces = cut(text, random.Random(seed), "length")
        assert read(pieces, **options) == (parts, finish), seed
    assert finish == Finish("stop_word", " END")
    clock = Call("clock", {"city": "Bern <b>"})
    assert parts == [
        Reasoning("Is it\nlate?"),
        Text("\n\nLet me <look>."),
        clock,
        Text("\n"),
        BrokenCall(BROKEN),
        clock,
    ]


@pytest.mark.parametrize("tail", ["<", "<tool", "<thi", "</thin", " <|se"])
def test_text_that_began_like_a_mark_is_there_when_the_model_ends(tail: str) -> None:
    parts, finish = read([(f"a {tail}", 1, None), ("", 2, "stop")])

    assert (parts, finish) == ([Text(f"a {tail}")], Finish("end"))


@pytest.mark.parametrize(
    "call",
    [
        BROKEN,
        "<tool_call></tool_call>",
        "<tool_call>[]</tool_call>",
        "<tool_call>[1]</tool_call>",
        "<tool_call>null</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": 0}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": "Bern"}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": {"n": NaN}}</tool_call>',
        f"<tool_call>{'[' * 100_000}</tool_call>",
    ],
)
def test_call_that_cannot_be_parsed_comes_back_as_it_was_written(call: str) -> None:
    assert read([(f"a{call}b", 1, "length")])[0] == [Text("a"), BrokenCall(call), Text("b")]


def test_call_that_was_cut_off_comes_back_as_it_was_written() -> None:
    cut_off = '<tool_call>{"name": "clock", "argum'

    assert read([(cut_off, 1, "length")]) == ([BrokenCall(cut_off)], Finish("length"))


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [('{"city": "Rom"}', {"city": "Rom"}), ('"{\\"city\\": 1}"', {"city": 1}), ("null", {})],
)
def test_arguments_are_an_object_however_they_were_written(
    arguments: str, meant: dict[str, Any]
) -> None:
    text = f'<tool_call>{{"name": "clock", "arguments": {arguments}}}</tool_call>'

    assert read([(text, 1, "stop")])[0] == [Call("clock", meant)]


def test_several_calls_between_one_pair_of_marks() -> None:
    machine = {
        "normal": [("<|tool_call_start|>", "tool")],
        "tool": [("<|tool_call_end|>", "normal")],
    }
    text = "<|tool_call_start|>[a(x=1), b(y=True)]<|tool_call_end|>"

    parts, _ = read([(text, 1, "stop")], transitions=machine, parse=pythonic.parse_tool_call)

    assert parts == [Call("a", {"x": 1}), Call("b", {"y": True})]


def test_calls_without_an_end_mark_keep_the_models_own_ids() -> None:
    machine = {"normal": [("[TOOL_CALLS]", "tool")], "tool": []}
    text = '[TOOL_CALLS][{"name": "a", "arguments": {}, "id": "abc123def"}]'

    parts, _ = read([(text, 1, "stop")], transitions=machine, parse=mistral.parse_tool_call)

    assert parts == [Call("a", {}, "abc123def")]


def test_without_a_parser_what_looks_like_a_call_is_text() -> None:
    assert read([(f"a{CLOCK}b", 1, "stop")], parse=None)[0] == [Text(f"a{CLOCK}b")]


@pytest.mark.parametrize(
    ("pieces", "left"),
    [
        # The token that completes the word has no text, or it has, or there was no such token.
        ([("Yes.\nST", 3, None), ("", 4, "stop")], "Yes.\n"),
        ([("Yes.\nST", 3, None), ("OP", 4, "stop")], "Yes.\n"),
        ([("Yes.\nS", 8, None), ("TOP and", 9, None), (" more", 5, None)], "Yes.\n"),
        ([("Yes.\nSTOP", 4, "length")], "Yes.\n"),
        ([("STOP", 8, None)], ""),
        ([("Yes.\nQUISTO", 3, None), ("", 4, "stop")], "Yes.\nQUI"),
        ([("Yes.\n<STST", 3, None), ("", 4, "stop")], "Yes.\n<ST"),
    ],
)
def test_stop_word_ends_the_output_in_front_of_it_and_is_named(
    pieces: list[Piece], left: str
) -> None:
    parts, finish = read(pieces, stop_words={"STOP": (3, 4), "QUIT": (11,)})

    assert finish == Finish("stop_word", "STOP")
    assert parts == ([Text(left)] if left else [])


def test_of_stop_words_the_one_that_is_complete_first_is_met() -> None:
    assert read([("abcd", 1, None)], stop_words={"abcd": (1,), "bc": (2,)}) == (
        [Text("a")],
        Finish("stop_word", "bc"),
    )


def test_nothing_is_read_behind_the_end() -> None:
    reader = OutputReader(TextStateMachine(TRANSITIONS), stop_words={"END": (1,)})

    assert reader.feed("a END b") == [Text("a ")]
    assert reader.feed(" c") == []
    assert reader.close() == []


def test_state_that_leads_nowhere_ends_the_text() -> None:
    parts, finish = read(
        [("a<end>", 1, None), ("b", 2, "length")], transitions={"normal": [("<end>", None)]}
    )

    assert (parts, finish) == ([Text("a")], Finish("length"))
