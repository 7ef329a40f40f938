"""Asking the remote for a request, on the thread that answers it, before the disk is read for it.

What the remote has is put into the store, and the usual look-up finds it there: so nothing of this
is on the generation thread, and an answer that is wrong cannot come of it.
"""

from __future__ import annotations

from typing import Any

from persist_cache.server.alone import tokens_looked_back_at
from persist_cache.server.segments import checkpoints
from persist_cache.server.ticket import Ticket
from persist_cache.server.upstream.requests import TicketedRequest
from persist_cache.server.upstream.unloading import Unloading
from persist_cache.sharing import Sharing


class Bringing(Unloading):
    """The part of the generator that has prompts brought from a remote."""

    sharing: Sharing | None = None
    """The remote of the store, if it has one."""

    def _asks_remote(self, ticket: Ticket) -> bool:
        """Whether a remote is asked for a request at present."""
        sharing = self.sharing
        if sharing is None or self._is_distributed or not ticket.privacy.may_publish:
            return False
        return sharing.is_asked

    def _waits_for_spare(self, ticket: Ticket) -> bool:
        # Computing what a remote has takes longer than its tokenizer does.
        return super()._waits_for_spare(ticket) or self._asks_remote(ticket)

    def bring_ahead(self, request: TicketedRequest, args: Any) -> None:
        """Have in the store what the remote has of a tokenized request, before it is queued.

        Raises:
            ConnectionError: The client is gone.
            RefusedError: The server is stopping.
        """
        ticket, sharing = request.ticket, self.sharing
        prompt, key = ticket.prompt, ticket.model_key
        if prompt is None or key is None or sharing is None or not self._asks_remote(ticket):
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
