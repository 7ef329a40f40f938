"""Pairs of requests that differ in one way each, as clients make them differ."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from persist_cache.stability.causes.kinds import Kind

Body = dict[str, Any]

PROSE = "Read the file before you change it, and run every test after each step.\n" * 3
ENV = """<env>
Working directory: {folder}
Is directory a git repo: Yes
Platform: linux
</env>
"""


@dataclass(frozen=True)
class Pair:
    """Two requests of one client.

    Attributes:
        name: Of what differs.
        first: The earlier body.
        second: The later one.
        kind: The cause to be named.
        at: The place to be named.
        repairs: Options that mend it.
    """

    name: str
    first: Body
    second: Body
    kind: Kind
    at: str
    repairs: tuple[str, ...] = ()


def chat(system: str = PROSE, *turns: tuple[str, str], **more: Any) -> Body:
    """A chat that ends with a user's message unless turns are given."""
    said = turns or (("user", "Mend the test of the parser."),)
    messages = [{"role": "system", "content": system}]
    messages += [{"role": role, "content": text} for role, text in said]
    return {"messages": messages, "tools": tools(), "max_tokens": 1, **more}


def messages(system: str = PROSE, *turns: tuple[str, str], **more: Any) -> Body:
    """The same in Anthropic's protocol."""
    said = turns or (("user", "Mend the test of the parser."),)
    return {
        "model": "claude-large",
        "system": [{"type": "text", "text": system}],
        "messages": [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in said
        ],
        "tools": [
            {
                "name": one["name"],
                "description": one["description"],
                "input_schema": one["parameters"],
            }
            for one in (tool["function"] for tool in tools())
        ],
        "max_tokens": 1,
        **more,
    }


def responses(system: str = PROSE, *turns: tuple[str, str], **more: Any) -> Body:
    """The same in OpenAI's Responses."""
    said = turns or (("user", "Mend the test of the parser."),)
    return {
        "model": "default_model",
        "instructions": system,
        "input": [{"role": role, "content": text} for role, text in said],
        "tools": [{"type": "function", **tool["function"]} for tool in tools()],
        "max_output_tokens": 1,
        **more,
    }


def tools(count: int = 3) -> list[Body]:
    """Definitions of tools."""
    return [
        {
            "type": "function",
            "function": {
                "name": f"tool_{number}",
                "description": f"Does number {number} of what can be done with a file.",
                "parameters": {
                    "type": "object",
                    "properties": {"path": {"type": "string"}, "line": {"type": "integer"}},
                },
            },
        }
        for number in range(count)
    ]


def edited(body: Body, before: str, after: str) -> Body:
    """A copy with a text changed wherever it occurs."""
    written = json.dumps(body)
    old, new = json.dumps(before)[1:-1], json.dumps(after)[1:-1]
    assert old in written, before
    found: Body = json.loads(written.replace(old, new))
    return found


def in_system(name: str, before: str, after: str, kind: Kind, *repairs: str) -> Iterator[Pair]:
    """The same change of a system prompt in both protocols, in front of much other text."""
    for protocol, make, at in (
        ("chat", chat, "messages.0.content"),
        ("messages", messages, "system.0"),
    ):
        first = make(f"{PROSE}{before}\n{PROSE}")
        second = edited(first, before, after)
        yield Pair(f"{name}-{protocol}", first, second, kind, at, repairs)


LONG = (
    ("user", "Look at the parser. " * 8),
    ("assistant", "It reads one line at a time. " * 4),
    ("user", "Which lines does it skip?"),
    ("assistant", "Those that begin with a hash. " * 4),
    ("user", "Write that down."),
)


def in_tools(name: str, change: Any, kind: Kind, at: str, *repairs: str) -> Pair:
    """A change of a chat's tools."""
    first = chat()
    second = copy.deepcopy(first)
    change(second["tools"])
    return Pair(name, first, second, kind, at, repairs)


def _reversed_keys(tools: list[Body]) -> None:
    tools[1]["function"] = dict(reversed(tools[1]["function"].items()))


def _spaced(tools: list[Body]) -> None:
    tools[2]["function"]["description"] += "  "


def _schema(tools: list[Body]) -> None:
    tools[1]["function"]["parameters"]["properties"]["line"]["type"] = "string"


