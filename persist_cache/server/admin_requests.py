"""The admin API's requests: the latest that the server answered, and why they hit or missed."""

from __future__ import annotations

from typing import Any

from persist_cache.server.answers import Response, json_response
from persist_cache.server.guard import Request
from persist_cache.server.parameters import number, query_of
from persist_cache.server.recent.as_json import request_json
from persist_cache.server.recent.ring import MAX_REQUESTS, Ring
from persist_cache.server.validation import RefusedError

_LIMIT = 50
MAX_WAIT_S = 30
_FAR = 1 << 50


class Requests:
    """Answers about requests. Thread safety: may be asked by many threads at once."""

    def __init__(self, generator: Any) -> None:
        """Look at the `Generator` of the server, which remembers them; None where nothing runs."""
        self._generator = generator

    def list(self, request: Request) -> Response:
        """The latest, the newest first."""
        query = query_of(request, {"limit", "after", "wait_s"})
        limit = number(query, "limit", _LIMIT, 1, MAX_REQUESTS)
        after = number(query, "after", 0, 0, _FAR)
        wait_s = number(query, "wait_s", 0, 0, MAX_WAIT_S)
        ring = self._ring()
        if wait_s:
            ring.wait(after, wait_s)
        else:
            ring.settle()
        return json_response([request_json(one, texts=False) for one in ring.latest(limit, after)])

    def show(self, id: str, request: Request) -> Response:
        """One of them, with the texts where prompts part."""
        query_of(request, set())
        ring = self._ring()
        ring.settle(id)
        record = ring.record(id)
        if record is None:
            raise RefusedError(
                404, f"No request {id!r} is remembered: it is too long ago, or is not over yet."
            )
        return json_response(request_json(record, texts=True))

    def _ring(self) -> Ring:
        found: Ring | None = getattr(self._generator, "recent", None)
        if found is None:
            raise RefusedError(409, "This server answers no requests.")
        return found
