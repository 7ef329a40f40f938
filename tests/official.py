"""The official clients, each imported when it is first used: `official.openai.OpenAI`.

They take a second or two of a processor, and all tests are collected by processes of which one or
two run any that use them. What stands in a test module by itself is looked at when it is collected,
so they are asked for by this module's name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import anthropic as anthropic
    import openai as openai


def __getattr__(name: str) -> Any:
    if name in ("anthropic", "openai"):
        return importlib.import_module(name)
    raise AttributeError(name)
