"""What a model said, read once for all protocols: text, reasoning, tool calls, and why it ended.

`mlx_lm.server` decodes tokens into pieces of text, and a state machine of mlx-lm finds the marks of
reasoning and tool calls in them. The reader makes parts of that, the same ones however the text
was cut into pieces. Nothing is lost on the way: a call that cannot be parsed comes back as it was
written, and so does what only looked like the beginning of a mark.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from msgspec import Struct

log = logging.getLogger(__name__)

Segments = list[tuple[str | None, str]]
"""The states that a text passed through, and what each got of it."""
ToolParser = Callable[[str, Any], Any]


class Machine(Protocol):
    """The part of mlx-lm's `TextStateMachine` that is needed here."""

    def make_state(self, initial: str) -> Any: ...

    def split(self, state: Any, text: str) -> tuple[Any, Segments]: ...

    def flush(self, state: Any) -> tuple[Any, str, str | None]: ...


class Text(Struct, frozen=True):
    """Some text for the user."""

    text: str


class Reasoning(Struct, frozen=True):
    """Some of what the model thought."""

    text: str


class Call(Struct, frozen=True):
    """A whole tool call.

    Attributes:
        name: Of the tool.
        arguments: As an object.
        id: The model's own id for it, or "".
    """

    name: str
    arguments: dict[str, Any]
    id: str = ""


class BrokenCall(Struct, frozen=True):
    """A tool call that cannot be parsed, with its marks, as the model wrote it."""

    text: str


Part = Text | Reasoning | Call | BrokenCall


class Finish(Struct, frozen=True):
    """Why an output ended.

    Attributes:
        reason: `end` when the model ended it, `length` when it was cut off, `context` when that was
            at the end of the model's context.
        stop_word: Which of the stop words it met, for `stop_word`.
    """

    reason: Literal["end", "length", "context", "stop_word"]
    stop_word: str = ""


