"""OpenAI's Responses over HTTP: `/v1/responses`, without any state, and `…/input_tokens`."""

from __future__ import annotations

import functools
import json
from typing import Any

import msgspec

from persist_cache.server.protocols.recognized import RESPONSES
from persist_cache.server.protocols.responses_answer import ResponseAnswer
from persist_cache.server.protocols.responses_request import read_responses
from persist_cache.server.recent.diagnosis import comparison_response, of_openai
from persist_cache.server.translated import Translated
from persist_cache.server.validation import RefusedError, decode_object

RESPONSES_PATH = "/v1/responses"
COUNT_PATH = f"{RESPONSES_PATH}/input_tokens"
PATHS = (RESPONSES_PATH, COUNT_PATH)


class Responses(Translated):
    """To be mixed in before `Streaming` and `Front`."""

    def _checked_post(self) -> None:
        if self.path not in PATHS:
            super()._checked_post()  # type: ignore[misc]
            return
        self._answer_responses(self._read_body())  # type: ignore[attr-defined]

    def _post_own(self, body: dict[str, Any], protocol: str) -> None:
        if protocol != RESPONSES:
            super()._post_own(body, protocol)  # type: ignore[misc]
            return
        self.path = RESPONSES_PATH
        self._answer_responses(json.dumps(body).encode())

    def _answer_responses(self, raw: bytes) -> None:
        self.body_as_read = raw
        body = decode_object(raw)
        self.read_privacy(body)  # type: ignore[attr-defined]
        asked, manner = read_responses(body)
        named = comparison_response(body)
        if self.path == COUNT_PATH:
            self.count_asked(
                asked,
                lambda counted: {"object": "response.input_tokens", "input_tokens": counted},
            )
            return
        cli = self.response_generator.cli_args
        defaults = {"temperature": cli.temp, "top_p": cli.top_p}
        manner = msgspec.structs.replace(manner, fields={**defaults, **manner.fields})
        diagnose = None if named is None else functools.partial(of_openai, response_id=named)
        self.answer_asked(asked, ResponseAnswer(asked.model, manner), diagnose)

    def _no_such_method(self) -> RefusedError:
        if self.path in PATHS:
            return RefusedError(405, "This path knows no such method.", {"Allow": "POST"})
        if self.path.startswith(f"{RESPONSES_PATH}/"):
            return RefusedError(
                404,
                "There is no such path, and no response: this server keeps none; send the whole "
                f"conversation to {RESPONSES_PATH}.",
            )
        return super()._no_such_method()  # type: ignore[misc,no-any-return]

    def _refuse(self, refusal: RefusedError) -> None:
        path = getattr(self, "path", "").partition("?")[0]
        if path in PATHS and refusal.param == "messages":
            refusal.param = "input"  # what they are called here
        super()._refuse(refusal)  # type: ignore[misc]
