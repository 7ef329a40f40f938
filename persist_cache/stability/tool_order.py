"""Definitions of tools in an order that does not change: by name, and their keys likewise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_FIRST = (
    *("type", "function", "name", "description", "parameters", "input_schema", "strict"),
    *("enum", "properties", "items", "required", "additionalProperties"),
)
_RANKS = {name: rank for rank, name in enumerate(_FIRST)}
"""Keys in the order in which most clients write them, which models know best."""


def in_order(tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The same definitions, sorted by name, with all keys in one order.

    Nothing else changes: values are equal, and lists within them keep their order.
    """
    return sorted((_canonical(tool) for tool in tools), key=_name)


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are equal, with their keys in the same order."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(is_same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(is_same, a, b))
    return bool(a == b)


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        names = sorted(value, key=lambda name: (_RANKS.get(name, len(_RANKS)), name))
        return {name: _canonical(value[name]) for name in names}
    if isinstance(value, list):
        return [_canonical(one) for one in value]
    return value


def _name(tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    named = function if isinstance(function, Mapping) else tool
    name = named.get("name") if isinstance(named, Mapping) else None
    return name if isinstance(name, str) else ""
