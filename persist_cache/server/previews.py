"""What tells stored prompts apart: how their text begins, whose request used them, their turns.

Texts are decoded when they are asked for, by the tokenizer of the model that computed the prompt.
They are not kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec import Struct

from persist_cache.errors import PersistCacheError, StoreError
from persist_cache.queries.beginnings import Beginning, beginnings, titles
from persist_cache.queries.decoder import Decoder
from persist_cache.queries.details import tokens_of
from persist_cache.queries.models import Model
from persist_cache.server.model import Models
from persist_cache.server.recent.ring import Ring
from persist_cache.server.rendering import decode
from persist_cache.server.validation import RefusedError
from persist_cache.server.view import Views
from persist_cache.store.store import Store

MAX_IDS = 100
_DECODERS = 4

Decode = Callable[[Sequence[int]], str]


class PreviewJson(Struct, frozen=True, kw_only=True):
    """What tells an entry apart.

    Attributes:
        text: How its own part begins, on one line; "" where that has no text, null where it cannot
            be decoded or is not shown.
        turns: User turns up to its end, as far as they are stored as entries.
        client: `User-Agent` of the latest remembered request that it was part of, or "".
        request: Id of that request, or null.
    """

    text: str | None
    turns: int
    client: str
    request: str | None


class PreviewsJson(Struct, frozen=True, kw_only=True):
    """Previews of entries, by their ids, and why texts are missing, if any are."""

    previews: dict[str, PreviewJson]
    notes: list[str]


class Previews:
    """Makes previews. Thread safety: may be asked by many threads at once; `_lock` decodes."""

    def __init__(self, views: Views, models: Models, *, texts: bool) -> None:
        """Look at what these know.

        Args:
            views: The store.
            models: The server's.
            texts: Whether texts may be shown.
        """
        self._views = views
        self._models = models
        self._texts = texts
        self._lock = threading.Lock()
        self._decoders: OrderedDict[str, Decoder] = OrderedDict()

    def of(self, ids: Sequence[str]) -> PreviewsJson:
        """Previews of the entries with these full ids; those that are gone are left out."""
        store, view = self._views.store(), self._views.now()
        notes: dict[str, None] = {}
        found = {}
        users = self._users()
        begins = beginnings(store, ids)
        texts: Mapping[str, str | None] = {}
        if self._texts:
            texts = titles(store, begins, partial(self._text, notes=notes))
        for id, begin in begins.items():
            client, request = users(store, id, begin)
            found[id] = PreviewJson(
                text=texts.get(id), turns=view.turns.get(id, 0), client=client, request=request
            )
        return PreviewsJson(previews=found, notes=list(notes))

    # ---- texts ---------------------------------------------------------------------------------

    def _text(self, model: Model, tokens: Sequence[int], notes: dict[str, None]) -> str | None:
        with self._lock:
            try:
                return self._decoder(model)(tokens)
            except PersistCacheError as error:
                notes[str(error)] = None
                return None

    def _decoder(self, model: Model) -> Decode:
        """What decodes the tokens of a model.

        Raises:
            ModelError: Its tokenizer is not there.
            MissingDependencyError: A package is missing.
        """
        try:
            loaded = self._models.loaded({})
        except RefusedError:
            pass
        else:
            if loaded.fingerprint is not None and loaded.fingerprint.hex == model.fingerprint:
                return lambda tokens: decode(loaded.tokenizer, tokens, plain=True)
        known = self._decoders.get(model.fingerprint)
        if known is None:
            known = self._decoders[model.fingerprint] = Decoder(model)
            while len(self._decoders) > _DECODERS:
                self._decoders.popitem(last=False)
        return lambda tokens: known.text(tokens, plain=True)

    # ---- clients -------------------------------------------------------------------------------

    def _users(self) -> Callable[[Store, str, Beginning], tuple[str, str | None]]:
        """What finds the client and the id of the latest request that an entry was part of."""
        generator = self._models.generator
        ring: Ring | None = getattr(generator, "recent", None)
        if ring is None:
            return lambda store, id, begin: ("", None)
        identify: Any = getattr(generator.model_provider, "identifier", None)
        models: dict[Hashable, str] = {}

        def fingerprint(key: Hashable) -> str:
            if key not in models:
                found = None if identify is None or key is None else identify(key)
                models[key] = "" if found is None else found.hex
            return models[key]

        def user(store: Store, id: str, begin: Beginning) -> tuple[str, str | None]:
            try:
                tokens = tokens_of(store, id)
            except (KeyError, StoreError):
                return "", None  # it went meanwhile
            mine = begin.model.fingerprint
            record = ring.latest_with(tokens, begin.start, lambda key: fingerprint(key) == mine)
            return ("", None) if record is None else (record.about.client, record.about.id)

        return user
