"""Bodies of Anthropic's Messages become chats, in their order and with nothing lost unsaid."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from persist_cache.server.protocols.anthropic_request import read_messages
from persist_cache.server.protocols.asked import Asked, Mark
from persist_cache.server.validation import RefusedError
from tests.anthropic_bodies import BILLING, COUNTDOWN, EPHEMERAL, agent_body, spoilt
from tests.test_repairs import lookalikes

HOUR = {"type": "ephemeral", "ttl": "1h"}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "AA=="}
DOCUMENT = {"type": "document", "source": PDF}
SOURCELESS = {"type": "document", "source": "a"}
CLOCK = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}


def read(*content: Any, **body: Any) -> Asked:
    """Read a request whose messages are the user's with that content, unless others are given."""
    messages = [{"role": "user", "content": one} for one in content or ("Hello",)]
    return read_messages({"model": "m", "max_tokens": 8, "messages": messages, **body})


def text(said: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **more}


def result(call: str, content: Any = "done", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call, "content": content, **more}


def use(call: str, name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call, "name": name, "input": arguments}


def test_system_prompt_is_the_first_message_as_text_or_as_blocks() -> None:
    expected = [
        {"role": "system", "content": "One.\n\nTwo."},
        {"role": "user", "content": "Hello"},
    ]

    assert read(system="One.\n\nTwo.").messages == expected
    assert read(system=[text("One."), text(""), text("Two.")]).messages == expected
    assert read(system=[]).messages == read(system="").messages == expected[1:]


def test_tool_calls_and_results_keep_their_order_with_the_text_around_them() -> None:
    found = read(
        messages=[
            {"role": "user", "content": "What time is it?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Two cities.", "signature": "unsigned"},
                    text("I look."),
                    use("a", "clock", city="Bern"),
                    use("b", "clock", city="Rom"),
                ],
            },
            {
                "role": "user",
                "content": [
                    text("Here:"),
                    result("b", [text("6"), text("7")]),
                    result("a", "no such city", is_error=True),
                    text("Go on."),
                    text("Quickly."),
                ],
            },
        ]
    )

    assert found.messages == [
        {"role": "user", "content": "What time is it?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Two cities.",
            "tool_calls": [
                {
                    "id": name,
                    "type": "function",
                    "function": {"name": "clock", "arguments": {"city": city}},
                }
                for name, city in [("a", "Bern"), ("b", "Rom")]
            ],
        },
        {"role": "user", "content": "Here:"},
        {"role": "tool", "tool_call_id": "b", "name": "clock", "content": "6\n\n7"},
        {"role": "tool", "tool_call_id": "a", "name": "clock", "content": "Error: no such city"},
        {"role": "user", "content": "Go on.\n\nQuickly."},
    ]


@pytest.mark.parametrize(
    ("content", "failed", "said"),
    [
        (None, None, ""),
        ("", True, "Error: "),
        ([], True, "Error: "),
        ([], False, ""),
        ("Error: gone", True, "Error: gone"),
        ("<tool_use_error>gone</tool_use_error>", True, "<tool_use_error>gone</tool_use_error>"),
        ([text("gone"), text("for good")], True, "Error: gone\n\nfor good"),
    ],
)
def test_tool_result_says_that_it_failed_once(content: Any, failed: Any, said: str) -> None:
    found = read([{**result("a", content), "is_error": failed}])

    assert found.messages == [{"role": "tool", "tool_call_id": "a", "content": said}]


def test_documents_and_search_results_that_are_text_are_given_as_text() -> None:
    plain = {"type": "text", "media_type": "text/plain", "data": "All of it."}
    parts = {"type": "content", "content": [text("One."), text("Two.")]}
    found = {"type": "search_result", "title": "T", "source": "S", "content": [text("Found.")]}
    content = [
        {"type": "document", "source": plain, "title": "Title", "cache_control": EPHEMERAL},
        {"type": "document", "source": parts},
        text("What is it?"),
    ]
    known = {"type": "tool_reference", "tool_name": "clock"}

    request = read(content, [result("a", [found, known, content[0]])])

    assert [one["content"] for one in request.messages] == [
        "Title\n\nAll of it.\n\nOne.\n\nTwo.\n\nWhat is it?",
        "T\n\nS\n\nFound.\n\nclock\n\nTitle\n\nAll of it.",
    ]
    assert request.marks == [Mark(0, 17, 300), Mark(1, 38, 300)]
    assert request.ignored == ()


