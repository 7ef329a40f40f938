"""The model that a server has loaded, as far as a prompt's tokens need it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from persist_cache.fingerprint.value import Fingerprint, salt_digest
from persist_cache.server.names import Names, names_of
from persist_cache.server.protocols.caching import salt_of
from persist_cache.server.rendering import Prompt, decode, read_request, render
from persist_cache.server.validation import RefusedError
from persist_cache.stability.names import DEFAULTS


class LoadedModel(Struct, frozen=True):
    """The model of the server at the time of a request."""

    generator: Any
    key: Any
    tokenizer: Any
    fingerprint: Fingerprint | None
    why: str

    def render(
        self, body: Mapping[str, Any], protocol: str = "", *, stabilize: frozenset[str] = DEFAULTS
    ) -> Prompt:
        """The prompt of a request as the server would read it.

        Args:
            body: Its body.
            protocol: Of the body; "" to tell it by its shape.
            stabilize: Names of the repairs that may be done.

        Raises:
            RefusedError: It cannot be rendered, or has images.
        """
        defaults = self.generator.cli_args.chat_template_args
        request = read_request(body, protocol, stabilize=stabilize)
        salted = getattr(self.generator, "moves", None)
        moves = None if salted is None else salted.of(salt_digest(salt_of(body)))
        return render(self.tokenizer, request, template_args=defaults, moves=moves)

    def identity_for(self, salt: str) -> Fingerprint | None:
        """Identity of the model for requests of a salt, of which this is the digest."""
        return None if self.fingerprint is None else self.fingerprint.salted(salt)

    def decode(self, tokens: list[int]) -> str:
        return decode(self.tokenizer, tokens)


class Models:
    """The model that the server has loaded, if that is the one that a request means."""

    def __init__(self, generator: Any) -> None:
        """Look at the `ResponseGenerator` of the server; None where no model can run."""
        self.generator = generator
        self._copies: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def loaded(self, body: Mapping[str, Any], *, any_name: bool = False) -> LoadedModel:
        """The model that a request would be answered by, if that is the one that is loaded.

        Args:
            body: Of the request.
            any_name: Whether the name of no model here stands for the server's own.

        Raises:
            RefusedError: None is loaded, or another one.
        """
        provider = getattr(self.generator, "model_provider", None)
        asleep = getattr(provider, "asleep", None)
        if asleep is not None:
            self.generator.wake(asleep.key[0])
        key = getattr(provider, "model_key", None)
        tokenizer = getattr(provider, "tokenizer", None)
        if provider is None or key is None or tokenizer is None:
            raise RefusedError(409, "No model is loaded yet; send a chat request first.")
        names: Names | None = vars(self.generator).get("names")
        names = names_of(provider) if names is None else names
        if any_name:
            name = body.get("model")
            body = {"model": name} if isinstance(name, str) and names.is_here(name) else {}
        wanted = names.of(body)
        if wanted.model != key[0]:
            raise RefusedError(409, f"Another model is loaded: {key[0]}.")
        if wanted != key:
            raise RefusedError(409, "The model is loaded with another adapter or draft model.")
        if (own := self._copies.get(tokenizer)) is None:
            # The generation thread uses the other one; not all tokenizers bear company.
            own = self._copies[tokenizer] = copy.deepcopy(tokenizer)
        identify = getattr(provider, "identifier", None)
        fingerprint = None if identify is None else identify(key)
        why = "" if fingerprint is not None or identify is None else str(identify.reason(key))
        return LoadedModel(self.generator, key, own, fingerprint, why)
