"""Single flight: who computes which prompt right now, so that nobody computes it beside them.

Requests stand in a line, in the order in which they came. One whose prompt begins as that of an
earlier one does waits until that one has kept what they share, or will keep no more; then it looks
again. Nobody waits for one who came later: so there is no ring of waiters, and each waits for no
more than what was there when it came.

Whoever waits is not in upstream's queue yet. So that it loses nothing by that, later requests for
other models wait until it is: else its own model would have to be loaded again for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from persist_cache.server.segments import checkpoints
from persist_cache.server.ticket import Ticket
from persist_cache.server.underway import Underway
from persist_cache.tokens import common_prefix_tokens, pack_tokens

LEAST_SHARED_TOKENS = 256
"""What two prompts share beyond what is known is worth waiting for from this length on."""


@dataclass(eq=False, repr=False, slots=True)
class Flight:
    """A request in the line.

    Attributes:
        ticket: Of the request.
        model: What it is to be answered by, as upstream compares models.
        salt: Only prompts of the same salt share anything.
        leave_tokens: Tokens at the end of its prompt that have to be computed in any case.
        shares_nothing: Its prompt is like no other, as with images.
        is_queued: It is in upstream's queue, or was.
    """

    ticket: Ticket
    model: Hashable
    salt: bytes = b""
    leave_tokens: int = 1
    shares_nothing: bool = False
    is_queued: bool = False
    _packed: tuple[Sequence[int], bytes] = field(default=((), b""), init=False)

    @property
    def is_told(self) -> bool:
        """Whether it is known what it shares with others."""
        return self.shares_nothing or self.ticket.prompt is not None

    @property
    def limit(self) -> int:
        """Tokens of its prompt that need not be computed if all are known."""
        prompt = self.ticket.prompt
        return 0 if prompt is None else len(prompt.tokens) - self.leave_tokens

    @property
    def last_place(self) -> int:
        """How much of its prompt is kept when all of it is computed."""
        prompt = self.ticket.prompt
        if prompt is None:
            return 0
        places = checkpoints(prompt.segments, prompt.kinds, self.leave_tokens)
        return places[-1][0] if places else 0

    def shares(self, other: Flight, more_than: int) -> int:
        """Tokens that both prompts begin with; 0 if these cannot be more than so many.

        Most prompts part early, which is seen without a look at the rest of them.
        """
        mine, others = self.ticket.prompt, other.ticket.prompt
        if mine is None or others is None or mine.tokenizer is not others.tokenizer:
            return 0
        if other.shares_nothing or (self.model, self.salt) != (other.model, other.salt):
            return 0
        a, b = mine.tokens, others.tokens
        if min(len(a), len(b)) <= more_than or a[more_than] != b[more_than]:
            return 0
        if a[:LEAST_SHARED_TOKENS] != b[:LEAST_SHARED_TOKENS]:
            return 0
        return common_prefix_tokens(self.packed(a), other.packed(b))

    def packed(self, tokens: Sequence[int]) -> bytes:
        """The tokens of its prompt, which are packed once."""
        if self._packed[0] is not tokens:
            self._packed = (tokens, pack_tokens(tokens))
        return self._packed[1]


class Lead(Struct, frozen=True):
    """What a request waits for: that an earlier one keeps the beginning of its prompt.

    Attributes:
        underway: The prefill of the earlier one.
        num_tokens: What they share, and is kept.
        known_tokens: What is known already.
    """

    underway: Underway
    num_tokens: int
    known_tokens: int


class Line:
    """The requests that came and whose prompts are not computed yet, in this order.

    Thread safety: may be shared between threads. `_changed` guards the line, and is notified when
    a prompt becomes known, or a request is queued or leaves.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._flights: list[Flight] = []

    def enter(self, flight: Flight) -> None:
        """Have a request stand in the line, behind all who are there."""
        flight.ticket.tell_prompt = self._notify
        with self._changed:
            self.forget_ended()
            self._flights.append(flight)

    def forget_ended(self) -> None:
        """Let go of requests whose prompts are computed, and of the tokenizer that each has."""
        with self._changed:
            self._flights = [one for one in self._flights if not one.ticket.underway.has_ended]

    def queued(self, flight: Flight) -> None:
        """Note that a request is in upstream's queue: what follows may be put behind it."""
        flight.is_queued = True
        self._notify()

    def leave(self, flight: Flight) -> None:
        """Note that a request is over before it was queued: nobody need wait for it."""
        flight.ticket.underway.end()
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ---- waiting -------------------------------------------------------------------------------

    def wait_for_turn(self, mine: Flight, pause: Callable[[], None], pause_s: float) -> None:
        """Wait until the prompts of all earlier requests for the same model are known.

        And until all earlier ones for other models are queued.

        Args:
            mine: Who waits.
            pause: Called every now and then meanwhile; what it raises ends the waiting.
            pause_s: How often.
        """

        def is_turn() -> bool:
            return all(
                one.is_told if one.model == mine.model else one.is_queued
                for one in self._before(mine)
            )

        while True:
            with self._changed:
                if self._changed.wait_for(is_turn, pause_s):
                    return
            pause()

    def wait_for_shared(
        self,
        mine: Flight,
        known_tokens: Callable[[int], int],
        pause: Callable[[], None],
        pause_s: float,
    ) -> int | None:
        """Wait while an earlier request computes what this one lacks.

        Args:
            mine: Who waits.
            known_tokens: Looks how much of its prompt is known, where so many tokens were kept for
                it; called only where that matters.
            pause: As for `wait_for_turn`.
            pause_s: How often.

        Returns:
            What was known before; None if there was nothing to wait for.
        """
        known_before: int | None = None
        while (lead := self._lead(mine, known_tokens)) is not None:
            known_before = lead.known_tokens if known_before is None else known_before
            with lead.underway.followed(mine.ticket.times.arrived):
                lead.underway.keep_at(lead.num_tokens)
                while not lead.underway.wait_kept(lead.num_tokens, pause_s):
                    pause()
            is_kept = lead.underway.kept_tokens >= lead.num_tokens
            if is_kept and known_tokens(lead.num_tokens) < lead.num_tokens:
                break  # memory is too small, and the disk off: so would be the next one's
        return known_before

    def _lead(self, mine: Flight, known_tokens: Callable[[int], int]) -> Lead | None:
        """The earlier request that computes most of what a prompt lacks; the first of several."""
        best: Lead | None = None
        known, most = -1, LEAST_SHARED_TOKENS - 1
        for one in self._before(mine):
            if most >= mine.limit:
                break
            shared = min(mine.shares(one, most), mine.limit, one.last_place)
            if shared <= most:
                continue
            underway = one.ticket.underway
            if underway.wait_kept(shared, 0):
                continue  # nothing more is to come of it
            if known < 0:
                known = known_tokens(0)
            if shared - known >= LEAST_SHARED_TOKENS:
                best, most = Lead(underway, shared, known), shared
        return best

    def _before(self, mine: Flight) -> list[Flight]:
        """Who stands before a request, and is not over."""
        with self._changed:
            before = self._flights[: self._flights.index(mine)]
        return [one for one in before if not one.ticket.underway.has_ended]
