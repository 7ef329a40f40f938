"""Answers in the form of OpenAI's Responses: objects and events of a stream.

`ResponseAnswer` takes the parts of a model's output and says them as events; the whole response is
what the events add up to, so a client gets the same with and without a stream.
"""

from __future__ import annotations

import copy
import json
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct, field

from persist_cache.server.protocols.answering import Answer, Event, Kind, Usage
from persist_cache.server.protocols.output import Call, Finish
from persist_cache.server.protocols.responses_items import sealed
from persist_cache.server.protocols.responses_request import Manner
from persist_cache.server.protocols.responses_tools import free_text
from persist_cache.server.validation import RefusedError

SIGN_S = 15.0
"""How long there may be no event: clients count those, and take no comment for a sign of life."""


class _Piece(Struct, frozen=True):
    """A part of an item that is text, and the events that say it.

    Attributes:
        member: Of the item, that holds the part.
        place: Of an event, that holds the part's index.
        part: Begins the types of events about the whole part.
        text: Begins those about its text.
        kind: The type of the part itself.
        more: What else the part has.
        also: What else events about its text have.
    """

    member: str
    place: str
    part: str
    text: str
    kind: str
    more: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)


_TEXT = _Piece(
    "content",
    "content_index",
    "response.content_part",
    "response.output_text",
    "output_text",
    {"annotations": [], "logprobs": []},
    {"logprobs": []},
)
_THOUGHT = _Piece(
    "content",
    "content_index",
    "response.content_part",
    "response.reasoning_text",
    "reasoning_text",
)
_SUMMARY = _Piece(
    "summary",
    "summary_index",
    "response.reasoning_summary_part",
    "response.reasoning_summary_text",
    "summary_text",
)


