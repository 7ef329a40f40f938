"""Answers in the form of Anthropic's Messages: objects, events of a stream, and errors.

`MessageAnswer` takes the parts of a model's output and says them as events; the whole message is
what the events add up to, so a client gets the same with and without a stream.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from persist_cache.server.lengths import TooLongError
from persist_cache.server.protocols.answering import Answer, Event, Kind, Usage
from persist_cache.server.protocols.output import Call, Finish
from persist_cache.server.validation import RefusedError

SIGNATURE = "unsigned"
"""Stands where Anthropic signs what its models thought; here nothing is to be proved."""
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class MessageAnswer(Answer):
    """A message, while it is said."""

    def __init__(
        self,
        model: str,
        *,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        """Begin an answer.

        Args:
            model: As the client named it.
            new_id: Makes ids for the message and for tool calls.
        """
        super().__init__(f"msg_{new_id()}")
        self._model = model
        self._new_id = new_id
        self._blocks: list[dict[str, Any]] = []

    def start(self, usage: Usage) -> list[Event]:
        return [("message_start", {"message": self._message([], None, None, usage)})]

    def end(self, finish: Finish, usage: Usage) -> list[Event]:
        reason, word = self._reason(finish)
        events = self._flush() if self._open or not self._blocks else []
        events += self._close()
        delta = {"stop_reason": reason, "stop_sequence": word, "stop_details": None}
        events.append(("message_delta", {"delta": delta, "usage": usage_json(usage)}))
        events.append(("message_stop", {}))
        return events

    def sign(self) -> list[Event]:
        return [("ping", {})]

    def fail(self, refusal: RefusedError) -> list[Event]:
        return [("error", {"error": error_object(refusal)["error"]})]

    def whole(self, finish: Finish, usage: Usage) -> dict[str, Any]:
        self.end(finish, usage)
        return self._message(self._blocks, *self._reason(finish), usage)

    def _message(
        self,
        content: Sequence[Mapping[str, Any]],
        reason: str | None,
        word: str | None,
        usage: Usage,
    ) -> dict[str, Any]:
        diagnosed = {} if self.diagnose is None else {"diagnostics": self.diagnose()}
        return {
            "id": self.id,
            **diagnosed,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": list(content),
            "stop_reason": reason,
            "stop_sequence": word,
            "stop_details": None,
            "usage": usage_json(usage),
        }

    def _reason(self, finish: Finish) -> tuple[str, str | None]:
        if finish.reason == "stop_word":
            return "stop_sequence", finish.stop_word
        if finish.reason == "length":
            return "max_tokens", None
        if finish.reason == "context":
            return "model_context_window_exceeded", None
        return "tool_use" if self.calls else "end_turn", None

    def _begin(self, kind: Kind) -> list[Event]:
        block = {"type": kind, kind: ""}
        return [self._started(block | ({"signature": ""} if kind == "thinking" else {}))]

    def _add(self, text: str) -> Event:
        self._blocks[-1][self._open] += text
        return self._delta({"type": f"{self._open}_delta", self._open: text})

    def _call(self, call: Call) -> list[Event]:
        block = {
            "type": "tool_use",
            "id": call.id or f"toolu_{self._new_id()}",
            "name": call.name,
            "input": {},
        }
        written = json.dumps(call.arguments, ensure_ascii=False)
        said = [
            self._started(block),
            self._delta({"type": "input_json_delta", "partial_json": written}),
        ]
        block["input"] = call.arguments
        return [*said, self._stopped()]

    def _close(self) -> list[Event]:
        was, self._open = self._open, ""
        if not was:
            return []
        events: list[Event] = []
        if was == "thinking":
            self._blocks[-1]["signature"] = SIGNATURE
            events.append(self._delta({"type": "signature_delta", "signature": SIGNATURE}))
        return [*events, self._stopped()]

    def _started(self, block: dict[str, Any]) -> Event:
        self._blocks.append(block)
        started = {"index": len(self._blocks) - 1, "content_block": dict(block)}
        return "content_block_start", started

    def _delta(self, delta: dict[str, Any]) -> Event:
        return "content_block_delta", {"index": len(self._blocks) - 1, "delta": delta}

    def _stopped(self) -> Event:
        return "content_block_stop", {"index": len(self._blocks) - 1}


def usage_json(usage: Usage) -> dict[str, Any]:
    """What was used, as the protocol says it."""
    return {
        "input_tokens": usage.input,
        "cache_creation_input_tokens": usage.written,
        "cache_read_input_tokens": usage.read,
        "cache_creation": {
            "ephemeral_5m_input_tokens": usage.written if usage.kept_s < 3600 else 0,
            "ephemeral_1h_input_tokens": usage.written if usage.kept_s >= 3600 else 0,
        },
        "output_tokens": usage.output,
    }


def error_object(refusal: RefusedError) -> dict[str, Any]:
    """A refusal as the body of an answer."""
    fallback = "invalid_request_error" if refusal.status < 500 else "api_error"
    kind, message = _TYPES.get(refusal.status, fallback), str(refusal)
    if isinstance(refusal, TooLongError):
        # Clients look for these words, and compact the conversation.
        message = f"prompt is too long: {refusal.num_tokens} tokens > {refusal.context} maximum"
    return {"type": "error", "error": {"type": kind, "message": message}}
