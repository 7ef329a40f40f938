"""Members of a body, read one by one; what is malformed is refused by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from persist_cache.server.validation import wrong

MAX_TOP_K = 10**9


def below(name: str, member: str) -> str:
    """What a member of the object `name` is called; "" is the body itself."""
    return f"{name}.{member}" if name else member


def text_of(block: Mapping[str, Any], member: str, name: str) -> str:
    """A text that an object must have.

    Raises:
        RefusedError: It has none.
    """
    found = block.get(member)
    if not isinstance(found, str):
        raise wrong(below(name, member), "must be a text.")
    return found


def kind(block: Mapping[str, Any], name: str) -> str:
    """The type of an object.

    Raises:
        RefusedError: It has none.
    """
    return text_of(block, "type", name)


def object_of(body: Mapping[str, Any], member: str, name: str = "") -> Mapping[str, Any]:
    """An object that may be absent; empty then.

    Raises:
        RefusedError: It is something else.
    """
    found = body.get(member)
    if found is not None and not isinstance(found, dict):
        raise wrong(below(name, member), "must be an object.")
    return found or {}


def flag(body: Mapping[str, Any], member: str, name: str = "") -> bool | None:
    """A member that is true, false or absent.

    Raises:
        RefusedError: It is something else.
    """
    value = body.get(member)
    if value is not None and not isinstance(value, bool):
        raise wrong(below(name, member), "must be true or false.")
    return value


def check_whole(value: Any, name: str, low: int, high: int) -> None:
    """Check a whole number.

    Raises:
        RefusedError: It is none, or beyond its bounds.
    """
    if not is_a(value, int) or not low <= value <= high:
        raise wrong(name, f"must be a whole number from {low} to {high}.")


def sampling(body: Mapping[str, Any], *, hottest: int) -> dict[str, float | int]:
    """How the answer is to be sampled, as far as the body says.

    Args:
        body: Of a request.
        hottest: The highest temperature.

    Raises:
        RefusedError: It cannot be sampled so.
    """
    found: dict[str, float | int] = {}
    for name, most in (("temperature", hottest), ("top_p", 1)):
        value = body.get(name)
        if value is None:
            continue
        if not is_a(value, int | float) or not math.isfinite(value) or not 0 <= value <= most:
            raise wrong(name, f"must be a number from 0 to {most}.")
        found[name] = float(value)
    if (top_k := body.get("top_k")) is not None:
        check_whole(top_k, "top_k", 0, MAX_TOP_K)
        found["top_k"] = top_k
    return found


def is_a(value: Any, kinds: Any) -> bool:
    """Whether a value is of that kind; true and false are no numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool)