def test_what_tools_of_other_servers_did_is_left_out_and_named() -> None:
    searched = [
        text("I search."),
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        text(" It is six."),
    ]

    found = read(
        messages=[
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": searched},
            {"role": "user", "content": "Thanks"},
        ]
    )

    assert found.messages[1] == {"role": "assistant", "content": "I search. It is six."}
    assert found.ignored == ("server-tools",)


def test_thinking_has_a_field_of_its_own_and_what_is_closed_is_named() -> None:
    found = read(
        messages=[
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm."},
                    {"type": "redacted_thinking", "data": "AAAA"},
                    text("Yes."),
                ],
            },
            {"role": "user", "content": "Why?"},
        ]
    )

    assert found.messages[0] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "Hm.",
    }
    assert found.ignored == ("redacted_thinking",)


def test_tools_are_functions_and_those_without_a_schema_are_named_as_ignored() -> None:
    found = read(
        tools=[
            {**CLOCK, "type": "custom", "description": "Tells the time.", "strict": True},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
            {**CLOCK, "name": "sun", "description": None},
        ]
    )

    assert found.tools == [
        {
            "type": "function",
            "function": {"name": name, "description": said, "parameters": CLOCK["input_schema"]},
        }
        for name, said in [("clock", "Tells the time."), ("sun", "")]
    ]
    assert found.ignored == ("tools",)
    assert found.may_call


@pytest.mark.parametrize(
    ("choice", "may_call", "one_call", "ignored"),
    [
        (None, True, False, ()),
        ({"type": "auto"}, True, False, ()),
        ({"type": "auto", "disable_parallel_tool_use": True}, True, True, ()),
        ({"type": "none"}, False, False, ()),
        ({"type": "any"}, True, False, ("tool_choice",)),
        ({"type": "tool", "name": "clock"}, True, False, ("tool_choice",)),
    ],
)
def test_tool_choice_is_done_or_named_as_ignored(
    choice: Any, may_call: bool, one_call: bool, ignored: tuple[str, ...]
) -> None:
    found = read(tools=[CLOCK], tool_choice=choice)

    assert (found.may_call, found.one_call, found.ignored) == (may_call, one_call, ignored)
    assert found.tools, "the prompt stays the same whatever may be called"


@pytest.mark.parametrize(
    ("body", "args", "ignored"),
    [
        ({}, {}, ()),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}, ()),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": True}, ()),
        ({"thinking": {"type": "between_tools"}}, {"enable_thinking": True}, ()),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2048}},
            {"enable_thinking": True, "thinking_budget": 2048},
            (),
        ),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "high"}, ()),
        ({"output_config": {"format": {"type": "json_schema"}}}, {}, ("output_config.format",)),
    ],
)
def test_thinking_and_effort_become_the_templates_options(
    body: dict[str, Any], args: dict[str, Any], ignored: tuple[str, ...]
) -> None:
    found = read(**body)

    assert (found.template_args, found.ignored) == (args, ignored)


def test_sampling_stop_sequences_and_limits() -> None:
    found = read(temperature=0, top_p=0.5, top_k=40, stop_sequences=["END", "\n", "END"])

    assert found.sampling == {"temperature": 0.0, "top_p": 0.5, "top_k": 40}
    assert found.stop_words == ["END", "\n"]
    assert found.max_tokens == 8
    assert read(max_tokens=0).max_tokens == 0


def test_null_is_absent_and_unknown_fields_are_accepted() -> None:
    names = [
        *("system", "tools", "tool_choice", "thinking", "stop_sequences", "temperature", "top_p"),
        *("top_k", "metadata", "output_config", "cache_control", "stream", "container"),
    ]

    found = read([text("Hello", cache_control=None)], **dict.fromkeys(names), new_field={"a": 1})

    assert found == read()


