"""Bodies of requests to OpenAI's Responses, made up in the shape of an agent's."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from tests.anthropic_bodies import prose, tool

PATCH = {
    "type": "custom",
    "name": "patch",
    "description": "Changes a file.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "begin"'},
}


def function(drawn: random.Random, place: int, words: int) -> dict[str, Any]:
    """A tool's definition."""
    made = tool(drawn, place, words)
    return {
        "type": "function",
        "name": made["name"],
        "description": made["description"],
        "strict": False,
        "parameters": made["input_schema"],
    }


def part(text: str, kind: str = "input_text") -> dict[str, Any]:
    return {"type": kind, "text": text}


def agent_body(
    *,
    tools: int = 20,
    tool_words: int = 300,
    system_words: int = 4000,
    turn_words: int = 100,
    turns: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """A request in the middle of an agent's work; some 20,000 tokens unless told otherwise."""
    drawn = random.Random(seed)
    items: list[dict[str, Any]] = [
        {"type": "message", "role": "developer", "content": [part(prose(drawn, turn_words // 3))]},
        {
            "type": "message",
            "role": "user",
            "content": [
                part(prose(drawn, turn_words // 3)),
                part(f"<environment_context>{prose(drawn, 9)}</environment_context>"),
            ],
        },
        {"role": "user", "content": prose(drawn, 12)},
    ]
    for turn in range(turns):
        call = f"call_{turn:024d}"
        thought = [part(prose(drawn, turn_words // 5), "reasoning_text")]
        items += [
            {"type": "reasoning", "summary": [], "content": thought, "encrypted_content": None},
            {
                "type": "message",
                "role": "assistant",
                "content": [part(prose(drawn, 8), "output_text")],
            },
            {
                "type": "function_call",
                "call_id": call,
                "name": f"tool_{turn % max(tools, 1)}",
                "arguments": json.dumps({"path": f"src/{turn}.py"}),
            },
            {"type": "function_call_output", "call_id": call, "output": prose(drawn, turn_words)},
        ]
    call = "call_patch"
    items += [
        {"type": "custom_tool_call", "call_id": call, "name": "patch", "input": prose(drawn, 9)},
        {"type": "custom_tool_call_output", "call_id": call, "output": [part("Done.")]},
        {"role": "user", "content": [part(prose(drawn, 9))]},
    ]
    inner = [function(drawn, place, tool_words // 10) for place in range(2)]
    return {
        "model": "gpt-large",
        "instructions": prose(drawn, system_words),
        "input": items,
        "tools": [
            *(function(drawn, place, tool_words) for place in range(tools)),
            PATCH,
            {"type": "namespace", "name": "mcp__cal", "description": "Dates.", "tools": inner},
            {"type": "web_search", "external_web_access": True},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199-thread",
        "text": {"verbosity": "low"},
        "client_metadata": {"session": "1"},
    }


def session(
    *, user_turns: int, tool_turns: int, tools: int, words: int
) -> Iterator[dict[str, Any]]:
    """Bodies as an agent sends them, one after the other; `words` is the size of a tool.

    The first of each turn is a request for a title, with a head of its own.
    """
    drawn = random.Random(3)
    known = [function(drawn, place, words) for place in range(tools)]
    instructions = prose(drawn, 15 * words)
    items: list[dict[str, Any]] = [{"role": "developer", "content": prose(drawn, words)}]

    def said(**more: Any) -> dict[str, Any]:
        body = {"model": "m", "instructions": instructions, "tools": [*known, PATCH]}
        return {**body, "max_output_tokens": 1, "input": copy.deepcopy(items), **more}

    for turn in range(user_turns):
        items.append({"role": "user", "content": [part(prose(drawn, 15)), part(prose(drawn, 9))]})
        yield said(instructions="Write a title.", tools=None, input=prose(drawn, 20))
        yield said()
        for step in range(tool_turns):
            call = f"call_{turn:02d}{step:02d}"
            calls = {"type": "function_call", "name": f"tool_{step % tools}", "arguments": "{}"}
            if step % 3 == 2:
                calls = {"type": "custom_tool_call", "name": "patch", "input": prose(drawn, 9)}
            output = {"type": f"{calls['type']}_output", "call_id": call}
            items += [
                {"type": "reasoning", "summary": [part(prose(drawn, 9), "summary_text")]},
                {"role": "assistant", "content": [part(prose(drawn, 10), "output_text")]},
                {**calls, "call_id": call},
                {**output, "output": prose(drawn, 60)},
            ]
            yield said()
        items.append({"role": "assistant", "content": prose(drawn, 30)})
