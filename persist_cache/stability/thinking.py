"""How templates call what a model thought, and the options by which they keep it."""

from __future__ import annotations

import re

FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Of a message, for what was thought before it was said; the first one is the most common."""
KEEPING = {
    "preserve_thinking": True,
    "clear_thinking": False,
    "truncate_history_thinking": False,
    "keep_past_thinking": True,
}
"""Options by which templates keep what was thought before the last message of the user."""


def options_in(source: str) -> dict[str, bool]:
    """Those of a template that it has, with the value by which it keeps thoughts.

    Args:
        source: Its text.
    """
    words = set(re.findall(r"\w+", source))
    return {name: value for name, value in KEEPING.items() if name in words}
