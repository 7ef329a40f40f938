"""Anthropic's Messages over HTTP: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import functools
import json
from typing import Any

from persist_cache.server import answers
from persist_cache.server.protocols.anthropic_answer import MessageAnswer, error_object
from persist_cache.server.protocols.anthropic_request import read_messages
from persist_cache.server.protocols.recognized import MESSAGES
from persist_cache.server.recent.diagnosis import of_messages, previous_message
from persist_cache.server.stabilizing import chosen_by
from persist_cache.server.translated import Translated
from persist_cache.server.validation import RefusedError, decode_object

MESSAGES_PATH = "/v1/messages"
COUNT_PATH = f"{MESSAGES_PATH}/count_tokens"
PATHS = (MESSAGES_PATH, COUNT_PATH)


class Messages(Translated):
    """To be mixed in before `Streaming` and `Front`."""

    def _checked_post(self) -> None:
        if self.path not in PATHS:
            super()._checked_post()  # type: ignore[misc]
            return
        self._answer_messages(self._read_body())  # type: ignore[attr-defined]

    def _post_own(self, body: dict[str, Any], protocol: str) -> None:
        if protocol != MESSAGES:
            super()._post_own(body, protocol)  # type: ignore[misc]
            return
        self.path = MESSAGES_PATH
        self._answer_messages(json.dumps(body).encode())

    def _answer_messages(self, raw: bytes) -> None:
        self.body_as_read = raw
        counts = self.path == COUNT_PATH
        chosen = chosen_by(self.headers, self.response_generator)
        body = decode_object(raw)
        self.read_privacy(body)  # type: ignore[attr-defined]
        asked = read_messages(body, counting=counts, stabilize=chosen)
        is_asked, previous = previous_message(body)
        if counts:
            self.count_asked(asked, lambda counted: {"input_tokens": counted})
            return
        diagnose = functools.partial(of_messages, message_id=previous) if is_asked else None
        self.answer_asked(asked, MessageAnswer(asked.model), diagnose)

    def _no_such_method(self) -> RefusedError:
        if self.path not in PATHS:
            return super()._no_such_method()  # type: ignore[misc,no-any-return]
        return RefusedError(405, "This path knows no such method.", {"Allow": "POST"})

    def _refuse(self, refusal: RefusedError) -> None:
        path = getattr(self, "path", "").partition("?")[0]
        if path not in PATHS and not path.startswith(f"{MESSAGES_PATH}/"):
            super()._refuse(refusal)  # type: ignore[misc]
            return
        self._send(  # type: ignore[attr-defined]
            answers.json_response(error_object(refusal), refusal.status, refusal.headers)
        )
