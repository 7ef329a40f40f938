"""What computing prompts costs: seconds of prefill, measured for exactly the tokens computed.

An entry's cost is that of its whole prefix. It is added up along the way: what its beginning cost
when that was computed, and what its own tokens took. Nothing is multiplied by a length that was
not measured, because a short tail is dearer per token than the prompt before it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator

from msgspec import Struct

from persist_cache.entry import Tier
from persist_cache.tokens import TOKEN_BYTES, PrefixDigests

_REMEMBERED = 64
_MAX_EXTRAPOLATION = 4
"""Tokens that nobody timed are valued by those that were only up to so many times as many."""
_HALVED_AT_TOKENS = 1 << 20


class PrefillClock:
    """Seconds spent in prefill; it stands still while anything else is done.

    Of what several prompts are computed together for, each is charged an equal part.

    Thread safety: it runs on the thread that computes; any thread may read it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = 0.0

    def __call__(self) -> float:
        return self._seconds

    def add(self, seconds: float, prompts: int = 1) -> None:
        """Count `seconds` in which so many prompts were computed together."""
        self._seconds += seconds / prompts

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block, in which one prompt is computed."""
        started = self._clock()
        try:
            yield
        finally:
            self.add(self._clock() - started)


class Rate:
    """Seconds of prefill per token, from timed pieces; long pieces count for more than short.

    It is the least-squares slope through the origin. A mean over pieces would drift to the speed
    of short tails, most of whose time is the same for any length.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._tokens_seconds = 0.0
        self._tokens_squared = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Take a timed piece into account."""
        if num_tokens <= 0 or seconds <= 0:
            return
        self.num_tokens += num_tokens
        self._tokens_seconds += num_tokens * seconds
        self._tokens_squared += num_tokens * num_tokens
        if self.num_tokens > _HALVED_AT_TOKENS:
            # What was measured long ago counts for less, so that a faster machine is noticed.
            self.num_tokens //= 2
            self._tokens_seconds /= 2
            self._tokens_squared /= 2

    @property
    def token_s(self) -> float:
        """Seconds per token; 0 when nothing was timed."""
        return self._tokens_seconds / self._tokens_squared if self._tokens_squared else 0.0

    def value(self, num_tokens: int) -> float:
        """What computing so many tokens takes, or 0 when too few were timed to tell."""
        return self.token_s * num_tokens if self.covers(num_tokens) else 0.0

    def covers(self, num_tokens: int) -> bool:
        """Whether enough tokens were timed to value so many others."""
        return 0 < num_tokens <= _MAX_EXTRAPOLATION * self.num_tokens


def whole_s(
    known_tokens: int, known_s: float, computed_tokens: int, computed_s: float, rate: Rate
) -> float:
    """What computing a prefix takes whose beginning was found and whose rest was timed.

    Args:
        known_tokens: Tokens that were found.
        known_s: What computing those took, 0 when nobody measured.
        computed_tokens: Tokens that were computed.
        computed_s: What that took.
        rate: Values the beginning if nobody measured it.

    Returns:
        Seconds; 0 when the cost of the beginning cannot be told.
    """
    if computed_tokens <= 0 or known_tokens <= 0 or known_s > 0:
        return known_s + computed_s
    return rate.value(known_tokens) + computed_s if rate.covers(known_tokens) else 0.0


class Prefill(Struct):
    """A prompt that is being computed, and what that has cost so far.

    Attributes:
        model: mlx-lm's model key.
        num_tokens: Length of the prompt.
        digests: What is kept of the prompt itself.
        position: Tokens whose cost is known: found by the look-up, or inserted since.
        known_s: What computing those takes, 0 when nobody measured.
        at: When the tokens behind them began to be computed.
    """

    model: Hashable
    num_tokens: int
    digests: PrefixDigests
    position: int
    known_s: float
    at: float


class Prefills:
    """Measures the prefill between a look-up and the inserts that follow it.

    It keeps digests of prompts, not the prompts.

    Thread safety: may be shared between threads; `_lock` guards everything.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        """Remember no request yet.

        Args:
            clock: Seconds; `time.monotonic` by default. Whatever else is done while it goes on
                is counted as prefill, too.
        """
        self._clock = clock or (lambda: time.monotonic())
        self._lock = threading.Lock()
        self._requests: deque[Prefill] = deque(maxlen=_REMEMBERED)
        self._rates: dict[Hashable, Rate] = {}

    def begun(
        self,
        model: Hashable,
        packed: bytes,
        num_tokens: int,
        known_s: float,
        *,
        remember: bool = True,
    ) -> Prefill:
        """Note that the prefill of a prompt begins now.

        Args:
            model: mlx-lm's model key.
            packed: The prompt.
            num_tokens: Leading tokens of it that were found.
            known_s: What computing those takes, 0 when nobody measured.
            remember: For `ended` calls that do not name it.
        """
        length = len(packed) // TOKEN_BYTES
        digests = PrefixDigests.of(packed)
        request = Prefill(model, length, digests, num_tokens, known_s, 0.0)
        with self._lock:
            request.at = self._clock()
            if remember:
                self._requests.append(request)
        return request

    def ended(
        self, model: Hashable, packed: bytes, tier: Tier, prefill: Prefill | None = None
    ) -> float:
        """What computing a prefix took, which has been computed just now; 0 when unknown.

        Between the look-up of a request and the insert of its prompt lies its prefill. A reply's
        insert comes after decoding, so the reply is valued by the speed of prefills before it.

        Args:
            model: mlx-lm's model key.
            packed: The prefix.
            tier: Of what it ends with.
            prefill: What it was computed in; searched by its tokens when None.
        """
        now = self._clock()
        length = len(packed) // TOKEN_BYTES
        with self._lock:
            request = prefill or self._find(model, packed, length)
            if request is None:
                return 0.0
            rate = self._rates.setdefault(model, Rate())
            position, known_s = request.position, request.known_s
            computed = length - position
            if computed <= 0:
                return known_s * length / position if position else 0.0
            if tier == Tier.ASSISTANT:
                if position and not known_s:
                    return rate.value(length)
                return known_s + rate.value(computed)
            own_s = now - request.at
            rate.add(computed, own_s)
            request.known_s = whole_s(position, known_s, computed, own_s, rate)
            request.position, request.at = length, now
            return request.known_s

    def value(self, model: Hashable, num_tokens: int) -> float:
        """What computing so many tokens takes, or 0 when too few were timed to tell."""
        with self._lock:
            rate = self._rates.get(model)
            return 0.0 if rate is None else rate.value(num_tokens)

    def _find(self, model: Hashable, packed: bytes, length: int) -> Prefill | None:
        """The latest request that a prefix, or a prompt with its reply, is of.

        One that has not come as far goes first: alike prompts may be computed at once.
        """
        latest = None
        for request in reversed(self._requests):
            prompt = packed[: request.num_tokens * TOKEN_BYTES]
            if request.model == model and request.digests.begin_with(prompt):
                if request.position < length:
                    return request
                latest = latest or request
        return latest
