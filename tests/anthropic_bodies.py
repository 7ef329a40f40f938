"""Bodies of requests to Anthropic's Messages, made up in the shape of an agent's."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

from persist_cache_cli.bench.sessions import BILLING as BILLING
from persist_cache_cli.bench.sessions import COUNTDOWN as COUNTDOWN
from persist_cache_cli.bench.sessions import EPHEMERAL as EPHEMERAL
from persist_cache_cli.bench.sessions import prose as prose
from persist_cache_cli.bench.sessions import tool as tool


def agent_body(
    *,
    tools: int = 20,
    tool_words: int = 300,
    system_words: int = 4000,
    turns: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """A request in the middle of an agent's work; some 20,000 tokens unless told otherwise."""
    drawn = random.Random(seed)
    system = [
        {"type": "text", "text": BILLING.format("f27", "00000")},
        {"type": "text", "text": prose(drawn, system_words // 8), "cache_control": EPHEMERAL},
        {"type": "text", "text": prose(drawn, system_words), "cache_control": EPHEMERAL},
    ]
    reminder = f"<system-reminder>\n{prose(drawn, 30)}\n</system-reminder>"
    messages: list[dict[str, Any]] = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": reminder},
                {"type": "text", "text": prose(drawn, 12)},
            ],
        }
    ]
    for turn in range(turns):
        call = f"toolu_{turn:024d}"
        messages.append(
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": prose(drawn, 20), "signature": "s"},
                    {"type": "text", "text": prose(drawn, 8)},
                    {
                        "type": "tool_use",
                        "id": call,
                        "name": f"tool_{turn % max(tools, 1)}",
                        "input": {"path": f"src/{turn}.py"},
                    },
                ],
            }
        )
        result = {"type": "tool_result", "tool_use_id": call, "content": prose(drawn, 100)}
        messages.append({"role": "user", "content": [result]})
    messages.append({"role": "system", "content": prose(drawn, 10)})
    messages.append(
        {
            "role": "user",
            "content": [{"type": "text", "text": prose(drawn, 9), "cache_control": EPHEMERAL}],
        }
    )
    return {
        "model": "claude-large",
        "max_tokens": 1024,
        "stream": True,
        "system": system,
        "tools": [tool(drawn, place, tool_words) for place in range(tools)],
        "messages": messages,
        "metadata": {"user_id": "someone"},
        "thinking": {"type": "enabled", "budget_tokens": 512},
        "temperature": 1,
    }


def as_messages(chat: dict[str, Any]) -> dict[str, Any]:
    """The body of a chat, as a client of Messages would send it."""
    system: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = []
    for one in chat["messages"]:
        said = one.get("content") or []
        parts = [{"type": "text", "text": said}] if isinstance(said, str) else list(said)
        match one["role"]:
            case "system" | "developer":
                system += parts
            case "tool":
                result = {"type": "tool_result", "tool_use_id": one["tool_call_id"]}
                messages.append({"role": "user", "content": [{**result, "content": parts}]})
            case role:
                calls = [
                    {
                        "type": "tool_use",
                        "id": call["id"],
                        "name": call["function"]["name"],
                        "input": json.loads(call["function"]["arguments"] or "{}"),
                    }
                    for call in one.get("tool_calls") or []
                ]
                messages.append({"role": role, "content": [*parts, *calls]})
    functions = [one["function"] for one in chat.get("tools") or []]
    tools = [
        {
            "name": one["name"],
            "description": one.get("description", ""),
            "input_schema": one.get("parameters") or {"type": "object"},
        }
        for one in functions
    ]
    return {
        "model": "claude-large",
        "max_tokens": 1,
        "system": system,
        "messages": messages,
        "tools": tools,
    }


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in a value: what it is in, and where."""
    for place in value if isinstance(value, dict) else range(len(value)):
        yield value, place
        if isinstance(value[place], dict | list):
            yield from leaves(value[place])


def spoilt(body: dict[str, Any], drawn: random.Random, odd: Sequence[Any]) -> dict[str, Any]:
    """A body with something odd in one or two of its places, or without something."""
    found = copy.deepcopy(body)
    for _ in range(drawn.randrange(1, 3)):
        inside, place = drawn.choice(list(leaves(found)))
        if isinstance(inside, dict) and drawn.random() < 0.2:
            del inside[place]
        else:
            inside[place] = copy.deepcopy(drawn.choice(odd))
    return found
