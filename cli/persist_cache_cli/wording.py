"""What is said of keys and values of TOML files that are wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any


def nearest(name: str, known: Iterable[str], between: str = "-") -> str:
    """The name that was meant, as a part of a sentence; "" when none is like it.

    Args:
        name: What was written.
        known: All names.
        between: What stands between their words.
    """
    spelled = name.replace("_", between).replace("-", between).lower()
    near = difflib.get_close_matches(spelled, sorted(known), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


def shown(value: Any) -> str:
    """A value as TOML has it, for people."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, default=str, ensure_ascii=False)


def as_sentence(text: str) -> str:
    """A text with an end."""
    return text if text[-1:] in (".", "?") else f"{text}."