def all_pairs() -> list[Pair]:
    """All of them."""
    long, long_messages = chat(PROSE, *LONG), messages(PROSE, *LONG)
    summary = "This conversation is continued from a previous one. Summary: lines were read."
    reminder = "<system-reminder>\nSkills:\n{}\n</system-reminder>"
    cleared = "[Old tool result content cleared at {}]"
    thought = "<think>I have to look at the file first.</think>It reads lines."
    return [
        *in_system(
            "date-iso",
            "Today's date is 2026-11-25.",
            "Today's date is 2026-11-26.",
            Kind.DATE,
            "date",
        ),
        *in_system(
            "date-words",
            "Today's date: Wed Nov 25 2026",
            "Today's date: Thu Nov 26 2026",
            Kind.DATE,
            "date",
        ),
        *in_system(
            "time", "Current time is 09:59:58.", "Current time is 10:00:03.", Kind.DATE, "date"
        ),
        *in_system(
            "env",
            ENV.format(folder="/home/ada/parser"),
            ENV.format(folder="/tmp/lexer"),
            Kind.ENV,
            "env",
        ),
        *in_system(
            "git",
            "gitStatus: This is the status.\nCurrent branch: main\nStatus:\n M a.py",
            "gitStatus: This is the status.\nCurrent branch: next\nStatus:\n M a.py",
            Kind.ENV,
            "env",
        ),
        *in_system("nfd", "The caf\u00e9 is open.", "The cafe\u0301 is open.", Kind.LOOK_ALIKE),
        *in_system("no-break", "Ten files.", "Ten\u00a0files.", Kind.LOOK_ALIKE),
        *in_system("zero-width", "Ten files.", "Ten\u200b files.", Kind.LOOK_ALIKE),
        *in_system("system-edited", "Be brief.", "Explain what you do.", Kind.SYSTEM),
        in_tools("tools-reversed", list.reverse, Kind.TOOL_ORDER, "tools.0", "tools"),
        in_tools("tool-keys", _reversed_keys, Kind.TOOL_SPELLING, "tools.1", "tools"),
        in_tools("tool-spaces", _spaced, Kind.TOOL_SPELLING, "tools.2"),
        in_tools("tool-schema", _schema, Kind.TOOL_SCHEMA, "tools.1"),
        in_tools("tool-removed", list.pop, Kind.TOOL_SET, "tools.2"),
        Pair(
            "reminder-order",
            messages(PROSE, ("user", reminder.format("- commit\n- review") + "\n" + PROSE)),
            messages(PROSE, ("user", reminder.format("- review\n- commit") + "\n" + PROSE)),
            Kind.REMINDER_ORDER,
            "messages.0.content.0",
            ("reminders",),
        ),
        Pair(
            "reminder-other",
            messages(PROSE, ("user", reminder.format("- commit\n- review") + "\n" + PROSE)),
            messages(PROSE, ("user", reminder.format("- commit\n- deploy") + "\n" + PROSE)),
            Kind.REMINDERS,
            "messages.0.content.0",
        ),
        Pair(
            "cleared",
            chat(PROSE, *LONG[:2], ("tool", cleared.format("2026-11-25T09:00:00Z")), *LONG[2:]),
            chat(PROSE, *LONG[:2], ("tool", cleared.format("2026-11-26T10:30:00Z")), *LONG[2:]),
            Kind.CLEARED,
            "messages.3.content",
            ("cleared",),
        ),
        Pair(
            "thinking",
            chat(PROSE, LONG[0], ("assistant", thought), *LONG[2:]),
            chat(PROSE, LONG[0], ("assistant", "It reads lines."), *LONG[2:]),
            Kind.THINKING,
            "messages.2.content",
        ),
        Pair(
            "compacted", long, chat(PROSE, ("user", summary)), Kind.COMPACTED, "messages.1.content"
        ),
        Pair(
            "compacted-messages",
            long_messages,
            messages(PROSE, ("user", summary)),
            Kind.COMPACTED,
            "messages.0.content.0",
        ),
        Pair("shortened", long, chat(PROSE, *LONG[2:]), Kind.SHORTENED, "messages.1.content"),
        Pair(
            "title",
            long,
            {
                "messages": [
                    {"role": "system", "content": "Write a title of five words."},
                    {"role": "user", "content": "Name this."},
                ],
                "max_tokens": 1,
            },
            Kind.SIDE_REQUEST,
            "messages.0.content",
        ),
        Pair(
            "message-edited",
            long,
            edited(long, "Which lines does it skip?", "Which lines are read?"),
            Kind.MESSAGE,
            "messages.3.content",
        ),
        Pair(
            "question",
            long,
            edited(long, "Write that down.", "Forget it."),
            Kind.QUESTION,
            "messages.5.content",
        ),
        Pair(
            "conversation",
            chat(PROSE, ("user", "Mend the parser.")),
            chat(PROSE, ("user", "What is a lexer?")),
            Kind.CONVERSATION,
            "messages.1.content",
        ),
        Pair(
            "text",
            {"prompt": PROSE + "Once upon a time", "max_tokens": 1},
            {"prompt": PROSE + "In the beginning", "max_tokens": 1},
            Kind.TEXT,
            "prompt",
        ),
    ]
