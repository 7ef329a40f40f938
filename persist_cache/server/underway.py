"""A prompt while it is computed: where it is to be kept, who waits for that, and when nobody does.

A client that gives up during a long prefill mostly asks again at once. So its prefill goes on for
a while, and longer if another request waits for it; then it is cut, and what was computed is kept.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator

PATIENCE_S = 10.0
"""How long a prefill goes on whose client is gone, and for which nobody else waits."""
SAVE_EVERY_S = 2.0
"""Of a prefill whose rows can be resumed anywhere, so that a kill loses no more than that, …"""
_SAVE_EVERY_SHARE = 1 / 8
"""… or this share of what was computed, if that is more: a long one leaves few files."""
LEAST_SAVED_BYTES = 320 << 10
"""Twenty times the header of a file: what is saved on the way costs no more than 5 %."""
STATES_EVERY_S = 10.0
"""At most so often the states of layers are saved on the way, which are as large each time, …"""
STATES_SHARE = 0.1
"""… and only while all of them together are less than this share of the rows computed."""


class Underway:
    """The prefill of one request, as other threads see it.

    Thread safety: any thread may call any method; `_changed` guards all of it. What is below
    "whoever computes" is the generation thread's.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing.

        Args:
            clock: Seconds by which patience is measured.
        """
        self._clock = clock
        self._changed = threading.Condition()
        self._wanted: set[int] = set()
        self._followers: list[float] = []
        self._found = 0
        self._kept = 0
        self._computed = 0
        self._anywhere = True
        self._left_at: float | None = None
        self._in_the_way_since = math.inf
        self._begun_at = self._save_at = self._kept_at = 0.0
        self._states_bytes = 0
        self._is_cut = False
        self._runs = False
        self._ended = False
        self._keep: Callable[[], None] = lambda: None

    # ---- for whoever waits ---------------------------------------------------------------------

    def keep_at(self, position: int) -> None:
        """Have what is computed kept when so many tokens of the prompt are, or soon after.

        A cache that can be cut anywhere is kept at the end of the next chunk at or behind the
        place, any other one exactly there, unless that was passed already.
        """
        with self._changed:
            if not self._has_kept(position):
                self._wanted.add(position)

    @property
    def kept_tokens(self) -> int:
        """Tokens of the prompt that the cache has been given so far."""
        with self._changed:
            return self._kept

    def wait_kept(self, position: int, timeout_s: float) -> bool:
        """Wait until so many tokens are computed and kept, or the prefill has ended at all.

        Then the cache has as much of the prompt as it will get. False when it is not known in time.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: self._ended or self._has_kept(position), timeout_s
            )

    def _has_kept(self, position: int) -> bool:
        """Whether the cache has so many tokens of the prompt, or will not be kept just there."""
        return self._kept >= position or (not self._anywhere and self._computed >= position)

    @contextlib.contextmanager
    def followed(self, came: float) -> Iterator[None]:
        """Have it go on in the block, though its own client may be gone.

        Unless it is in the way of a request that came earlier than its follower.

        Args:
            came: When the follower did, by `time.monotonic`.
        """
        with self._changed:
            self._followers.append(came)
        try:
            yield
        finally:
            with self._changed:
                self._followers.remove(came)

    @property
    def followers(self) -> int:
        """Requests that wait for it."""
        with self._changed:
            return len(self._followers)

    @property
    def is_running(self) -> bool:
        """Whether it is computed at present, or waits for its place in the batch."""
        with self._changed:
            return self._runs

    @property
    def is_nobodys(self) -> bool:
        """Whether it is computed though its client is gone and nobody follows it."""
        with self._changed:
            return self._runs and self._left_at is not None and not self._followers

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that are computed, or were found."""
        with self._changed:
            return self._computed

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is computed of the prompt."""
        with self._changed:
            return self._ended

    def leave(self) -> bool:
        """Note that its client is gone; whether it is computed at present, and so may go on."""
        with self._changed:
            if self._left_at is None:
                self._left_at = self._clock()
            return self._runs

    def hurry(self, came: float = -math.inf) -> None:
        """Have it end as soon as its client is gone: another request waits for its end.

        Those that waited before that one for what it computes keep it going.

        Args:
            came: When the request that waits did, by `time.monotonic`.
        """
        with self._changed:
            self._in_the_way_since = min(self._in_the_way_since, came)

    def cut(self) -> None:
        """Have it end, whoever waits: so does the server."""
        with self._changed:
            self._is_cut = True

    # ---- for whoever computes ------------------------------------------------------------------

    def begin(
        self, num_tokens: int, *, anywhere: bool = True, keep: Callable[[], None] = lambda: None
    ) -> None:
        """Note that the tokens behind so many are computed now.

        Args:
            num_tokens: What the cache had.
            anywhere: The cache can be cut anywhere.
            keep: Keeps what is computed, whenever it is called on the generation thread.
        """
        with self._changed:
            self._runs = not self._ended
            self._keep = keep
            self._anywhere = anywhere
            self._found = self._kept = self._computed = num_tokens
            self._begun_at = self._kept_at = self._clock()
            self._save_at = self._begun_at + SAVE_EVERY_S
            self._changed.notify_all()

    def next_place(self, position: int, end: int) -> int:
        """The first wanted place behind `position`, or `end` if that comes first."""
        with self._changed:
            return min([end, *(one for one in self._wanted if position < one < end)])

    def reached(self, position: int) -> bool:
        """Note that so many tokens are computed; whether they are to be kept now."""
        with self._changed:
            self._computed = position
            due = {one for one in self._wanted if one <= position}
            self._wanted -= due
            is_due = bool(due) if self._anywhere else position in due
            if not is_due:
                self._changed.notify_all()
            return is_due

    def kept(self, num_tokens: int) -> None:
        """Note that the cache was given so many tokens of the prompt."""
        with self._changed:
            now = self._clock()
            self._computed = max(self._computed, num_tokens)
            self._kept = max(self._kept, num_tokens)
            self._wanted = {one for one in self._wanted if one > num_tokens}
            self._kept_at = now
            self._save_at = now + max(SAVE_EVERY_S, _SAVE_EVERY_SHARE * (now - self._begun_at))
            self._changed.notify_all()

    def is_new(self, num_tokens: int) -> bool:
        """Whether keeping so many tokens would keep more than the cache has."""
        with self._changed:
            return num_tokens > self._kept

    def claims_saving(self, num_tokens: int, nbytes: int, state_nbytes: int = 0) -> bool:
        """Whether what is computed is to be saved now, in case that the process is killed.

        Args:
            num_tokens: So many are computed.
            nbytes: Of the cache, about.
            state_nbytes: Of these, those of layers that are saved as a state.
        """
        with self._changed:
            now = self._clock()
            row_bytes = (nbytes - state_nbytes) // max(1, num_tokens)
            if now < self._save_at or row_bytes * (num_tokens - self._kept) < LEAST_SAVED_BYTES:
                return False
            if state_nbytes:
                states, rows = (
                    self._states_bytes + state_nbytes,
                    row_bytes * (num_tokens - self._found),
                )
                if now - self._kept_at < STATES_EVERY_S or states > STATES_SHARE * rows:
                    return False
                self._states_bytes = states
            return True

    def is_given_up(self) -> bool:
        """Whether nobody waits for it any more, nor is likely to come back."""
        with self._changed:
            if not self._runs or self._is_cut:
                return self._runs
            is_kept_going = any(one < self._in_the_way_since for one in self._followers)
            if self._left_at is None or is_kept_going:
                return False
            patience_s = PATIENCE_S if self._in_the_way_since == math.inf else 0.0
            return self._clock() - self._left_at >= patience_s

    def keep_now(self) -> None:
        """Keep what is computed so far, because it ends here."""
        with self._changed:
            keep = self._keep if self._runs else None
        if keep is not None:
            keep()

    def end(self) -> bool:
        """Note that nothing more is computed of the prompt; whether its client is gone."""
        with self._changed:
            self._runs, self._ended = False, True
            self._keep = lambda: None
            self._changed.notify_all()
            return self._left_at is not None
