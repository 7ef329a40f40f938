"""The demo's prompt: a local assistant with eight tools, as long as real ones are.

SmolLM2's chat template knows no `tools`, so the definitions are written into the system message,
one a line, as many assistants do.
"""

from __future__ import annotations

import functools
import json
from importlib import resources

QUESTIONS = ("What is the capital of France?", "How many days are there in a week?")
"""One for each of the two conversations; each has a short greedy answer by SmolLM2-135M."""

FOLLOW_UP = "Which river flows through it?"
"""The second turn of the first conversation; "it" can only be known from the first turn."""


@functools.cache
def system_text() -> str:
    """Return the system message: the instructions, then the tool definitions."""
    data = resources.files("persist_cache_cli.demo") / "data"
    instructions = (data / "system.md").read_text(encoding="utf-8").strip()
    tools = json.loads((data / "tools.json").read_text(encoding="utf-8"))
    lines = [json.dumps({"type": "function", "function": tool}) for tool in tools]
    return "\n".join([instructions, "", "<tools>", *lines, "</tools>"])


def messages(question: str) -> list[dict[str, str]]:
    """Return a new conversation: the system message and one question."""
    return [
        {"role": "system", "content": system_text()},
        {"role": "user", "content": question},
    ]