class ResponseAnswer(Answer):
    """A response, while it is said."""

    def __init__(
        self,
        model: str,
        manner: Manner,
        *,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Begin an answer.

        Args:
            model: As the client named it.
            manner: How the client wants it.
            new_id: Makes ids for the response, its items and tool calls.
            clock: Tells the time that passes.
            now: Tells the time of the day, in seconds of UTC.
        """
        super().__init__(f"resp_{new_id()}")
        self._model = model
        self._manner = manner
        self._new_id = new_id
        self._clock = clock
        self._now = now
        self._created = int(now())
        self._items: list[dict[str, Any]] = []
        self._piece = _TEXT  # that is open, or was
        self._number = 0
        self._told = clock()

    def start(self, usage: Usage) -> list[Event]:
        return [self._of_all("created"), self._of_all("in_progress")]

    def sign(self) -> list[Event]:
        if self._clock() - self._told < SIGN_S:
            return []
        return [self._of_all("in_progress")]

    def end(self, finish: Finish, usage: Usage) -> list[Event]:
        status = _status(finish)
        events = self._flush() if self._open or not self._items else []
        events += self._close(status)
        return [*events, self._of_all(status, self._ended(status, usage))]

    def fail(self, refusal: RefusedError) -> list[Event]:
        code = refusal.code or ("invalid_prompt" if refusal.status < 500 else "server_error")
        error = {"code": code, "message": str(refusal)}
        return [self._of_all("failed", {"status": "failed", "error": error})]

    def whole(self, finish: Finish, usage: Usage) -> dict[str, Any]:
        self.end(finish, usage)
        return self._response(self._ended(_status(finish), usage))

    # ---- what is said ------------------------------------------------------------------------

    def _begin(self, kind: Kind) -> list[Event]:
        if kind == "text":
            self._piece = _TEXT
            item = {"id": f"msg_{self._new_id()}", "type": "message", "role": "assistant"}
            begun = self._added({**item, "content": []})
        else:
            self._piece = _SUMMARY if self._manner.as_summary else _THOUGHT
            item = {"id": f"rs_{self._new_id()}", "type": "reasoning"}
            begun = self._added({**item, "summary": [], "content": [], "encrypted_content": None})
        part = {"type": self._piece.kind, "text": "", **self._piece.more}
        self._items[-1][self._piece.member].append(part)
        return [begun, self._of_piece(f"{self._piece.part}.added", part=dict(part))]

    def _add(self, text: str) -> Event:
        self._part["text"] += text
        return self._of_piece(f"{self._piece.text}.delta", delta=text, **self._piece.also)

    def _close(self, status: str = "completed") -> list[Event]:
        was, self._open = self._open, ""
        if not was:
            return []
        part, piece = dict(self._part), self._piece
        if was == "thinking" and self._manner.seals:
            self._items[-1]["encrypted_content"] = sealed(part["text"])
        return [
            self._of_piece(f"{piece.text}.done", text=part["text"], **piece.also),
            self._of_piece(f"{piece.part}.done", part=part),
            self._done(status),
        ]

    def _call(self, call: Call) -> list[Event]:
        named = self._manner.tools.known(call.name)
        item = {
            "id": f"{'ctc' if named.is_custom else 'fc'}_{self._new_id()}",
            "type": "custom_tool_call" if named.is_custom else "function_call",
            "call_id": call.id or f"call_{self._new_id()}",
            "name": named.name,
            **({"namespace": named.namespace} if named.namespace else {}),
        }
        if named.is_custom:
            said, written = "input", free_text(call.arguments)
            of = "response.custom_tool_call_input"
        else:
            said, written = "arguments", json.dumps(call.arguments, ensure_ascii=False)
            of = "response.function_call_arguments"
        events = [self._added({**item, said: ""}), self._of_item(f"{of}.delta", delta=written)]
        self._items[-1][said] = written
        events.append(self._of_item(f"{of}.done", **{said: written}))
        return [*events, self._done("completed")]

    @property
    def _part(self) -> dict[str, Any]:
        """The part that is open, or was."""
        found: dict[str, Any] = self._items[-1][self._piece.member][-1]
        return found

    def _added(self, item: dict[str, Any]) -> Event:
        self._items.append({**item, "status": "in_progress"})
        return self._event("response.output_item.added", **self._last())

    def _done(self, status: str) -> Event:
        self._items[-1]["status"] = status
        return self._event("response.output_item.done", **self._last())

    def _last(self) -> dict[str, Any]:
        return {"output_index": len(self._items) - 1, "item": copy.deepcopy(self._items[-1])}

    # ---- events ------------------------------------------------------------------------------

    def _event(self, name: str, **more: Any) -> Event:
        self._told = self._clock()
        self._number += 1
        return name, {"sequence_number": self._number - 1, **more}

    def _of_item(self, name: str, **more: Any) -> Event:
        where = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return self._event(name, **where, **more)

    def _of_piece(self, name: str, **more: Any) -> Event:
        return self._of_item(name, **{self._piece.place: 0}, **more)

    def _of_all(self, status: str, more: Mapping[str, Any] | None = None) -> Event:
        return self._event(f"response.{status}", response=self._response(more or {}))

    def _response(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "max_output_tokens": None,
            "max_tool_calls": None,
            "metadata": {},
            "model": self._model,
            "output": copy.deepcopy(self._items),
            "parallel_tool_calls": True,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "previous_response_id": None,
            "prompt_cache_key": None,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": None,
            "service_tier": "default",
            "store": False,
            "temperature": None,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": 0,
            "top_p": None,
            "truncation": "disabled",
            "usage": None,
            "user": None,
            **self._manner.fields,
            **more,
        }

    def _ended(self, status: str, usage: Usage) -> dict[str, Any]:
        is_cut = status == "incomplete"
        diagnosed = {} if self.diagnose is None else {"prompt_cache_diagnostics": self.diagnose()}
        return {
            **diagnosed,
            "status": status,
            "completed_at": None if is_cut else int(self._now()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": usage_json(usage),
        }


def usage_json(usage: Usage) -> dict[str, Any]:
    """What was used, as the protocol says it."""
    prompt = usage.input + usage.read + usage.written
    return {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": usage.read,
            "cache_write_tokens": usage.written,
        },
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": prompt + usage.output,
    }


def _status(finish: Finish) -> str:
    return "incomplete" if finish.reason in ("length", "context") else "completed"
