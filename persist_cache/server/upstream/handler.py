"""Upstream's HTTP handler, behind our front and with our protocols."""

from __future__ import annotations

from typing import Any

from mlx_lm import server as upstream

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.server.answers import json_response
from persist_cache.server.diagnosing import Diagnosing
from persist_cache.server.form import Given
from persist_cache.server.http import Front
from persist_cache.server.messages import Messages
from persist_cache.server.responses import Responses
from persist_cache.server.streaming import Streaming
from persist_cache.server.ticket import Ticket
from persist_cache.server.translated import usage_of
from persist_cache.server.upstream.requests import TicketedRequest


class Handler(Messages, Responses, Diagnosing, Streaming, Front, upstream.APIHandler):  # type: ignore[misc]
    """Upstream's HTTP handler behind our front, saying where the prompt's cache came from."""

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        generator, wishes = self.response_generator, None
        if self.caching is not None and not generator.model_provider.is_distributed:
            defaults = generator.cli_args.chat_template_args
            is_remembered = not self.privacy.no_store
            wishes = Given(self.caching, generator.templates, defaults, is_remembered=is_remembered)
        ticket = Ticket(self.body_as_read, keeps=self.keeps, wishes=wishes, privacy=self.privacy)
        self.begin(ticket, self.request_id)
        try:
            self.until_answered.enter_context(self.response_generator.in_flight())
            super().handle_completion(TicketedRequest.of(request, self.ticket), stop_words)
        except ConnectionError:
            raise
        except Exception as error:
            if not self.has_begun():
                raise
            self.say_error(error)
        finally:
            self.conclude()

    def with_cache(self, said: Any) -> Any:
        """An answer of upstream's, with what the ticket knows of the cache."""
        if self.ticket is not None and isinstance(said.get("usage"), dict):
            usage = usage_of(self.ticket)
            said["usage"]["prompt_tokens_details"] = {
                "cached_tokens": usage.read,
                "cache_write_tokens": usage.written,
            }
        return said

    def handle_health_check(self) -> None:
        """Tell a sick disk from a sick model; only the latter makes the server unavailable."""
        healthy = self.response_generator.is_healthy
        said = health_said(self.response_generator.cache, healthy=healthy)
        said["weights"] = self.response_generator.weights
        warming = getattr(self.response_generator, "warming", None)
        if warming is not None and warming.told()["total"]:
            said["warming"] = warming.told()
        self._send(json_response(said, 200 if healthy else 503))


def health_said(cache: PromptCache, *, healthy: bool) -> dict[str, Any]:
    """What `/health` answers.

    Args:
        cache: The server's.
        healthy: The generation thread lives.
    """
    said = {
        "status": "ok" if healthy else "unavailable",
        "model": "ok" if healthy else "the generation thread died",
        "disk": f"off: {cache.disk_off}" if cache.disk_off else "ok",
    }
    if paused := cache.eviction_paused:
        said["eviction"] = f"paused: {paused}"
    return said
