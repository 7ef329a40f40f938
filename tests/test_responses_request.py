"""Bodies of OpenAI's Responses become chats, in their order and with nothing lost unsaid."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from persist_cache.server.lengths import NO_LIMIT
from persist_cache.server.protocols.asked import Asked
from persist_cache.server.protocols.responses_items import sealed
from persist_cache.server.protocols.responses_request import Manner, read_responses
from persist_cache.server.validation import RefusedError
from tests.anthropic_bodies import spoilt
from tests.examples import examples
from tests.responses_bodies import PATCH, agent_body, part

CLOCK = {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}}}
SEALED_FIELD = "reasoning.encrypted_content"


def both(*items: Any, **body: Any) -> tuple[Asked, Manner]:
    """Read a request with these items as its input."""
    return read_responses({"model": "m", "input": list(items) or "Hello", **body})


def read(*items: Any, **body: Any) -> Asked:
    return both(*items, **body)[0]


def said(role: str, *texts: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [part(text, kind) for text in texts]}


def call(name: str, call_id: str = "a", **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}", **more}


def output(call_id: str = "a", text: Any = "Six.", of: str = "function") -> dict[str, Any]:
    kind = {"function": "function_call_output", "custom": "custom_tool_call_output"}[of]
    return {"type": kind, "call_id": call_id, "output": text}


def thought(text: str, **more: Any) -> dict[str, Any]:
    content = [part(text, "reasoning_text")]
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": content, **more}


def called(name: str, call_id: str = "a", **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


# ---- messages ------------------------------------------------------------------------------------


def test_instructions_and_developers_are_system_messages_in_their_places() -> None:
    found = read(
        said("developer", "Be kind."),
        {"role": "user", "content": "Hello"},
        said("developer", "Be quick."),
        said("user", "And", "now?"),
        instructions="Be brief.",
    )

    assert found.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "system", "content": "Be quick."},
        {"role": "user", "content": "And\n\nnow?"},
    ]
    assert read().messages == [{"role": "user", "content": "Hello"}]
    assert read(instructions="", tools=None, reasoning=None).messages == read().messages


def test_items_of_one_answer_are_one_message_again() -> None:
    found = read(
        said("user", "What time is it?"),
        thought("Two cities."),
        said("assistant", "I look."),
        call("clock", "a", arguments='{"city": "Bern"}'),
        call("clock", "b", arguments=""),
        output("a"),
        output("b", [part("Se"), part("ven.")]),
        thought("Clear."),
        said("assistant", "Six", " and seven."),
        said("user", "Thanks."),
    )

    assert found.messages == [
        {"role": "user", "content": "What time is it?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Two cities.",
            "tool_calls": [called("clock", "a", city="Bern"), called("clock", "b")],
        },
        {"role": "tool", "tool_call_id": "a", "name": "clock", "content": "Six."},
        {"role": "tool", "tool_call_id": "b", "name": "clock", "content": "Se\n\nven."},
        {"role": "assistant", "content": "Six and seven.", "reasoning_content": "Clear."},
        {"role": "user", "content": "Thanks."},
    ]


def test_answers_one_after_the_other_stay_two_messages() -> None:
    found = read(said("user", "a"), said("assistant", "b"), said("assistant", "c"), output("x"))

    assert [one["content"] for one in found.messages] == ["a", "b", "c", "Six."]
    assert "name" not in found.messages[3], "nothing says which tool it was"


def test_a_thought_behind_what_was_said_begins_another_message() -> None:
    found = read(
        said("user", "a"),
        thought("Hm."),
        said("assistant", "b"),
        thought("So."),
        said("assistant", "c"),
        call("clock", "x"),
        thought("And."),
        call("clock", "y"),
    )

    assert [(one["content"], one.get("reasoning_content")) for one in found.messages] == [
        ("a", None),
        ("b", "Hm."),
        ("c", "So.And."),
    ]
    assert [one["id"] for one in found.messages[2]["tool_calls"]] == ["x", "y"]


def test_what_is_no_thought_joins_no_answers() -> None:
    empty = {"type": "reasoning", "summary": []}

    found = read(said("user", "a"), said("assistant", "b"), empty, said("assistant", "c"))

    assert [one["content"] for one in found.messages] == ["a", "b", "c"]


def test_a_reference_is_refused_with_what_to_set() -> None:
    with pytest.raises(RefusedError, match="store: false"):
        read(said("user", "a"), {"type": "item_reference", "id": "msg_1"}, said("user", "b"))


def test_thought_is_found_wherever_a_client_kept_it() -> None:
    summary = [{"type": "summary_text", "text": "Hm."}, {"type": "summary_text", "text": "So."}]
    kept = [
        (thought("Hm."), "Hm.", ()),
        ({**thought(""), "content": None, "encrypted_content": sealed("Hm.")}, "Hm.", ()),
        ({**thought(""), "content": [], "summary": summary}, "Hm.\n\nSo.", ()),
        ({**thought("Hm."), "encrypted_content": sealed("other")}, "Hm.", ()),
        ({"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}, None, (SEALED_FIELD,)),
        ({"type": "reasoning", "summary": [], "encrypted_content": "persist-cache:?"}, None, 1),
        ({"type": "reasoning", "summary": []}, None, ()),
    ]
    for item, text, ignored in kept:
        found = read(said("user", "a"), item, said("assistant", "b"), said("user", "c"))

        assert found.messages[1].get("reasoning_content") == text
        assert found.messages[1]["content"] == "b"
        assert found.ignored == ((SEALED_FIELD,) if ignored else ())


def test_what_this_server_has_no_tools_for_is_left_out_and_named() -> None:
    found = read(
        said("user", "a"),
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "local_shell_call", "call_id": "x", "action": {"type": "exec", "command": []}},
        {"type": "local_shell_call_output", "call_id": "x", "output": "a"},
        {"type": "mcp_list_tools", "tools": []},
        said("assistant", "b"),
        said("user", "c"),
        tools=[{"type": "web_search"}, {"type": "local_shell"}],
    )

    assert [one["content"] for one in found.messages] == ["a", "b", "c"]
    assert found.ignored == ("server-tools", "tools")
    assert found.tools is None
    assert not found.may_call


# ---- tools ---------------------------------------------------------------------------------------


def test_tools_of_each_kind_are_functions_for_the_model() -> None:
    space = {
        "type": "namespace",
        "name": "mcp__cal",
        "description": "Dates.",
        "tools": [{**CLOCK, "description": "Tells the time."}, {**CLOCK, "name": "day"}],
    }
    tools = [CLOCK, PATCH, space, {"type": "custom", "name": "note"}]

    found, manner = both(tools=tools)

    functions = [one["function"] for one in found.tools or []]
    assert [one["name"] for one in functions] == [
        *("clock", "patch", "mcp__cal__clock", "mcp__cal__day", "note")
    ]
    assert functions[0]["parameters"] == CLOCK["parameters"]
    assert functions[1]["parameters"]["required"] == ["input"]
    said_of = functions[1]["parameters"]["properties"]["input"]["description"]
    assert said_of == 'A text of this grammar (lark):\nstart: "begin"'
    assert [one["description"] for one in functions[2:]] == ["Dates.\n\nTells the time.", "", ""]
    assert functions[4]["parameters"]["properties"] == {"input": {"type": "string"}}
    told = manner.tools.known("mcp__cal__clock")
    assert (told.name, told.namespace, told.is_custom) == ("clock", "mcp__cal", False)
    assert manner.tools.known("patch").is_custom
    assert manner.tools.known("unheard").name == "unheard"


def test_calls_of_custom_and_namespaced_tools_have_the_names_that_the_model_saw() -> None:
    custom = {"type": "custom_tool_call", "call_id": "a", "name": "patch", "input": 'x "y"'}
    inner = call("clock", "b", namespace="mcp__cal__")

    found = read(said("user", "a"), custom, inner, output("a", of="custom"), output("b"))

    assert found.messages[1]["tool_calls"] == [
        called("patch", "a", input='x "y"'),
        called("mcp__cal__clock", "b"),
    ]
    assert [one["name"] for one in found.messages[2:]] == ["patch", "mcp__cal__clock"]


def test_tools_that_come_later_are_tools() -> None:
    more = {"type": "additional_tools", "role": "developer", "tools": [CLOCK, PATCH]}

    found = read(said("user", "a"), more, tools=[CLOCK])

    assert [one["function"]["name"] for one in found.tools or []] == ["clock", "patch"]


@pytest.mark.parametrize(
    ("choice", "may_call", "ignored"),
    [
        (None, True, ()),
        ("auto", True, ()),
        ("none", False, ()),
        ("required", True, ("tool_choice",)),
        ({"type": "function", "name": "clock"}, True, ("tool_choice",)),
        ({"type": "custom", "name": "patch"}, True, ("tool_choice",)),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, True, ("tool_choice",)),
    ],
)
def test_tool_choice(choice: Any, may_call: bool, ignored: tuple[str, ...]) -> None:
    found = read(tools=[CLOCK, PATCH], tool_choice=choice)

    assert (found.may_call, found.ignored) == (may_call, ignored)
    assert found.tools == read(tools=[CLOCK, PATCH]).tools, "the prompt is the same"


# ---- how to answer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reasoning", "options"),
    [
        (None, {}),
        ({}, {}),
        ({"effort": None, "summary": "auto"}, {}),
        ({"effort": "none"}, {"enable_thinking": False}),
        ({"effort": "minimal"}, {"enable_thinking": True, "reasoning_effort": "low"}),
        ({"effort": "medium"}, {"enable_thinking": True, "reasoning_effort": "medium"}),
        ({"effort": "xhigh"}, {"enable_thinking": True, "reasoning_effort": "high"}),
    ],
)
def test_effort_is_an_option_of_the_template(reasoning: Any, options: dict[str, Any]) -> None:
    found = read(reasoning=reasoning)

    assert found.template_args == options
    assert found.option_names["reasoning_effort"] == "reasoning.effort"


@pytest.mark.parametrize(("limit", "tokens"), [(None, None), (7, 7), (0, 0), (-1, NO_LIMIT)])
def test_limit(limit: Any, tokens: int | None) -> None:
    assert read(max_output_tokens=limit).max_tokens == tokens


def test_options_that_are_done() -> None:
    found = read(temperature=1.5, top_p=0, top_k=3, stop=["a", "a", "b"], parallel_tool_calls=False)

    assert found.sampling == {"temperature": 1.5, "top_p": 0.0, "top_k": 3}
    assert found.stop_words == ["a", "b"]
    assert found.one_call
    assert read(stop="a").stop_words == ["a"]


def test_what_is_accepted_and_changes_nothing() -> None:
    plain = read()
    accepted = {
        "store": True,
        "user": "someone",
        "metadata": {"a": "b"},
        "include": [SEALED_FIELD],
        "truncation": "disabled",
        "service_tier": "auto",
        "prompt_cache_retention": "in_memory",
        "prompt_cache_options": {"mode": "implicit"},
        "safety_identifier": "b",
        "previous_response_id": None,
        "conversation": None,
        "background": False,
        "stream_options": {"include_obfuscation": False},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "max_tool_calls": 3,
        "client_metadata": {"made": "up"},
        "tool_choice": "none",
    }

    assert read(**accepted) == plain
    assert read(**dict.fromkeys(accepted)) == plain


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("text.format", {"text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}}),
        ("text.verbosity", {"text": {"verbosity": "low"}}),
        ("truncation", {"truncation": "auto"}),
        ("include", {"include": ["message.output_text.logprobs"]}),
        ("top_logprobs", {"top_logprobs": 3}),
        ("context_management", {"context_management": [{"type": "compaction"}]}),
    ],
)
def test_what_is_not_done_is_named(name: str, body: dict[str, Any]) -> None:
    assert read(**body).ignored == (name,)


# ---- what is refused -----------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any]]] = [
    ("input", {"input": None}),
    ("input", {"input": []}),
    ("input", {"input": 3}),
    ("input[0]", {"input": ["a"]}),
    ("input[0].role", {"input": [{"role": "tool", "content": "a"}]}),
    ("input[0].content", {"input": [{"role": "user"}]}),
    ("input[0].content[1]", {"input": [{"role": "user", "content": [part("a"), 3]}]}),
    ("input[0].content[0].text", {"input": [{"role": "user", "content": [part(3)]}]}),  # type: ignore[arg-type]
    ("input[0].type", {"input": [{"type": "telegram"}]}),
    ("input[0].type", {"input": [{"type": 3}]}),
    ("input[0].arguments", {"input": [call("a", arguments="{")]}),
    ("input[0].arguments", {"input": [call("a", arguments="[]")]}),
    ("input[0].arguments", {"input": [call("a", arguments='{"a": 1e999}')]}),
    ("input[0].arguments", {"input": [call("a", arguments='{"a": "\\ud800"}')]}),
    ("input[0].call_id", {"input": [{"type": "function_call", "name": "a", "arguments": ""}]}),
    ("input[0].input", {"input": [{"type": "custom_tool_call", "call_id": "a", "name": "b"}]}),
    ("input[0].output", {"input": [output("a", None)]}),
    ("input[0].encrypted_content", {"input": [{"type": "reasoning", "encrypted_content": 3}]}),
    ("instructions", {"instructions": 3}),
    ("model", {"model": 3}),
    ("model", {"model": ""}),
    ("tools", {"tools": {}}),
    ("tools[0].name", {"tools": [{"type": "function"}]}),
    ("tools[0].type", {"tools": [{"name": "a"}]}),
    ("tools[1].name", {"tools": [CLOCK, CLOCK]}),
    ("tools[0].parameters", {"tools": [{**CLOCK, "parameters": 3}]}),
    ("tools[0].tools[0].type", {"tools": [{"type": "namespace", "name": "a", "tools": [{}]}]}),
    ("tools[0].format.syntax", {"tools": [{**PATCH, "format": {"type": "grammar"}}]}),
    ("tool_choice", {"tool_choice": "sometimes"}),
    ("tool_choice", {"tool_choice": "required"}),
    ("tool_choice.name", {"tools": [CLOCK], "tool_choice": {"type": "function", "name": "a"}}),
    ("reasoning", {"reasoning": "much"}),
    ("reasoning.effort", {"reasoning": {"effort": "huge"}}),
    ("reasoning.summary", {"reasoning": {"summary": []}}),
    ("text.format", {"text": {"format": "json"}}),
    ("max_output_tokens", {"max_output_tokens": 1.5}),
    ("temperature", {"temperature": 3}),
    ("top_p", {"top_p": True}),
    ("stream", {"stream": "yes"}),
    ("store", {"store": 3}),
    ("stop", {"stop": [""]}),
    ("include", {"include": "all"}),
    ("metadata", {"metadata": []}),
    ("parallel_tool_calls", {"parallel_tool_calls": 0}),
]


@pytest.mark.parametrize(("name", "body"), BAD)
def test_malformed_body_is_refused_by_the_name_of_the_field(
    name: str, body: dict[str, Any]
) -> None:
    with pytest.raises(RefusedError) as refusal:
        read_responses({"model": "m", "input": "Hello", **body})

    sentence = str(refusal.value)
    assert refusal.value.status == 400
    assert refusal.value.param == name
    assert sentence.startswith(f"{name} ")
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("previous_response_id", {"previous_response_id": "resp_1"}),
        ("conversation", {"conversation": "conv_1"}),
        ("prompt", {"prompt": {"id": "pmpt_1"}}),
        ("background", {"background": True}),
        ("input[0]", {"input": [{"type": "item_reference", "id": "rs_1"}]}),
        ("input[0]", {"input": [{"id": "rs_1"}]}),
        ("input[0]", {"input": [{"type": "compaction", "encrypted_content": "gAAA"}]}),
        (
            "input[0].content[0]",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        ),
        ("input[0].output[0]", {"input": [output("a", [{"type": "input_file"}])]}),
    ],
)
def test_what_would_be_an_answer_to_something_else_is_refused(
    name: str, body: dict[str, Any]
) -> None:
    with pytest.raises(RefusedError) as refusal:
        read_responses({"model": "m", "input": "Hello", **body})

    assert (refusal.value.status, refusal.value.param) == (400, name)
    is_previous = name == "previous_response_id"
    assert refusal.value.code == ("previous_response_not_found" if is_previous else "")


def refusal_to(body: dict[str, Any]) -> str:
    """What a body is refused with; "" if it is not."""
    try:
        read_responses(body)
    except RefusedError as refusal:
        return str(refusal) if refusal.status == 400 else ""
    return ""


def test_any_spoilt_body_is_read_or_refused_in_one_sentence() -> None:
    drawn = random.Random(20)
    whole = agent_body(tools=2, tool_words=5, system_words=20, turns=1)
    odd: list[Any] = [None, True, -1, 1e300, "", [], {}, [[]], [None], {"type": "x"}, "x y"]
    before, refused = json.dumps(whole), 0

    tried = examples(1_000, 3_000)
    for _ in range(tried):
        body = spoilt(whole, drawn, odd)
        given = copy.deepcopy(body)
        sentence = refusal_to(body)
        refused += bool(sentence)
        assert not sentence or sentence.endswith(".")
        assert body == given
    assert tried / 6 < refused < tried * 5 / 6
    assert json.dumps(whole) == before


def test_agents_body_is_understood_wholly() -> None:
    found, manner = read_responses(agent_body(tools=3, turns=2))

    assert found.ignored == ("text.verbosity", "tools")
    assert len(found.tools or []) == 3 + 1 + 2
    assert [one["role"] for one in found.messages] == [
        *("system", "system", "user", "user"),
        *("assistant", "tool") * 3,
        "user",
    ]
    assert (manner.as_summary, manner.seals, found.one_call) == (True, True, True)
