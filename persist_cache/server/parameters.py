"""What a request of the admin API may say in its method and its query."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl

from persist_cache.server.guard import Request
from persist_cache.server.validation import RefusedError


def only(request: Request, *methods: str) -> None:
    if request.method not in methods:
        raise RefusedError(405, f"Use {' or '.join(methods)} here.", {"Allow": ", ".join(methods)})


def query_of(request: Request, known: set[str]) -> dict[str, str]:
    text = request.target.partition("?")[2]
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=20, errors="strict")
    except ValueError:
        raise RefusedError(400, "The query cannot be understood.") from None
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RefusedError(400, "The query names a parameter twice.")
    if not found.keys() <= known:
        allowed = f"it may have {', '.join(sorted(known))}" if known else "it may have none"
        raise RefusedError(400, f"The query has an unknown parameter; {allowed}.")
    return found


def choice(query: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str | None:
    value = query.get(name)
    if value is not None and value not in allowed:
        raise RefusedError(400, f"{name} must be one of {', '.join(allowed)}.")
    return value


def number(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    value = query.get(name)
    if value is None:
        return default
    known = value.isascii() and value.isdigit() and len(value) <= 16
    if not known or not low <= int(value) <= high:
        raise RefusedError(400, f"{name} must be a whole number from {low} to {high}.")
    return int(value)


def flag(query: Mapping[str, str], name: str) -> bool:
    value = query.get(name, "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise RefusedError(400, f"{name} must be true or false.")
    return value in ("true", "1")
