"""A ticket for each request of a server: the one thing that travels with it.

The thread that answers makes the ticket and has it tokenized; the generation thread takes the
prompt from it, notes the first look on it, and says by its ticket whose caches it inserts.
Header, usage and counters say what the ticket says, whatever the cache is asked for afterwards.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol, SupportsIndex, overload

from msgspec import Struct, field

from persist_cache.cache.ahead import Ahead
from persist_cache.cache.origin import Origin
from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.cache.stats import Fetch, FromRemote
from persist_cache.server.privacy import Privacy, scrub
from persist_cache.server.segments import system_tokens
from persist_cache.server.underway import Underway
from persist_cache.server.wishes import Form, Wishes
from persist_cache.stability.names import DEFAULTS
from persist_cache.store.trail import Trail

Part = Literal["", "prompt", "system"]
_SHARED = Privacy()


class CutPrompt(Struct, frozen=True):
    """A request as the model will see it.

    Attributes:
        tokenizer: The one of the model that it is for, by which another load is told apart.
        messages: As they were rendered; empty for a text completion.
        tokens: Token ids.
        segments: The pieces that the prompt is computed in.
        kinds: The kind of each: `system`, `user`, or `assistant` for an open thought.
        initial_state: What the reply begins with, by upstream's names.
        vision: Upstream's images, or None.
    """

    tokenizer: Any
    messages: Sequence[Mapping[str, Any]]
    tokens: Sequence[int]
    segments: Sequence[Sequence[int]]
    kinds: Sequence[str]
    initial_state: str
    vision: Any = None


class Times(Struct):
    """When what happened to a request, by `time.monotonic`; None for what has not yet.

    Attributes:
        arrived: It was read.
        tokenized: Its prompt was known.
        looked: The cache was asked for it.
        first_token: Its answer began.
        ended: Its answer was complete.
    """

    arrived: float = field(default_factory=time.monotonic)
    tokenized: float | None = None
    looked: float | None = None
    first_token: float | None = None
    ended: float | None = None


class Ticket:
    """One request, from its arrival to the end of its answer.

    Thread safety: each attribute is written by one thread; the generation thread calls `cut`,
    `looked`, `settle`, `hold_end` and `tell_end`; any thread may `wait`, and read `fetch` after
    that.

    Attributes:
        body: The request as it was read, b"" when it did not come over HTTP.
        form: How it is put before the template; None for upstream's own protocol.
        wishes: What its client asks of the cache; None when that is nothing.
        privacy: Whether it is kept, and with whose requests it may meet.
        keep_limit: How many of its first tokens it leaves in the cache at most; None for all of
            them, and the reply.
        keeps: What a request of our own leaves in the cache; "" for one of a client's, which is
            counted and leaves all of it.
        stabilize: Names of the repairs that may be done.
        changes: Names of those that changed it, but for what its form has done.
        prompt: As it is computed; None until it is tokenized.
        in_batch: It is computed in a batch, which copies the cache that it begins with.
        model: Upstream's name of the model that it is computed by; None while it waits.
        fetch: What the first look found; None before, and for a request that failed before.
        origin: The first look, for the inserts that follow.
        trail: The prompt's way through the store's index, for all looks of the request.
        model_key: mlx-lm's key of the model that it was tokenized for; None before that.
        brought: What a remote said of its prompt before that; None where it was not asked.
        ahead: What was read from the disk for it before it was queued.
        times: When what happened.
        tell_prompt: Called when the prompt is known.
        sign: Called while its answer is waited for, on the thread that answers. It raises a
            `ConnectionError` when the client is gone.
        output_tokens: Tokens of its answer so far.
        computed: Tokens that have been computed for it, and how many there are to compute.
        stop_tokens: The tokens of each stop word of a protocol of ours, by which upstream
            recognizes it.
        leave_tokens: Tokens at the end of the prompt that the loop has to compute itself, whatever
            is known: those that sampling looks back at.
        has_begun: Says whether the stream of its answer has begun, so that its status is told.
        has_left: Says whether the client is gone; any thread may ask.
        underway: Its prefill: where it is to be kept, and who waits for it.
        keep: Keeps the cache of its first tokens, which are given first; the last argument says
            whether it may go when a longer one comes. The generation thread's.
    """

    def __init__(
        self,
        body: bytes = b"",
        *,
        keeps: Part = "",
        form: Form | None = None,
        wishes: Wishes | None = None,
        privacy: Privacy = _SHARED,
    ) -> None:
        self.body = body
        self.form = form
        self.wishes = wishes or form
        self.privacy = privacy
        self.keep_limit: int | None = None
        self.keeps: Part = keeps
        self.stabilize: frozenset[str] = DEFAULTS
        self.changes: frozenset[str] = frozenset()
        self.prompt: CutPrompt | None = None
        self.in_batch = False
        self.model: Any = None
        self.fetch: Fetch | None = None
        self.origin = Origin(
            counts_written=self.wishes is not None,
            group="" if self.wishes is None else self.wishes.group,
            salt=privacy.salt,
            keeps_nothing=privacy.no_store,
        )
        self.trail = Trail()
        self.model_key: Hashable = None
        self.brought: FromRemote | None = None
        self.ahead: Ahead | None = None
        self.times = Times()
        self.output_tokens = 0
        self.computed = (0, 0)
        self.stop_tokens: Mapping[str, Sequence[int]] = {}
        self.leave_tokens = 0
        self.tell_prompt: Callable[[], None] = lambda: None
        self.sign: Callable[[], None] = lambda: None
        self.has_begun: Callable[[], bool] = lambda: False
        self.has_left: Callable[[], bool] = lambda: False
        self.underway = Underway()
        self.keep: Callable[[Sequence[int], Any, bool], None] = lambda tokens, cache, partial: None
        self._settled = threading.Event()
        self._dropped = False
        self._stop: Callable[[], None] = lambda: None
        self._tell_end: Callable[[], None] | None = None
        self._copies: list[weakref.ref[TicketTokens]] = []
        if privacy.no_store:
            self.underway.hurry()  # a retry would find nothing of it

    def __reduce__(self) -> tuple[Callable[[bytes], Ticket], tuple[bytes], dict[str, Any]]:
        # The ranks of a distributed group send each other their requests.
        make = functools.partial(Ticket, keeps=self.keeps, privacy=self.privacy)
        return make, (b"",), {"stabilize": self.stabilize}

    def copied(self, tokens: TicketTokens) -> None:
        """Note a list of its tokens, if they are to be forgotten."""
        if self.privacy.no_store:
            self._copies.append(weakref.ref(tokens))

    def forget(self) -> None:
        """Let go of everything that says what a private request was, wherever it still is.

        For the generation thread, once nothing of it is computed any more.
        """
        if not self.privacy.no_store:
            return
        if self.prompt is not None:
            scrub(self.prompt.tokens, self.prompt.segments, self.prompt.messages)
        for one in self._copies:
            if (tokens := one()) is not None:
                tokens.clear()
        self._copies.clear()
        self.body, self.prompt, self.form, self.wishes = b"", None, None, None
        self.ahead, self.origin.prefill = None, None
        self.stop_tokens = {}
        self.trail.forget()
        self.tell_prompt = self.sign = lambda: None
        self.has_left = self.has_begun = lambda: True
        self.keep = lambda tokens, cache, partial: None

    @property
    def repaired(self) -> tuple[str, ...]:
        """Names of the repairs that changed the request."""
        by_form = () if self.form is None else self.form.repaired
        return tuple(sorted({*self.changes, *by_form}))

    @property
    def keep_tokens(self) -> int | None:
        """How much of its prompt it leaves in the cache; None when all of it, and the reply."""
        if not self.keeps or self.prompt is None:
            return self.keep_limit
        if self.keeps == "system":
            return system_tokens(self.prompt.segments, self.prompt.kinds)
        return len(self.prompt.tokens) - 1

    @property
    def shares_nothing(self) -> bool:
        """Whether nobody is to wait for what it computes: it may keep little, or nothing."""
        explicit = self.wishes is not None and self.wishes.only_marked
        return bool(self.keeps) or explicit or self.privacy.no_store

    @property
    def written_tokens(self) -> int:
        """How many of the tokens that were not found are on their way to the disk.

        A prompt that follows a reply takes the rows of that along, which were found. They are
        counted where something that is kept was computed for them, or nowhere.
        """
        if self.prompt is None or self.fetch is None:
            return 0
        kept = len(self.prompt.tokens)
        if self.keep_tokens is not None:
            kept = min(kept, self.keep_tokens)
        return min(self.origin.written_tokens, max(0, kept - self.fetch.num_tokens))

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._dropped or self.has_left()

    def check(self) -> None:
        """See whether the client is still there, on the thread that answers.

        Raises:
            ConnectionAbortedError: It is gone.
        """
        if self.has_left():
            raise ConnectionAbortedError("The client is gone.")

    def waits(self) -> None:
        """Say that the answer is still waited for; raises a `ConnectionError` as `sign` does."""
        self.check()
        self.sign()

    def drop(self) -> None:
        """Note that nobody waits for the answer any more. A prefill may go on for a while."""
        self._dropped = True
        if not self.underway.leave():
            self._stop()

    def runs(self, stop: Callable[[], None]) -> None:
        """Note what ends its computation, now that it has begun."""
        self._stop = stop
        if self._dropped:
            stop()

    def is_given_up(self) -> bool:
        """Whether its prefill is to be cut: its client is gone, and nobody else waits for it."""
        if not self._dropped and self.has_left():
            self.drop()
        return self.underway.is_given_up()

    def is_begun_for(self, other: Ticket) -> bool:
        """Whether nobody waits for its prefill, and all of it is of another one's prompt, too."""
        if not self.underway.is_nobodys or self.prompt is None or other.prompt is None:
            return False
        if self.privacy.salt != other.privacy.salt:
            return False
        done = self.underway.computed_tokens
        return list(self.prompt.tokens[:done]) == list(other.prompt.tokens[:done])

    def stop(self) -> None:
        """End its computation."""
        self._stop()

    def prefilled(self) -> None:
        """Note that its prompt is computed, or will not be."""
        if self.underway.end():
            self._stop()

    def hold_end(self, tell: Callable[[], None]) -> None:
        """Have `tell` end its answer once the cache has been given what was computed for it.

        Whoever has read all of an answer finds what it left: in a flush, a list, an `explain`.
        """
        self._tell_end = tell

    def tell_end(self) -> None:
        """End its answer, if that waits for it."""
        tell, self._tell_end = self._tell_end, None
        if tell is not None:
            tell()

    def keep_at(self, position: int) -> None:
        """Have its prompt kept when so many tokens of it are computed; any thread may ask."""
        self.underway.keep_at(position)

    @property
    def kept_tokens(self) -> int:
        """Tokens of its prompt that the cache has been given so far."""
        return self.underway.kept_tokens

    def wait_kept(self, position: int, timeout_s: float) -> bool:
        """Wait until so many tokens are computed and kept, or no more will be."""
        return self.underway.wait_kept(position, timeout_s)

    def tokenized(self, prompt: CutPrompt) -> None:
        """Note the prompt."""
        self.prompt = prompt
        self.computed = (0, len(prompt.tokens))
        self.times.tokenized = time.monotonic()
        self.tell_prompt()

    def looked(self, fetch: Fetch) -> None:
        """Note what the cache had. Only the first look counts."""
        if self.fetch is None:
            self.fetch = fetch
            self.times.looked = time.monotonic()
        self._settled.set()

    def settle(self) -> None:
        """Let go of who waits: if there was no look yet, there will be none."""
        self._settled.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the first look; False when it is not known in time whether there is one."""
        return self._settled.wait(timeout_s)


class TicketTokens(list[int]):
    """Token ids that carry the ticket of their request through upstream's loop.

    It copies them by slices, extends them by what it computes, and gives them back with the cache
    that has seen them.
    """

    def __init__(self, tokens: Sequence[int], ticket: Ticket) -> None:
        super().__init__(tokens)
        self.ticket = ticket
        ticket.copied(self)

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> TicketTokens: ...

    def __getitem__(self, index: SupportsIndex | slice) -> int | TicketTokens:
        if isinstance(index, slice):
            return TicketTokens(super().__getitem__(index), self.ticket)
        return super().__getitem__(index)


class Desk(Protocol):
    """Who knows how requests are served: a server's generator."""

    def complete(
        self, model: Hashable, tokens: Sequence[int], cache: Any, rest: Any, /
    ) -> tuple[Any | None, Sequence[int]]:
        """Compute and keep what upstream's loop does not; returns the cache and what is left."""

    def even_out(self, cache: Any, /) -> None:
        """Bring a cache that upstream's loop has left into the form that others have."""


