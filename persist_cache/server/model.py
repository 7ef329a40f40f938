"""The model that a server has loaded, as far as a prompt's tokens need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from persist_cache.fingerprint.value import Fingerprint
from persist_cache.server.rendering import Prompt, decode, read_request, render


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The model of the server at the time of a request."""

    generator: Any
    key: Any
    tokenizer: Any
    fingerprint: Fingerprint | None
    why: str

    def render(self, body: Mapping[str, Any]) -> Prompt:
        """The prompt of a request as the server would read it.

        Raises:
            RefusedError: It cannot be rendered, or has images.
        """
        defaults = self.generator.cli_args.chat_template_args
        return render(self.tokenizer, read_request(body), template_args=defaults)

    def decode(self, tokens: list[int]) -> str:
        return decode(self.tokenizer, tokens)
