"""What requests of all protocols may ask of the cache, read from their bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from persist_cache.entry import MAX_GROUP
from persist_cache.server.form import Given, Templates
from persist_cache.server.protocols.anthropic_request import read_messages
from persist_cache.server.protocols.asked import Asked, Caching, Mark
from persist_cache.server.protocols.openai import as_text, asked_of_cache, lenient, served
from persist_cache.server.protocols.responses_request import read_responses
from persist_cache.server.validation import RefusedError
from persist_cache.stability.conversation import stabilize
from persist_cache.stability.names import DEFAULTS

SAID = {"role": "user", "content": "Hello!"}
Read = Callable[[dict[str, Any]], Asked]


def chat(more: Mapping[str, Any]) -> Asked:
    return asked_of_cache(lenient({"messages": [SAID], **more}), is_chat=True)


def text(more: Mapping[str, Any]) -> Asked:
    return asked_of_cache(lenient({"prompt": "Hello!", **more}), is_chat=False)


def messages(more: Mapping[str, Any]) -> Asked:
    return read_messages({"model": "m", "max_tokens": 9, "messages": [SAID], **more})


def responses(more: Mapping[str, Any]) -> Asked:
    return read_responses({"input": [SAID], **more})[0]


PROTOCOLS = [chat, text, messages, responses]


@pytest.mark.parametrize("read", PROTOCOLS)
@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ({}, Caching()),
        ({"prompt_cache_key": None, "prompt_cache_options": None}, Caching()),
        ({"prompt_cache_key": "", "prompt_cache_retention": None}, Caching()),
        ({"prompt_cache_key": "thread 1"}, Caching(group="thread 1")),
        ({"metadata": {"user_id": "someone"}, "user": "someone"}, Caching()),
        ({"prompt_cache_options": {"unknown": [1], "ttl": None, "mode": None}}, Caching()),
        ({"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}}, Caching(ttl_s=1800)),
        ({"prompt_cache_options": {"mode": "explicit"}}, Caching(only_marked=True)),
        ({"prompt_cache_options": {"prewarm": True}}, Caching(prewarm=True)),
        ({"prompt_cache_retention": "24h"}, Caching(ttl_s=86400)),
        ({"prompt_cache_retention": "in_memory"}, Caching()),
        (
            {"prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "12h"}},
            Caching(ttl_s=43200),
        ),
    ],
)
def test_what_is_asked_of_the_cache_is_the_same_in_all_protocols(
    read: Read, more: dict[str, Any], asked: Caching
) -> None:
    assert read(more).caching == asked


@pytest.mark.parametrize("read", PROTOCOLS)
@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt_cache_key": 1}, "prompt_cache_key"),
        ({"prompt_cache_key": ["a"]}, "prompt_cache_key"),
        ({"prompt_cache_key": "x" * (MAX_GROUP + 1)}, "prompt_cache_key"),
        ({"prompt_cache_key": "two\nlines"}, "prompt_cache_key"),
        ({"prompt_cache_key": "\ud800"}, "prompt_cache_key"),
        ({"prompt_cache_retention": "1h"}, "prompt_cache_retention"),
        ({"prompt_cache_retention": {}}, "prompt_cache_retention"),
        ({"prompt_cache_options": []}, "prompt_cache_options"),
        ({"prompt_cache_options": "explicit"}, "prompt_cache_options"),
        ({"prompt_cache_options": {"mode": "both"}}, "prompt_cache_options.mode"),
        ({"prompt_cache_options": {"mode": True}}, "prompt_cache_options.mode"),
        ({"prompt_cache_options": {"ttl": 30}}, "prompt_cache_options.ttl"),
        ({"prompt_cache_options": {"ttl": "0m"}}, "prompt_cache_options.ttl"),
        ({"prompt_cache_options": {"ttl": "367d"}}, "prompt_cache_options.ttl"),
        ({"prompt_cache_options": {"ttl": "-1m"}}, "prompt_cache_options.ttl"),
        ({"prompt_cache_options": {"ttl": "٣m"}}, "prompt_cache_options.ttl"),
        ({"prompt_cache_options": {"prewarm": "yes"}}, "prompt_cache_options.prewarm"),
        ({"prompt_cache_options": {"prewarm": 1}}, "prompt_cache_options.prewarm"),
    ],
)
def test_what_is_malformed_is_refused_by_its_name(
    read: Read, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(RefusedError) as refused:
        read(more)

    assert (refused.value.status, refused.value.param) == (400, param)
    assert str(refused.value).startswith(f"{param} must ")


def test_prewarming_computes_the_prompt_and_no_answer() -> None:
    warm = {"prompt_cache_options": {"prewarm": True}}
    body = lenient({"messages": [SAID], "max_completion_tokens": 99, "stream": True, **warm})

    assert served(body, is_chat=True)["max_tokens"] == 0
    assert "max_completion_tokens" not in served(body, is_chat=True)
    assert messages(warm).max_tokens == responses({**warm, "max_output_tokens": 9}).max_tokens == 0


MARK = {"prompt_cache_breakpoint": {"mode": "explicit"}}
LONG = {"prompt_cache_breakpoint": {"ttl": "12h"}}


def parts(kind: str) -> list[dict[str, Any]]:
    return [
        {"type": kind, "text": "One.", **MARK},
        {"type": kind, "text": "Two.", "prompt_cache_breakpoint": None},
        {"type": kind, "text": "Three.", **LONG},
    ]


def test_breakpoints_are_marks_in_the_text_that_the_parts_become() -> None:
    told = {"role": "system", "content": "Be brief."}
    spoken = chat({"messages": [told, {"role": "user", "content": parts("text")}]})
    asked = messages({"system": "Be brief.", "messages": [{**SAID, "content": parts("text")}]})
    given = responses({"input": [told, {**SAID, "content": parts("input_text")}]})

    assert spoken.marks == [Mark(1, 4, 1800), Mark(1, 14, 43200)]
    assert asked.marks == given.marks == [Mark(1, 4, 1800), Mark(1, 18, 43200)]
    for one, (first, last) in ((spoken, (4, 14)), (asked, (4, 18)), (given, (4, 18))):
        content = one.messages[1]["content"]
        assert content[:first] == "One."
        assert content[:last].endswith("Three.")


def test_breakpoints_in_answers_and_outputs_are_marks() -> None:
    answer = [{"type": "output_text", "text": "Six.", **MARK}]
    output = [{"type": "input_text", "text": "6 pm", **MARK}]
    call = {"type": "function_call", "call_id": "c", "name": "clock", "arguments": "{}"}
    asked = responses(
        {
            "input": [
                SAID,
                {"type": "message", "role": "assistant", "content": answer},
                call,
                {"type": "function_call_output", "call_id": "c", "output": output},
            ]
        }
    )

    assert asked.marks == [Mark(1, 4, 1800), Mark(2, 4, 1800)]
    assert [one["role"] for one in asked.messages] == ["user", "assistant", "tool"]


def test_breakpoints_survive_that_two_system_messages_become_one() -> None:
    first = {"role": "developer", "content": [{"type": "text", "text": "Be brief.", **MARK}]}
    second = {"role": "system", "content": "Be kind."}
    asked = chat({"messages": [first, second, SAID]})

    assert asked.messages[0]["content"] == "Be brief.\n\nBe kind."
    assert asked.marks == [Mark(0, len("Be brief."), 1800)]


@pytest.mark.parametrize(
    ("mark", "ends"),
    [
        ("explicit", ""),
        (True, ""),
        ([], ""),
        ({"mode": "implicit"}, ".mode"),
        ({"mode": 1}, ".mode"),
        ({"ttl": "soon"}, ".ttl"),
        ({"ttl": 5}, ".ttl"),
    ],
)
@pytest.mark.parametrize(
    ("read", "name", "kind"),
    [
        (chat, "messages[0].content[0]", "text"),
        (messages, "messages.0.content.0", "text"),
        (responses, "input[0].content[0]", "input_text"),
    ],
)
def test_a_malformed_breakpoint_is_refused_by_its_name(
    read: Read, name: str, kind: str, mark: Any, ends: str
) -> None:
    part = {"type": kind, "text": "One.", "prompt_cache_breakpoint": mark}
    content = [{**SAID, "content": [part]}]

    with pytest.raises(RefusedError) as refused:
        read({"messages": content, "input": content})

    assert refused.value.param == f"{name}.prompt_cache_breakpoint{ends}"


def test_marks_of_a_chat_follow_what_repairs_leave_of_it() -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1.104.f27; cc_entrypoint=cli; cch=00000;"
    head = [{"type": "text", "text": f"{billing}\nBe brief.", **MARK}]
    said = [{"role": "system", "content": head}, {**SAID, "content": parts("text")}]
    body = lenient({"messages": said})
    given = Given(asked_of_cache(body, is_chat=True), Templates(), {})

    done = stabilize(body["messages"], None, DEFAULTS)
    given.moved(done)

    assert done.names == ("billing",)
    rendered = [{**one, "content": as_text(one["content"])} for one in done.messages]
    assert rendered[0]["content"] == "Be brief."
    given.take(rendered, None, {})
    assert given.marks == [Mark(0, 9, 1800), Mark(1, 4, 1800), Mark(1, 14, 43200)]
