"""Asking the remote for a request, on the thread that answers it, before the disk is read for it.

What the remote has is put into the store, and the usual look-up finds it there: so nothing of this
is on the generation thread, and an answer that is wrong cannot come of it.
"""

from __future__ import annotations

from typing import Any

from persist_cache.server.alone import tokens_looked_back_at
from persist_cache.server.names import Key
from persist_cache.server.segments import checkpoints
from persist_cache.server.ticket import Ticket
from persist_cache.server.upstream.provider import Provider
from persist_cache.server.upstream.requests import TicketedRequest
from persist_cache.server.upstream.unloading import Unloading
from persist_cache.sharing import Sharing


class Bringing(Unloading):
    """The part of the generator that has prompts brought from a remote."""

    sharing: Sharing | None = None
    """The remote of the store, if it has one."""

    def _shares(self, ticket: Ticket) -> Sharing | None:
        """Where a request may be asked for; None for nowhere."""
        if self._is_distributed or not ticket.privacy.may_publish:
            return None
        return self.sharing

    def _waits_for_spare(self, ticket: Ticket) -> bool:
        # Computing what a remote has takes longer than copying a tokenizer.
        sharing = self._shares(ticket)
        is_asked = sharing is not None and sharing.is_asked
        return is_asked or super()._waits_for_spare(ticket)

    def tokenize_ahead(self, request: TicketedRequest, args: Any) -> None:
        """As upstream's model is; while a remote is asked, a model that is not loaded is, first.

        Else the first request of a server without one of its own would ask for nothing.
        """
        ticket, provider = request.ticket, self.model_provider
        sharing = self._shares(ticket)
        if sharing is not None and self._in_flight <= 1 and sharing.is_asked:
            wanted = args.model
            key = Key(wanted.model, wanted.adapter, wanted.draft)
            is_named = wanted.model != "default_model"
            if is_named and self.weights == "none" and isinstance(provider, Provider):
                self.load_before(key, ticket.waits)
        super().tokenize_ahead(request, args)

    def bring_ahead(self, request: TicketedRequest, args: Any) -> None:
        """Have in the store what the remote has of a tokenized request, before it is queued.

        Raises:
            ConnectionError: The client is gone.
            RefusedError: The server is stopping.
        """
        ticket = request.ticket
        prompt, key, sharing = ticket.prompt, ticket.model_key, self._shares(ticket)
        if prompt is None or key is None or sharing is None:
            return
        is_alone = not super()._is_batchable(args)
        leave = max(1, tokens_looked_back_at(args.logits) if is_alone else 0)

        def pause() -> None:
            self.check_available()
            ticket.waits()

        ticket.brought = sharing.bring(
            key,
            prompt.tokens,
            trail=ticket.trail,
            leave_tokens=leave,
            ends=[place for place, _ in checkpoints(prompt.segments, prompt.kinds, leave)],
            pause=pause,
        )
