"""What chat templates take is found out, and what they do not take is said in another form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from persist_cache.server.templates import Abilities, fit, probe
from tests.tiny_models import CHAT_TEMPLATE

REFUSING_SYSTEM = """\
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate') }}
{%- endif -%}
<turn>{{ message.role }}
{{ message.content | trim }}</turn>
{% endfor -%}
"""
HEAD_ONLY = """\
{%- for message in messages -%}
{%- if message.role == 'system' and not loop.first -%}
{{ raise_exception('System message must be at the beginning') }}
{%- endif -%}
<|{{ message.role }}|>{{ message.content }}
{%- if message.reasoning %}<think>{{ message.reasoning }}</think>{{ message.content }}{% endif %}
{% endfor -%}
{%- if reasoning_effort is defined %}Effort: {{ reasoning_effort }}{% endif -%}
"""
HOISTING = """\
{%- for message in messages if message.role == 'system' %}[{{ message.content }}]{% endfor -%}
{%- for message in messages if message.role in ('user', 'assistant') -%}
<|{{ message.role }}|>{{ message.content }}
{% endfor -%}
"""
DROPPING = """\
{%- for message in messages if message.role != 'system' or loop.first -%}
<|{{ message.role }}|>{{ message.content }}
{% endfor -%}
"""
NINE = """\
{%- for tool in tools or [] %}[{{ tool | tojson }}]{% endfor -%}
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{%- if call.id | length != 9 %}{{ raise_exception('Tool call IDs should be 9 long') }}{% endif -%}
[{{ call.id }} {{ call.function.name }} {{ call.function.arguments | tojson }}]
{%- endfor -%}
{%- if message.tool_call_id %}[{{ message.tool_call_id }}]{% endif %}
{% endfor -%}
"""
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What time is it?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {
                "id": "toolu_1",
                "type": "function",
                "function": {"name": "clock", "arguments": {"city": "Bern"}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "toolu_1", "name": "clock", "content": "Six."},
    {"role": "system", "content": "Plan mode."},
    {"role": "user", "content": "Thanks."},
]
CLOCK = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {}}}


def render(template: str, messages: Sequence[Any], tools: Any = None) -> str:
    def raise_exception(text: str) -> None:
        raise jinja2.TemplateError(text)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(
        messages=messages, tools=tools, add_generation_prompt=True
    )


def abilities(template: str) -> Abilities:
    def rendered(
        messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> str:
        return render(template, messages, tools)

    return probe(rendered, template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT_TEMPLATE, Abilities()),
        (
            REFUSING_SYSTEM,
            Abilities(
                system=False,
                heads=False,
                inline_system=False,
                turns=False,
                tools=False,
                calls=False,
            ),
        ),
        (
            HEAD_ONLY,
            Abilities(
                heads=False,
                inline_system=False,
                tools=False,
                calls=False,
                thinking_field="reasoning",
                options=frozenset({"reasoning_effort"}),
            ),
        ),
        (HOISTING, Abilities(inline_system=False, tools=False, calls=False)),
        (NINE, Abilities(short_ids=True)),
    ],
)
def test_what_a_template_takes_is_found_out(template: str, expected: Abilities) -> None:
    assert abilities(template) == expected


def test_what_a_template_takes_is_left_as_it_is() -> None:
    found = fit(MESSAGES, [CLOCK], {}, abilities(CHAT_TEMPLATE))

    assert found.messages == MESSAGES
    assert (found.tools, found.names, found.ignored) == ([CLOCK], (), ())


def test_neighbours_of_one_role_are_one_message_where_roles_have_to_alternate() -> None:
    answers: list[dict[str, Any]] = [
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm."},
        {"role": "assistant", "content": "Six.", "reasoning_content": "So."},
    ]
    said = [{"role": "user", "content": "What time is it?"}, *answers]

    found = fit(said, None, {}, abilities(REFUSING_SYSTEM))

    assert "I look.\n\nSix." in render(REFUSING_SYSTEM, found.messages)
    assert found.messages[1]["reasoning_content"] == "Hm.\n\nSo."
    assert found.names == ("turns",)


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (REFUSING_SYSTEM, ("inline-system", "system-role", "tool-calls", "turns")),
        (HEAD_ONLY, ("inline-system", "tool-calls")),
        (HOISTING, ("inline-system", "tool-calls")),
        (NINE, ()),
    ],
)
def test_nothing_that_was_said_is_lost_and_all_stays_in_its_place(
    template: str, names: tuple[str, ...]
) -> None:
    found = fit(MESSAGES, None, {}, abilities(template))

    prompt = render(template, found.messages)
    said = ["Be brief.", "What time", "I look.", "clock", "Bern", "Six.", "Plan mode.", "Thanks."]
    places = [prompt.index(word) for word in said]
    assert places == sorted(places)
    assert found.names == names


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, HEAD_ONLY, HOISTING, DROPPING, REFUSING_SYSTEM]
)
def test_no_system_message_at_the_head_is_lost(template: str) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
    ]

    found = fit(messages, None, {}, abilities(template))

    prompt = render(template, found.messages)
    places = [prompt.index(word) for word in ("Be brief.", "Be kind.", "Hello")]
    assert places == sorted(places)


def test_system_message_that_becomes_the_users_says_what_it_was() -> None:
    found = fit(MESSAGES, None, {}, abilities(HEAD_ONLY))

    assert found.messages[4] == {
        "role": "user",
        "content": "<system-message>\nPlan mode.\n</system-message>",
    }
    assert [one["role"] for one in MESSAGES][4] == "system"


def test_tools_that_a_template_does_not_know_are_named_as_ignored() -> None:
    found = fit(MESSAGES, [CLOCK], {}, abilities(HOISTING))

    assert (found.tools, found.ignored) == (None, ("tools",))


def test_short_ids_of_calls_and_results_belong_together() -> None:
    found = fit(MESSAGES, [CLOCK], {}, abilities(NINE))

    call, result = found.messages[2]["tool_calls"][0]["id"], found.messages[3]["tool_call_id"]
    assert call == result
    assert len(call) == 9
    assert call.isalnum()


def test_thinking_and_options_go_where_the_template_looks_for_them() -> None:
    messages = [
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."},
    ]
    args = {"enable_thinking": True, "reasoning_effort": "low", "thinking_budget": 7}

    found = fit(messages, None, args, abilities(HEAD_ONLY))

    assert found.messages[1] == {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}
    assert found.template_args == {"enable_thinking": True, "reasoning_effort": "low"}
    assert found.ignored == ("thinking_budget",)


def test_template_that_refuses_everything_takes_nothing() -> None:
    found = abilities("{{ raise_exception('no') }}")

    taken = (found.system, found.inline_system, found.turns, found.tools, found.calls)
    assert taken == (False,) * 5