class TicketedCache:
    """A `PromptCache` as mlx-lm's generation loop uses it, which tells tickets what it finds.

    Thread safety: for the generation thread alone.
    """

    def __init__(self, cache: PromptCache, desk: Desk) -> None:
        self._cache = cache
        self._desk = desk

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    def stats_by_type(self) -> Mapping[str, Mapping[str, int]]:
        return self._cache.stats_by_type()

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        self._cache.trim_to(n_sequences=n_sequences, n_bytes=n_bytes)

    def insert_cache(
        self, model: Hashable, tokens: Sequence[int], cache: Any, *, cache_type: str = "assistant"
    ) -> None:
        """Keep what a request computed, as far as its ticket says."""
        try:
            self._insert(model, tokens, cache, cache_type)
        finally:
            if (ticket := ticket_of(tokens)) is not None:
                ticket.tell_end()

    def _insert(
        self,
        model: Hashable,
        tokens: Sequence[int],
        cache: Any,
        cache_type: str,
        partial: bool = False,
    ) -> None:
        ticket = ticket_of(tokens)
        if ticket is None:
            self._cache.insert_cache(model, tokens, cache, cache_type=cache_type)
            return
        if ticket.privacy.no_store:
            scrub(cache)  # upstream's loop holds the list until it has another one
            ticket.underway.kept(len(tokens))
            return
        self._desk.even_out(cache)
        self._cache.insert_cache(
            model,
            tokens,
            cache,
            cache_type=cache_type,
            keep_tokens=ticket.keep_tokens,
            origin=ticket.origin,
            partial=partial,
        )
        ticket.underway.kept(len(tokens))

    def fetch_nearest_cache(
        self, model: Hashable, tokens: Sequence[int]
    ) -> tuple[Any | None, Sequence[int]]:
        """The one look of a request; what is computed beforehand is no part of what it found."""
        ticket = ticket_of(tokens)
        if ticket is None:
            return self._cache.fetch_nearest_cache(model, tokens)
        cache, rest, fetch = self._cache.look_up(
            model,
            tokens,
            counted=not ticket.keeps,
            trail=ticket.trail,
            origin=ticket.origin,
            leave_tokens=ticket.leave_tokens,
            to_copy=ticket.in_batch,
            ahead=ticket.ahead,
            remote=ticket.brought,
        )
        if ticket.ahead is not None:
            self._cache.release(ticket.ahead)
            ticket.ahead = None
        ticket.trail.forget()
        if not ticket.privacy.no_store:
            ticket.keep = functools.partial(self._keep, model)
        ticket.looked(fetch)
        return self._desk.complete(model, tokens, cache, rest)

    def _keep(self, model: Hashable, tokens: Sequence[int], cache: Any, partial: bool) -> None:
        """Keep what is computed of a prompt in the midst of one of its pieces."""
        self._insert(model, tokens, cache, "user", partial)


def ticket_of(tokens: Sequence[int]) -> Ticket | None:
    """The ticket that came with token ids; None for those of no request."""
    return tokens.ticket if isinstance(tokens, TicketTokens) else None


def cache_header(fetch: Fetch, repaired: Sequence[str] = ()) -> str:
    """The value of `x-persist-cache`: `disk|memory|remote|miss; tokens=N`, and why it is no more.

    Then the names of what was changed in the request, if it was.
    """
    value = f"{fetch.source}; tokens={fetch.num_tokens}"
    if fetch.reason:
        reason = (
            fetch.reason.replace("→", "->").encode("ascii", "replace").decode().replace('"', "'")
        )
        value += f'; reason="{" ".join(reason.split())[:200]}"'
    if repaired:
        value += f"; repaired={','.join(repaired)}"
    return value
