"""What is sent back as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from persist_cache.server.validation import RefusedError


@dataclass(frozen=True, slots=True)
class Response:
    """What to send back; there are never CORS headers."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    # Not by msgspec alone: counters may be larger than the 64 bits it knows.
    body = json.dumps(msgspec.to_builtins(value), allow_nan=False)
    return Response(status, body.encode(), headers=headers or {})


def refusal_response(refusal: RefusedError) -> Response:
    """A refusal as the admin API tells it."""
    return json_response({"error": str(refusal)}, refusal.status, refusal.headers)
