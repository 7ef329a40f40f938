"""Sessions of an agent, made up in the shapes that agents have, in words of our own.

The same words are drawn for the same seed, so two servers can be sent the same session.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_WORDS = [
    *("read", "the", "file", "before", "you", "change", "it", "and", "run", "every", "test"),
    *("after", "each", "step", "so", "that", "nothing", "breaks", "keep", "answers", "short"),
    *("name", "paths", "ask", "when", "something", "is", "not", "clear", "use", "tools", "help"),
]
BILLING = "x-anthropic-billing-header: cc_version=2.1.104.{}; cc_entrypoint=cli; cch={};"
COUNTDOWN = "<total_tokens>{} tokens left</total_tokens>"
EPHEMERAL = {"type": "ephemeral"}
_REMINDER_EVERY = 7


def prose(drawn: random.Random, words: int) -> str:
    """Some sentences."""
    text = " ".join(drawn.choices(_WORDS, k=words))
    return text[:1].upper() + text[1:] + "."


def tool(drawn: random.Random, place: int, words: int) -> dict[str, Any]:
    """A tool's definition."""
    return {
        "name": f"tool_{place}",
        "description": prose(drawn, words),
        "input_schema": {
            "type": "object",
            "properties": {"path": {"type": "string", "description": prose(drawn, 6)}},
            "required": ["path"],
        },
    }


def session(
    *,
    user_turns: int = 3,
    tool_turns: int = 10,
    tools: int = 20,
    words: int = 300,
    seed: int = 0,
    hosted: bool = True,
    folder: str = "",
) -> Iterator[dict[str, Any]]:
    """Bodies as an agent sends them, one after the other; `words` is the size of a tool.

    Each ends in a count of the tokens that are left. In the middle of a turn there is a task with
    the same head, and one of a sub-agent with a head of its own.

    Args:
        user_turns: Of the session.
        tool_turns: Of each of those.
        tools: How many there are.
        words: The size of a tool; a system prompt is 15 times as large.
        seed: Of all that is drawn.
        hosted: With what a client of a hosted service adds: a billing line, a count of the tokens
            that are left, reminders in between.
        folder: That the system prompt says the agent works in; "" for none.
    """
    drawn = random.Random(seed)
    known = [tool(drawn, place, words) for place in range(tools)]
    system, other = prose(drawn, 15 * words), prose(drawn, 5 * words)
    if folder:
        system += f"\n<env>\nWorking directory: {folder}\nIs directory a git repo: Yes\n</env>"
    messages: list[dict[str, Any]] = []
    number = 0

    def said(**more: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        left = COUNTDOWN.format(200_000 - number * 100)
        head = [
            {"type": "text", "text": BILLING.format(f"f{number:02x}", f"{number:05x}")},
            {"type": "text", "text": prose(random.Random(1), 20)},
        ]
        about = more.pop("about", system)
        text = f"{about}\n{left}" if hosted else about
        body = {
            "model": "claude-large",
            "max_tokens": 1,
            "system": [
                *(head if hosted else ()),
                {"type": "text", "text": text, "cache_control": EPHEMERAL},
            ],
            "tools": known,
            "messages": copy.deepcopy(messages),
            **more,
        }
        last = body["messages"][-1]["content"]
        if isinstance(last, list):
            last[-1]["cache_control"] = EPHEMERAL
        if hosted:
            body["messages"].append({"role": "system", "content": left})
        return body

    for turn in range(user_turns):
        reminder = f"<system-reminder>\n{prose(drawn, 20)}\n</system-reminder>"
        text = [{"type": "text", "text": reminder}, {"type": "text", "text": prose(drawn, 15)}]
        messages.append({"role": "user", "content": text})
        title = [{"role": "user", "content": f"Name this: {prose(drawn, 20)}"}]
        yield said(system="Write a title of five words.", tools=None, messages=title)
        yield said()
        for step in range(tool_turns):
            call = f"toolu_{turn:02d}{step:02d}"
            content = [
                {"type": "text", "text": prose(drawn, 10)},
                {
                    "type": "tool_use",
                    "id": call,
                    "name": f"tool_{step % tools}",
                    "input": {"path": f"src/{turn}_{step}.py"},
                },
            ]
            result = {"type": "tool_result", "tool_use_id": call, "content": prose(drawn, 60)}
            step_taken: list[dict[str, Any]] = [
                {"role": "assistant", "content": content},
                {"role": "user", "content": [result]},
            ]
            messages += copy.deepcopy(step_taken)
            if hosted and len(messages) % _REMINDER_EVERY == 0:
                messages.append({"role": "system", "content": f"Reminder: {prose(drawn, 12)}"})
            yield said()
            if step == tool_turns // 2:
                task = [{"role": "user", "content": [{"type": "text", "text": prose(drawn, 40)}]}]
                yield said(messages=copy.deepcopy(task))
                yield said(messages=copy.deepcopy(task), about=other, tools=known[::2])
                task += step_taken
                yield said(messages=task, about=other, tools=known[::2])
        messages.append({"role": "assistant", "content": prose(drawn, 30)})


def as_chat(body: dict[str, Any]) -> dict[str, Any]:
    """A body of Anthropic's Messages as one of OpenAI's chat, which more servers speak."""
    system = "\n".join(one["text"] for one in _blocks(body["system"]))
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    for message in body["messages"]:
        blocks = _blocks(message["content"])
        text = "\n\n".join(one["text"] for one in blocks if one["type"] == "text")
        calls = [
            {
                "id": one["id"],
                "type": "function",
                "function": {"name": one["name"], "arguments": json.dumps(one["input"])},
            }
            for one in blocks
            if one["type"] == "tool_use"
        ]
        messages += [
            {"role": "tool", "tool_call_id": one["tool_use_id"], "content": one["content"]}
            for one in blocks
            if one["type"] == "tool_result"
        ]
        if text or calls:
            said = {"role": message["role"], "content": text}
            messages.append({**said, "tool_calls": calls} if calls else said)
    tools = [
        {
            "type": "function",
            "function": {
                "name": one["name"],
                "description": one["description"],
                "parameters": one["input_schema"],
            },
        }
        for one in body.get("tools") or ()
    ]
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _blocks(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
