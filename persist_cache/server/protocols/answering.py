"""What an answer of a protocol of ours is made of, whatever its protocol: usage, events, bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from persist_cache.server.protocols.output import Finish, Part
from persist_cache.server.validation import RefusedError

Event = tuple[str, dict[str, Any]]
"""The type of an event, and what else it has."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request and its answer; the first three are disjoint, and make up the prompt.

    Attributes:
        input: Of the prompt, neither read from the cache nor written to it.
        read: Of the prompt, that the cache had.
        written: Of the prompt, that were queued for the disk when the answer began.
        output: Of the answer.
        reasoning: Of the answer, that the model thought, marks included.
        kept_s: For how long the client asked to keep what is written.
    """

    input: int = 0
    read: int = 0
    written: int = 0
    output: int = 0
    reasoning: int = 0
    kept_s: int = 300


class Answer(Protocol):
    """One answer, while it is said; the whole of it is what its events add up to.

    Attributes:
        calls: How many tool calls it has so far.
    """

    calls: int

    def start(self, usage: Usage, /) -> list[Event]:
        """The first events."""

    def say(self, parts: Sequence[Part], /) -> list[Event]:
        """Events for the next parts."""

    def sign(self) -> list[Event]:
        """Signs of life for a client that waits, as far as they are due."""

    def end(self, finish: Finish, usage: Usage, /) -> list[Event]:
        """The last events."""

    def fail(self, refusal: RefusedError, /) -> list[Event]:
        """The last events of a stream that fails."""

    def whole(self, finish: Finish, usage: Usage, /) -> dict[str, Any]:
        """The whole answer, once its parts were said."""


def as_bytes(events: Sequence[Event]) -> bytes:
    """Events as a stream of server-sent events carries them."""
    return b"".join(
        f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()
        for name, data in events
    )
