"""Why the cache had no more, in the answers of upstream's handler, if a request asks for it."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from typing import Any

from persist_cache.server.recent.diagnosis import comparison_response, of_openai
from persist_cache.server.recent.ring import Ring
from persist_cache.server.ticket import Ticket


class Diagnosing(BaseHTTPRequestHandler):
    """To be mixed in before `Streaming` and upstream's handler, whose `body` it reads."""

    body: dict[str, Any]
    recent: Ring
    ticket: Ticket | None

    def generate_response(
        self, text: str, finish_reason: str | None, *args: Any, **more: Any
    ) -> Any:
        """As upstream; an answer that ends says it, too."""
        said = super().generate_response(text, finish_reason, *args, **more)  # type: ignore[misc]
        return said if finish_reason is None else said | self._diagnosed()

    def completion_usage_response(self, *args: Any, **more: Any) -> Any:
        """As upstream."""
        return super().completion_usage_response(*args, **more) | self._diagnosed()  # type: ignore[misc]

    def _diagnosed(self) -> dict[str, Any]:
        named = comparison_response(self.body)
        if named is None or self.ticket is None:
            return {}
        return {"prompt_cache_diagnostics": of_openai(self.recent, self.ticket, named)}