class OutputReader:
    """Reads one output.

    Thread safety: for one thread.

    Attributes:
        finish: Why the output ended; None before. A stop word ends it wherever the word occurs and
            however it was tokenized, so this may be known before mlx-lm stops decoding.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        initial: str = "normal",
        parse: ToolParser | None = None,
        tools: Any = None,
        stop_words: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Begin to read.

        Args:
            machine: Finds the marks of this model's output.
            initial: State in which the output begins.
            parse: Makes a call, or several, of the text between the marks; None when there can be
                no calls, so that what looks like one comes back as it was written.
            tools: Definitions, for `parse`.
            stop_words: The tokens of each, by which mlx-lm recognizes them.
        """
        self._machine = machine
        self._state = machine.make_state(initial)
        self._name: str | None = initial
        self._parse = parse
        self._tools = tools
        self._stop_words = {word: tuple(tokens) for word, tokens in (stop_words or {}).items()}
        self._tokens: list[int] = []
        self._held = ""  # may be the beginning of a stop word
        self._pending = ""  # what the machine was given and did not hand out
        self._mark = ""  # that the call began with
        self._call = ""
        self.finish: Finish | None = None

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is a thought, as far as is certain."""
        return self._name == "reasoning"

    def feed(
        self, text: str, token: int | None = None, finish_reason: str | None = None
    ) -> list[Part]:
        """Read what mlx-lm decoded.

        Args:
            text: The next piece.
            token: That it ends with. Its text may be missing when it completes a stop word.
            finish_reason: `stop` or `length` with the last piece.

        Returns:
            What is certain by now, in order; nothing once the output ended.
        """
        if self.finish is not None:
            return []
        if token is not None and self._stop_words:
            longest = max(map(len, self._stop_words.values()))
            self._tokens = [*self._tokens, token][-max(longest, 1) :]
        whole = self._held + text
        met = _first(self._stop_words, whole) if self._stop_words else None
        if met is not None:
            start, word = met
            return self._end(whole[:start], Finish("stop_word", word))
        if finish_reason is None:
            held = _beginning(self._stop_words, whole)
            self._held = whole[len(whole) - held :]
            return joined(self._read(whole[: len(whole) - held]))
        if finish_reason == "length":
            return self._end(whole, Finish("length"))
        word = self._completed()
        if not word:
            return self._end(whole, Finish("end"))
        return self._end(whole[: len(whole) - _beginning([word], whole)], Finish("stop_word", word))

    def close(self) -> list[Part]:
        """End an output whose last piece had no reason to be the last one."""
        return [] if self.finish is not None else self._end(self._held, Finish("end"))

    def _end(self, text: str, finish: Finish) -> list[Part]:
        parts = self._read(text)
        self.finish = finish
        self._state, left, _ = self._machine.flush(self._state)
        if self._name == "tool":
            self._call += left
            if written := self._mark + self._call:
                parts += self._called(self._call, written)
        elif self._name is not None:
            parts += self._said(left)
        self._held = self._pending = self._call = ""
        return joined(parts)

    def _read(self, text: str) -> list[Part]:
        parts: list[Part] = []
        if self._name is None or not text:
            return parts
        state, segments = self._machine.split(self._state, text)
        if len(segments) == 1:
            return self._advanced(state, text, segments)
        # From the same state again (states are values), one character after the other: then there
        # is one mark at a time, and its text is known.
        for character in text:
            if self._name is not None:
                state, segments = self._machine.split(self._state, character)
                parts += self._advanced(state, character, segments)
        return parts

    def _advanced(self, state: Any, text: str, segments: Segments) -> list[Part]:
        """Parts of what the machine made of a text, which holds one mark at most."""
        self._state = state
        self._pending += text
        said = segments[0][1]
        self._pending, parts = self._pending[len(said) :], self._said(said)
        if len(segments) > 1:
            mark, self._pending = self._pending, ""
            parts += self._passed(mark, segments[-1][0])
        return parts

    def _said(self, text: str) -> list[Part]:
        if self._name == "tool":
            self._call += text
            return []
        if not text:
            return []
        return [Reasoning(text) if self._name == "reasoning" else Text(text)]

    def _passed(self, mark: str, state: str | None) -> list[Part]:
        """Go on in another state, or in the same one, behind a mark."""
        before, self._name = self._name, state
        if state == "tool" and before != "tool":
            self._mark, self._call = mark, ""
        if before == "tool" and state != "tool":
            call, self._call = self._call, ""
            return self._called(call, self._mark + call + mark)
        return []

    def _called(self, call: str, written: str) -> list[Part]:
        try:
            return [*_calls(self._parse(call, self._tools))] if self._parse else [Text(written)]
        except Exception as error:  # parsers are written for what models should say
            # What it was may be private.
            log.warning("a tool call could not be parsed: %s", type(error).__name__)
            return [BrokenCall(written)]

    def _completed(self) -> str:
        """The longest stop word that the last tokens are, or ""."""
        found = [
            word
            for word, tokens in self._stop_words.items()
            if tokens and tuple(self._tokens[-len(tokens) :]) == tokens
        ]
        return max(found, key=len, default="")


def _first(words: Mapping[str, Any], text: str) -> tuple[int, str] | None:
    """The stop word that is complete first, the longest of several, and where it starts."""
    found = [(start, word) for word in words if (start := text.find(word)) >= 0]
    return min(found, key=lambda one: (one[0] + len(one[1]), one[0]), default=None)


def _beginning(words: Mapping[str, Any] | Sequence[str], text: str) -> int:
    """How much of the end of a text may be the beginning of a stop word."""
    longest = max(map(len, words), default=1)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(word.startswith(text[-length:]) for word in words):
            return length
    return 0


def _calls(parsed: Any) -> list[Call]:
    """Calls of what a parser returned.

    Raises:
        ValueError: It is no call.
    """
    found = [_call(one) for one in (parsed if isinstance(parsed, list) else [parsed])]
    if not found:
        raise ValueError("There is none.")
    return found


def _call(parsed: Any) -> Call:
    name = parsed.get("name") if isinstance(parsed, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError("It names no tool.")
    arguments = parsed.get("arguments")
    if isinstance(arguments, str) and arguments:
        arguments = json.loads(arguments)
    if not arguments and not isinstance(arguments, (int, float)):
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError("Its arguments are no object.")
    # What is no JSON must not come to light in the middle of an answer.
    json.dumps(arguments, allow_nan=False)
    given = parsed.get("id")
    return Call(name, arguments, given if isinstance(given, str) else "")


def joined(parts: Iterable[Part]) -> list[Part]:
    """Parts with neighbours of one kind as one."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, Text) and isinstance(last, Text):
            found[-1] = Text(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + part.text)
        else:
            found.append(part)
    return found
