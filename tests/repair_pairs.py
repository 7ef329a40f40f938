"""Pairs of requests that differ in what one repair mends, and in a new turn of the user."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.anthropic_bodies import BILLING, COUNTDOWN, prose
from tests.prompt_shapes import CLAUDE_CODE
from tests.tiny_models import CHAT_TEMPLATE

REQUESTS = Path(__file__).parent / "requests"
HEADS_ONLY = (
    "{%- for message in messages[1:] -%}{%- if message.role == 'system' -%}"
    "{{ raise_exception('system messages come first') }}{%- endif -%}{%- endfor -%}"
)
"""In front of a template, that refuses system messages in mid-conversation."""
THINKING_TEMPLATE = CHAT_TEMPLATE.replace(
    "<|im_start|>{{ message.role }}\n",
    "<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content and (preserve_thinking or loop.index0 > ns.last) %}"
    "<think>{{ message.reasoning_content }}</think>\n{% endif %}",
)
THINKING_TEMPLATE = (
    "{%- set ns = namespace(last=-1) -%}{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
) + THINKING_TEMPLATE
"""Leaves out what was thought before the last message of the user, as Qwen's does."""


@dataclass(frozen=True)
class Pair:
    """Two requests of one client.

    Attributes:
        name: Of the repair that mends it, or several with a comma.
        bodies: The first one, and the second.
        template: Of the model.
        protocol: Of the bodies.
    """

    name: str
    bodies: tuple[dict[str, Any], dict[str, Any]]
    template: str = CHAT_TEMPLATE
    protocol: str = field(default="chat")


def pairs(words: int = 60) -> list[Pair]:
    """A pair for each repair; `words` is the size of a text in them."""
    drawn = random.Random(21)
    texts = [prose(drawn, words) for _ in range(8)]
    tools = [_tool(drawn, name, words) for name in ("write", "read", "grep", "edit")]

    def chat(system: str, *more: Any, known: Any = tools, first: str = texts[0]) -> Any:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": first}]
        return {"messages": [*messages, *more], "tools": known}

    def messages(system: Any, *more: Any) -> dict[str, Any]:
        said = [{"role": "user", "content": texts[0]}, *more]
        return {"model": "m", "max_tokens": 1, "system": system, "messages": said}

    turn = [{"role": "assistant", "content": texts[1]}, {"role": "user", "content": texts[2]}]
    home = "Current time is 09:{:02d}:00. Today's date is 2026-11-25.\n" + texts[3]
    skills = "<system-reminder>\nSkills:\n\n- {}\n- {}\n</system-reminder>\n\n" + texts[4]
    here, there = (
        CLAUDE_CODE.format(folder=folder, day="", iso=day, file=file)
        for folder, day, file in (("/home/u/a", "2026-11-25", "a"), ("/srv/b", "2026-11-26", "b"))
    )
    thought = [
        {"role": "assistant", "content": "", "reasoning_content": texts[3], "tool_calls": _calls()},
        {"role": "tool", "tool_call_id": "c1", "content": texts[4]},
    ]
    cleared: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "tool_calls": _calls()},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
    ]

    def with_time(stamp: str, *more: Any) -> Any:
        said = copy.deepcopy(cleared)
        said[1]["content"] = f"[Old tool result content cleared at 2026-11-25T{stamp}Z]"
        return chat(texts[3], *said, *turn, *more)

    newest = [{"role": "assistant", "content": texts[5]}, {"role": "user", "content": texts[6]}]
    plan = {"role": "system", "content": "Plan mode is on."}
    return [
        Pair(
            "billing",
            (
                messages(f"{BILLING.format('f27', '00000')}\n{texts[3]}"),
                messages(f"{BILLING.format('b11', '12345')}\n{texts[3]}", *turn),
            ),
            protocol="messages",
        ),
        Pair(
            "countdown",
            (
                messages(f"{texts[3]}\n{COUNTDOWN.format(900_000)}"),
                messages(f"{texts[3]}\n{COUNTDOWN.format(7)}", *turn),
            ),
            protocol="messages",
        ),
        Pair(
            "inline-system",
            (chat(texts[3], *turn), chat(texts[3], *turn, plan, *newest)),
            template=HEADS_ONLY + CHAT_TEMPLATE,
        ),
        Pair("date", (chat(home.format(15)), chat(home.format(16)))),
        Pair("tools", (chat(texts[3]), chat(texts[3], *turn, known=_reordered(tools)))),
        Pair(
            "reminders",
            (
                chat(texts[3], first=skills.format("b: do", "a: see")),
                chat(texts[3], *turn, first=skills.format("a: see", "b: do")),
            ),
        ),
        Pair("cleared", (with_time("09:00:00"), with_time("10:01:02", *newest))),
        Pair("env,date", (chat(here), chat(there))),
        Pair(
            "thinking",
            (chat(texts[3], *thought), chat(texts[3], *thought, *newest)),
            template=THINKING_TEMPLATE,
        ),
    ]


def recorded(name: str) -> dict[str, Any]:
    """The body of a recorded request."""
    body: dict[str, Any] = json.loads((REQUESTS / f"{name}.json").read_text())["body"]
    return body


def elsewhere(body: dict[str, Any]) -> dict[str, Any]:
    """The same request in another folder, on the next day.

    Tools stay: the path in some of their descriptions is an example that their client always gives.
    """
    said = json.dumps(body["messages"])
    for here, there in (
        ("/home/user/project", "/home/user/other-place"),
        ("-home-user-project", "-home-user-other-place"),
        ("Wed Nov 25 2026", "Thu Nov 26 2026"),
        ("Wednesday, November 25, 2026", "Thursday, November 26, 2026"),
    ):
        said = said.replace(here, there)
    return {**body, "messages": json.loads(said)}


def _tool(drawn: random.Random, name: str, words: int) -> dict[str, Any]:
    properties = {"path": {"type": "string", "description": prose(drawn, 6)}, "all": {}}
    parameters = {"type": "object", "properties": properties, "required": ["path"]}
    function = {"name": name, "description": prose(drawn, words), "parameters": parameters}
    return {"type": "function", "function": function}


def _reordered(tools: list[dict[str, Any]]) -> list[Any]:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: turned(value[name]) for name in reversed(value)}
        return value

    return [turned(tool) for tool in reversed(tools)]


def _calls() -> list[dict[str, Any]]:
    function = {"name": "read", "arguments": "{}"}
    return [{"id": "c1", "type": "function", "function": function}]