def test_marks_are_found_wherever_they_are() -> None:
    found = read(
        system=[text("One.", cache_control=EPHEMERAL), text("Two.", cache_control=HOUR)],
        tools=[CLOCK, {**CLOCK, "name": "sun", "cache_control": EPHEMERAL}],
        messages=[
            {"role": "user", "content": [text("a", cache_control=EPHEMERAL), text("b")]},
            {"role": "system", "content": [text("c", cache_control=EPHEMERAL)]},
            {
                "role": "assistant",
                "content": [text("d"), {**use("x", "sun"), "cache_control": HOUR}],
            },
            {
                "role": "user",
                "content": [
                    result("x", [text("e", cache_control=EPHEMERAL), text("f")]),
                    result("y", "g", cache_control=EPHEMERAL),
                    text("h"),
                ],
            },
        ],
        cache_control=EPHEMERAL,
    )

    assert found.marks == [
        Mark(-1, None, 300),
        Mark(0, 4, 300),
        Mark(0, 10, 3600),
        Mark(1, 1, 300),
        Mark(2, 1, 300),
        Mark(3, None, 3600),
        Mark(4, 1, 300),
        Mark(5, 1, 300),
        Mark(6, None, 300),
    ]


def test_mark_on_a_text_that_was_dropped_is_behind_what_stands_before_it() -> None:
    billing = text(BILLING.format("f27", "00000"), cache_control=EPHEMERAL)

    assert read(system=[billing, text("One.")]).marks == [Mark(-1, None, 300)]
    assert read(system=[text("One."), billing]).marks == [Mark(0, 4, 300)]


def test_prompt_is_the_same_whatever_the_billing_line_and_the_countdown_say() -> None:
    def ask(version: str, digest: str, left: int, inline: str) -> Asked:
        return read(
            system=[
                text(BILLING.format(version, digest)),
                text(f"Be brief.\n{COUNTDOWN.format(left)}", cache_control=EPHEMERAL),
            ],
            messages=[
                {"role": "user", "content": "a"},
                {"role": "system", "content": f"Plan mode.\n{inline}"},
                {"role": "system", "content": COUNTDOWN.format(left)},
                {"role": "user", "content": "b"},
            ],
        )

    found = ask("f27", "00000", 900_000, BILLING.format("a11", "12345"))

    assert found == ask("b03", "1a2b3", 5, BILLING.format("0", "fffff"))
    assert found.repaired == ("billing", "countdown")
    assert [one["content"] for one in found.messages] == ["Be brief.", "a", "Plan mode.", "b"]


def test_lookalikes_outside_of_system_texts_are_not_touched() -> None:
    exact = [BILLING.format("f27", "00000"), COUNTDOWN.format(7)]
    for said in [*exact, *lookalikes(500)]:
        found = read(
            messages=[
                {"role": "user", "content": [text(said)]},
                {"role": "assistant", "content": [text(said), use("a", "clock", said=said)]},
                {"role": "user", "content": [result("a", said), result("b", [text(said)])]},
            ]
        )
        assert [one["content"] for one in found.messages] == [said] * 4
        assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"said": said}
        assert found.repaired == ()


def test_body_is_left_as_it_is() -> None:
    body = agent_body(turns=3, tools=2)
    before = copy.deepcopy(body)

    read_messages(body)

    assert body == before


