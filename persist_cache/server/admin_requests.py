"""The admin API's requests: the latest that the server answered, and why they hit or missed."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, UnsetType

from persist_cache.errors import StoreError
from persist_cache.server.answers import Response, json_response
from persist_cache.server.guard import Request
from persist_cache.server.parameters import number, query_of
from persist_cache.server.recent.as_json import WentOnJson, request_json
from persist_cache.server.recent.chunks import joined, tokens_in
from persist_cache.server.recent.records import Record
from persist_cache.server.recent.ring import MAX_REQUESTS, Ring
from persist_cache.server.validation import RefusedError
from persist_cache.server.view import Views

_LIMIT = 50
MAX_WAIT_S = 30
_FAR = 1 << 50


class Requests:
    """Answers about requests. Thread safety: may be asked by many threads at once."""

    def __init__(self, generator: Any, views: Views, *, texts: bool = True) -> None:
        """Look at what these know.

        Args:
            generator: The server's, which remembers them; None where nothing runs.
            views: The store that they went on from.
            texts: Whether texts may be shown.
        """
        self._generator = generator
        self._views = views
        self._texts = texts

    def list(self, request: Request) -> Response:
        """The latest, the newest first."""
        query = query_of(request, {"limit", "after", "before", "wait_s"})
        limit = number(query, "limit", _LIMIT, 1, MAX_REQUESTS)
        after = number(query, "after", 0, 0, _FAR)
        before = number(query, "before", _FAR, 0, _FAR)
        wait_s = number(query, "wait_s", 0, 0, MAX_WAIT_S)
        ring = self._ring()
        if wait_s:
            ring.wait(after, wait_s)
        else:
            ring.settle()
        return json_response(
            [request_json(one, texts=False) for one in ring.latest(limit, after, before)]
        )

    def show(self, id: str, request: Request) -> Response:
        """One of them, with the texts where prompts part, and what it went on from."""
        query_of(request, set())
        record = self._record(id)
        entry = self._went_on_from(record)
        return json_response(request_json(record, texts=self._texts, entry=entry))

    def replayed(self, id: str) -> tuple[str, bytes]:
        """The path and the body of one of them.

        Raises:
            RefusedError: It is not remembered, or its body is not.
        """
        record = self._record(id)
        if not record.body:
            raise RefusedError(409, f"The body of request {record.about.id} is not remembered.")
        return record.about.path, joined(record.body)

    def _record(self, id: str) -> Record:
        ring = self._ring()
        ring.settle(id)
        record = ring.record(id)
        if record is None:
            raise RefusedError(
                404, f"No request {id!r} is remembered: it is too long ago, or is not over yet."
            )
        return record

    def _went_on_from(self, record: Record) -> WentOnJson | UnsetType | None:
        """The longest entry, of those that are stored now, that its prompt went on from."""
        fetch, model = record.outcome.fetch, record.outcome.model
        identify = getattr(getattr(self._generator, "model_provider", None), "identifier", None)
        if fetch is None or not fetch.num_tokens or identify is None or model is None:
            return UNSET
        fingerprint = identify(model)
        if fingerprint is None:
            return UNSET
        try:
            store = self._views.store()
            match = store.match(fingerprint, tokens_in(record.tokens)[: fetch.num_tokens])
            entry = store.get(match.entries[-1]) if match.entries else None
        except (RefusedError, StoreError, KeyError):
            return None
        if entry is None:
            return None
        return WentOnJson(
            id=entry.id, tier=entry.tier.label, num_tokens=entry.num_tokens, label=entry.label
        )

    def _ring(self) -> Ring:
        found: Ring | None = getattr(self._generator, "recent", None)
        if found is None:
            raise RefusedError(409, "This server answers no requests.")
        return found
