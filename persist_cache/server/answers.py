"""What is sent back as a whole."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from typing import Any

import msgspec
from msgspec import Struct, field

from persist_cache.server.validation import RefusedError


class Response(Struct, frozen=True):
    """What to send back; there are never CORS headers.

    Attributes:
        status: Of HTTP.
        body: All of it, unless there are `pieces`.
        content_type: Of the body.
        headers: Further ones.
        pieces: The body piece by piece, `num_bytes` in all; to be closed by who sends them.
        num_bytes: Length of those.
    """

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: Generator[memoryview] | None = None
    num_bytes: int = 0

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return len(self.body) if self.pieces is None else self.num_bytes


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    # Not by msgspec alone: counters may be larger than the 64 bits it knows.
    body = json.dumps(msgspec.to_builtins(value), allow_nan=False)
    return Response(status, body.encode(), headers=headers or {})


def refusal_response(refusal: RefusedError) -> Response:
    """A refusal as the admin API tells it."""
    return json_response({"error": str(refusal)}, refusal.status, refusal.headers)