MALFORMED: list[tuple[str, dict[str, Any]]] = [
    ("model", {"model": None}),
    ("model", {"model": ""}),
    ("max_tokens", {"max_tokens": None}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": True}),
    ("max_tokens", {"max_tokens": 0, "stream": True}),
    ("max_tokens", {"max_tokens": 0, "thinking": {"type": "adaptive"}}),
    ("messages", {"messages": []}),
    ("messages", {"messages": None}),
    ("messages", {"messages": [{"role": "system", "content": "a"}]}),
    ("messages.0", {"messages": ["a"]}),
    ("messages.0.role", {"messages": [{"role": "tool", "content": "a"}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": ""}]}),
    ("messages.0.content", {"messages": [{"role": "user"}]}),
    ("messages.0.content.0", {"messages": [{"role": "user", "content": [IMAGE]}]}),
    ("messages.0.content.0", {"messages": [{"role": "user", "content": [DOCUMENT]}]}),
    ("messages.0.content.0", {"messages": [{"role": "user", "content": [use("a", "b")]}]}),
    (
        "messages.0.content.0.content.0",
        {"messages": [{"role": "user", "content": [result("a", [IMAGE])]}]},
    ),
    ("messages.0.content.0", {"messages": [{"role": "assistant", "content": [result("a")]}]}),
    (
        "messages.1",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ),
    ("messages.0.content.0.source", {"messages": [{"role": "user", "content": [SOURCELESS]}]}),
    (
        "messages.0.content.0.title",
        {"messages": [{"role": "user", "content": [{"type": "search_result"}]}]},
    ),
    ("system.0", {"system": [IMAGE]}),
    ("system", {"system": 7}),
    ("tools", {"tools": {}}),
    ("tools.0.name", {"tools": [{**CLOCK, "name": 7}]}),
    ("tools.1.name", {"tools": [CLOCK, CLOCK]}),
    ("tools.0.input_schema", {"tools": [{"name": "a"}]}),
    ("tool_choice.type", {"tool_choice": {"type": "some"}}),
    ("tool_choice", {"tool_choice": {"type": "any"}}),
    ("tool_choice.name", {"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "sun"}}),
    ("thinking.type", {"thinking": {"type": "on"}}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled"}}),
    ("stop_sequences.0", {"stop_sequences": [""]}),
    ("stop_sequences", {"stop_sequences": "END"}),
    ("temperature", {"temperature": 1.5}),
    ("temperature", {"temperature": True}),
    ("top_p", {"top_p": "1"}),
    ("top_k", {"top_k": -1}),
    ("stream", {"stream": 1}),
    ("metadata", {"metadata": []}),
    ("cache_control", {"cache_control": {"type": "for ever"}}),
    (
        "system.0.cache_control.ttl",
        {"system": [text("a", cache_control={"type": "ephemeral", "ttl": "2h"})]},
    ),
    ("output_config.effort", {"output_config": {"effort": "huge"}}),
]


@pytest.mark.parametrize(("name", "body"), MALFORMED)
def test_malformed_body_is_refused_in_a_sentence_that_names_the_field(
    name: str, body: dict[str, Any]
) -> None:
    with pytest.raises(RefusedError) as refusal:
        read(**body)

    assert refusal.value.status == 400
    assert str(refusal.value).startswith(f"{name} ")
    assert str(refusal.value).endswith(".")


def test_any_body_is_read_or_refused_and_repeats_no_prompt() -> None:
    drawn = random.Random(18)
    whole = agent_body(tools=2, tool_words=5, system_words=40, turns=2)
    odd: list[Any] = [
        None,
        True,
        0,
        -1,
        1e300,
        "",
        "secret prompt",
        [],
        {},
        [[]],
        [{}],
        [None],
        {"type": "x"},
    ]
    said = []
    for _ in range(1500):
        if (refusal := refused(spoilt(whole, drawn, odd))) is not None:
            said.append(refusal)
    assert len(said) > 500
    assert {refusal.status for refusal in said} == {400}
    assert not any("secret" in str(refusal) for refusal in said)


def refused(body: dict[str, Any]) -> RefusedError | None:
    try:
        read_messages(body)
    except RefusedError as refusal:
        return refusal
    return None


def test_conversation_that_ends_with_the_assistant_can_be_counted() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    found = read_messages({"model": "m", "messages": messages}, counting=True)

    assert found.messages == messages


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}, False),
        ({"edits": []}, False),
        ({}, False),
        ({"edits": [{"type": "clear_thinking_20251015"}]}, True),
        ({"edits": [{"type": "clear_tool_uses_20250919", "keep": "all"}]}, True),
        ({"edits": "all"}, True),
        ("all", True),
    ],
)
def test_edits_of_the_conversation_are_told_unless_they_leave_all_of_it(
    asked: Any, told: bool
) -> None:
    request = read_messages(
        {
            "model": "m",
            "max_tokens": 1,
            "messages": [{"role": "user", "content": "Hello"}],
            "context_management": asked,
        }
    )

    assert request.ignored == (("context_management",) if told else ())
