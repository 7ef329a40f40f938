"""The model that a server has loaded, as far as a prompt's tokens need it."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from persist_cache.fingerprint import Fingerprint
from persist_cache.incoming import RefusedError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The model of the server at the time of a request."""

    generator: Any
    key: Any
    tokenizer: Any
    fingerprint: Fingerprint | None
    why: str

    def tokenize(self, body: Mapping[str, Any]) -> tuple[list[int], int]:
        """The prompt as the server would read it, and the length of its system part.

        Raises:
            RefusedError: It cannot be rendered, or has images.
        """
        messages = copy.deepcopy(body["messages"])
        for message in messages:
            content = message.get("content")
            if isinstance(content, list) and any(part["type"] != "text" for part in content):
                raise RefusedError(400, "Only prompts without images can be explained or warmed.")
        request = SimpleNamespace(
            request_type="chat",
            prompt="",
            messages=messages,
            tools=body.get("tools") or None,
            role_mapping=body.get("role_mapping"),
        )
        args = SimpleNamespace(chat_template_kwargs=body.get("chat_template_kwargs"))
        try:
            prompt, segments, kinds, _, _ = self.generator._tokenize(self.tokenizer, request, args)
        except Exception as error:  # templates are programs of their own
            log.debug("a prompt could not be rendered: %s", error)
            raise RefusedError(400, "The chat template refuses these messages.") from None
        return list(prompt), system_tokens(segments, kinds)

    def decode(self, tokens: list[int]) -> str:
        known = [token for token in tokens if 0 <= token < len(self.tokenizer)]
        return str(self.tokenizer.decode(known)) if known else ""


def system_tokens(segments: Sequence[Sequence[int]], kinds: Sequence[str]) -> int:
    """Length of the system part of a prompt that was cut into segments."""
    system = itertools.takewhile(lambda one: one[1] == "system", zip(segments, kinds, strict=True))
    return sum(len(segment) for segment, _ in system)
