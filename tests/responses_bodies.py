"""Bodies of requests to OpenAI's Responses, made up in the shape of an agent's."""

from __future__ import annotations

import json
import random
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
    turns: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """A request in the middle of an agent's work; some 20,000 tokens unless told otherwise."""
    drawn = random.Random(seed)
    items: list[dict[str, Any]] = [
        {"type": "message", "role": "developer", "content": [part(prose(drawn, 30))]},
        {
            "type": "message",
            "role": "user",
            "content": [
                part(prose(drawn, 30)),
                part(f"<environment_context>{prose(drawn, 9)}</environment_context>"),
            ],
        },
        {"role": "user", "content": prose(drawn, 12)},
    ]
    for turn in range(turns):
        call = f"call_{turn:024d}"
        thought = [part(prose(drawn, 20), "reasoning_text")]
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
            {"type": "function_call_output", "call_id": call, "output": prose(drawn, 100)},
        ]
    call = "call_patch"
    items += [
        {"type": "custom_tool_call", "call_id": call, "name": "patch", "input": prose(drawn, 9)},
        {"type": "custom_tool_call_output", "call_id": call, "output": [part("Done.")]},
        {"role": "user", "content": [part(prose(drawn, 9))]},
    ]
    inner = [function(drawn, place, 20) for place in range(2)]
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
