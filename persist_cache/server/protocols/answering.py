"""What an answer of a protocol of ours is made of, whatever its protocol: usage, events, bytes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from persist_cache.server.protocols.output import Call, Finish, Part, Reasoning
from persist_cache.server.validation import RefusedError

Event = tuple[str, dict[str, Any]]
"""The type of an event, and what else it has."""
Diagnose = Callable[[], dict[str, Any] | None]
"""Says why the cache had no more of a prompt, in the protocol's words."""
Kind = Literal["", "text", "thinking"]
"""What of an answer is open; "" is nothing."""


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


class Answer(ABC):
    """One answer, while it is said; the whole of it is what its events add up to.

    White space in front of a tool call is left out: templates write their own there, and the next
    request would not begin with what was said.

    Thread safety: for one thread.

    Attributes:
        id: What the protocol calls it.
        diagnose: Says why the cache had no more; None if nobody asks.
        calls: How many tool calls it has so far.
    """

    def __init__(self, id: str) -> None:
        self.id = id
        self.diagnose: Diagnose | None = None
        self.calls = 0
        self._open: Kind = ""
        self._space = ""  # that may stand in front of a call

    @abstractmethod
    def start(self, usage: Usage) -> list[Event]:
        """The first events; what was used is said again, and for good, in the end."""

    @abstractmethod
    def sign(self) -> list[Event]:
        """Signs of life while there is nothing to say, as far as they are due."""

    @abstractmethod
    def end(self, finish: Finish, usage: Usage) -> list[Event]:
        """The last events."""

    @abstractmethod
    def fail(self, refusal: RefusedError) -> list[Event]:
        """The last events of a stream that fails."""

    @abstractmethod
    def whole(self, finish: Finish, usage: Usage) -> dict[str, Any]:
        """The whole answer, once its parts were said."""

    def say(self, parts: Sequence[Part]) -> list[Event]:
        """Events for the next parts."""
        events: list[Event] = []
        for part in parts:
            if isinstance(part, Call):
                self._space = ""
                self.calls += 1
                events += [*self._close(), *self._call(part)]
            elif isinstance(part, Reasoning):
                if self._open == "text":
                    events += self._flush()
                self._space = ""
                events += self._said(part.text, "thinking")
            else:
                events += self._speak(part.text)
        return events

    def _speak(self, text: str) -> list[Event]:
        events = self._close() if self._open == "thinking" else []
        whole = self._space + text
        said = whole.rstrip()
        self._space = whole[len(said) :]
        return events + (self._said(said, "text") if said else [])

    def _flush(self) -> list[Event]:
        """Say the white space that was held back."""
        space, self._space = self._space, ""
        return self._said(space, "text") if space else []

    def _said(self, text: str, kind: Kind) -> list[Event]:
        events: list[Event] = []
        if self._open != kind:
            events += self._close()
            events += self._begin(kind)
            self._open = kind
        return [*events, self._add(text)]

    @abstractmethod
    def _begin(self, kind: Kind) -> list[Event]:
        """Begin a text, or a thought."""

    @abstractmethod
    def _add(self, text: str) -> Event:
        """Go on with what is open."""

    @abstractmethod
    def _close(self) -> list[Event]:
        """End what is open, if anything is."""

    @abstractmethod
    def _call(self, call: Call) -> list[Event]:
        """Say a whole call; nothing is open."""


def as_bytes(events: Sequence[Event]) -> bytes:
    """Events as a stream of server-sent events carries them."""
    return b"".join(
        f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()
        for name, data in events
    )
