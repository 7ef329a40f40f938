"""Upstream's batch, as our generation loop uses it: what it computes of a prompt is not lost.

Upstream keeps a prompt at the ends of its segments alone. Here one that is being computed is kept
wherever somebody asks for it, and when it is cut.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from mlx_lm import server as upstream
from mlx_lm.generate import PromptProcessingBatch

from persist_cache import tensors
from persist_cache.prefill.clock import PrefillClock
from persist_cache.server.ticket import Ticket, ticket_of
from persist_cache.server.upstream.provider import state_layers


class Batch(upstream.BatchGenerator):  # type: ignore[misc]
    """Upstream's batch, timing prefill alone: not the queue, nor decoding for others.

    A sequence leaves it as views of the batch, of which `insert_cache` copies what is new.

    Thread safety: for the generation thread alone.
    """

    def __init__(self, prefill_clock: PrefillClock, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._prefill_clock = prefill_clock
        self._state_layers = state_layers(self.model)
        # Ranks have to compute the same pieces, and only one of them knows who asks for what.
        self._is_shared = tensors.group_size() > 1
        self._tickets: dict[int, Ticket] = {}
        self._cuts: dict[int, int] = {}
        """Where we cut a segment that upstream knows nothing of, by sequence."""
        # Upstream keeps these two as long as the batch, and moves sequences into and out of them.
        for batch in (self._prompt_batch, self._generation_batch):
            batch.extract_cache = functools.partial(_extract, batch)

    def next(self) -> Any:
        self._meet()
        given_up = self._give_up()
        self._cut()
        with self.stats() as spent:
            prompts, tokens = super().next()
        computed = sum(not one.end_of_prompt for one in prompts)
        if computed:
            self._prefill_clock.add(spent.prompt_time, computed)
        self._after(prompts)
        return [*prompts, *given_up], tokens

    def remove(self, uids: Sequence[int], return_prompt_caches: bool = False) -> Any:
        """As upstream's; prompts that were still computed are kept as far as they got."""
        for uid in uids:
            self._keep(uid)
        removed = super().remove(uids, return_prompt_caches)
        for uid in uids:
            self._end(uid)
        return removed

    # ---- where prompts are kept ----------------------------------------------------------------

    def _meet(self) -> None:
        """Take note of the prompts that were added."""
        for sequence in self._unprocessed_sequences:
            uid, tokens = sequence[0], sequence[4]
            ticket = ticket_of(tokens)
            if ticket is not None and uid not in self._tickets:
                self._tickets[uid] = ticket
                ticket.underway.begin(
                    len(tokens),
                    anywhere=not self._state_layers,
                    keep=functools.partial(self._keep, uid),
                )

    def _cut(self) -> None:
        """Let the next chunk of a prompt end where it is to be kept, if it must be just there."""
        if not self._state_layers or self._is_shared:
            return
        batch = self._prompt_batch
        running = zip(batch.uids, self._currently_processing, batch.tokens, strict=True)
        coming = [(one[0], one[1], one[4]) for one in self._unprocessed_sequences]
        for uid, segments, tokens in [
            *((uid, one[0], seen) for uid, one, seen in running),
            *coming,
        ]:
            ticket = self._tickets.get(uid)
            if ticket is None:
                continue
            start = len(tokens)
            end = start + min(len(segments[0]), self.prefill_step_size)
            place = ticket.underway.next_place(start, end)
            if place < end:
                segments[:1] = [segments[0][: place - start], segments[0][place - start :]]
                self._cuts[uid] = place

    def _give_up(self) -> list[Any]:
        """Cut the prompts that nobody waits for; returns what upstream's loop is to hear of that.

        It would go on for up to half a second, and as long as it decodes for as many as it takes,
        it would hear nothing of them.
        """
        responses = []
        for uid, ticket in list(self._tickets.items()):
            if ticket.is_given_up():
                ticket.stop()
                if not self._is_shared:
                    self.remove([uid])
                progress = ticket.computed
                responses.append(PromptProcessingBatch.Response(uid, progress, False, False))
        return responses

    def _after(self, responses: list[Any]) -> None:
        """Keep what is due after a chunk."""
        told = {one.uid: one for one in responses}
        for one in responses:
            if one.end_of_prompt:
                self._end(one.uid)
        for uid, tokens in zip(self._prompt_batch.uids, self._prompt_batch.tokens, strict=True):
            if uid in told and uid in self._tickets:
                self._after_chunk(uid, len(tokens), told[uid])

    def _after_chunk(self, uid: int, position: int, response: Any) -> None:
        underway = self._tickets[uid].underway
        if self._cuts.pop(uid, None) == position:
            response.end_of_segment = False  # upstream has no name for the piece that ends here
        if response.end_of_segment:
            return  # it is kept by upstream's loop
        is_due = underway.reached(position)
        if self._is_shared:
            return
        if is_due:
            self._keep(uid, partial=not self._state_layers)
        elif underway.claims_saving(position, *self._nbytes_of_each()):
            self._keep(uid)

    def _nbytes_of_each(self) -> tuple[int, int]:
        """Bytes of a prompt that is being computed, about, and those of its states."""
        nbytes = [layer.nbytes for layer in self._prompt_batch.prompt_cache]
        states = sum(nbytes[index] for index in self._state_layers)
        return sum(nbytes) // len(self._prompt_batch), states // len(self._prompt_batch)

    def _keep(self, uid: int, *, partial: bool = True) -> None:
        """Keep what is computed of a prompt, unless it is kept already.

        Args:
            uid: The sequence.
            partial: It may go when the prompt is complete.
        """
        ticket = self._tickets.get(uid)
        if ticket is None or ticket.privacy.no_store or uid not in self._prompt_batch.uids:
            return
        index = self._prompt_batch.uids.index(uid)
        tokens = self._prompt_batch.tokens[index]
        if ticket.underway.is_new(len(tokens)):
            ticket.keep(tokens[:], self._prompt_batch.extract_cache(index), partial)

    def _end(self, uid: int) -> None:
        """Note that nothing more is computed of a prompt."""
        self._cuts.pop(uid, None)
        ticket = self._tickets.pop(uid, None)
        if ticket is not None:
            ticket.prefilled()


def _extract(batch: Any, index: int) -> list[Any]:
    return tensors.extract(batch.prompt_cache, index)
