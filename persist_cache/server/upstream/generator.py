"""Upstream's generation loop with tickets: from the thread that answers to the model and back."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from queue import Empty
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import mlx.core as mx
from mlx_lm import server as upstream

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.prefill.clock import PrefillClock
from persist_cache.prefill.run import even_out_draft
from persist_cache.server.alone import Alone, tokens_looked_back_at
from persist_cache.server.flight import Flight, Line
from persist_cache.server.guard import ModelGuard
from persist_cache.server.protocols.asked import Asked
from persist_cache.server.quiet import quiet
from persist_cache.server.recent.ring import Ring
from persist_cache.server.streaming import SIGN_S
from persist_cache.server.ticket import Ticket, TicketedCache
from persist_cache.server.upstream.bringing import Bringing
from persist_cache.server.upstream.budget import Budget
from persist_cache.server.upstream.leftovers import Leftovers
from persist_cache.server.upstream.provider import Provider
from persist_cache.server.upstream.requests import Answers, TicketedRequest, failing_answer
from persist_cache.server.validation import RefusedError
from persist_cache.server.warming import Warming

if TYPE_CHECKING:
    from persist_cache.server.admin import Admin

_SAVED_S = 10.0
"""How long a request waits for what another one computed to be saved, if memory cannot hold it."""
_TOLD_S = 0.05
"""How long the generation thread waits for the end of an answer, once it has nothing to compute."""


class Generator(Bringing):
    """Answers requests: as upstream's, which knows nothing of tickets."""

    _state_machine_cache: dict[Any, Any]
    _alone: Alone | None = None
    """The request that is served alone."""
    _is_private = False
    """Nothing is to be kept of the request that was tokenized last."""

    def __init__(self, model_provider: Any, prompt_cache: PromptCache) -> None:
        self._in_flight = 0
        self.is_ending = False
        self.admin: Admin | None = None
        self.warming: Warming | None = None
        self.guard: ModelGuard | None = None
        self.prefill_clock = PrefillClock()
        self.line = Line()
        self.recent = Ring(decode=self.decode_beside, seconds=prompt_cache.prefill_s)
        self._changed = threading.Condition()
        self._leftovers = Leftovers()
        self._has_cut_own = False
        self._taken_came = 0.0
        self._tickets: WeakSet[Ticket] = WeakSet()
        """Those that the generation thread has seen."""
        prompt_cache.is_busy = self._is_busy
        super().__init__(model_provider, TicketedCache(prompt_cache, self), prompt_cache)
        self._time_budget = Budget(self.requests)

    # ---- the thread that answers -------------------------------------------------------------

    def generate(
        self,
        request: Any,
        generation_args: Any,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> Any:
        """As upstream's, which it replaces: the ticket is made and tokenized before the queue.

        Raises:
            Exception: What went wrong before the outcome was known. In a stream that has begun
                meanwhile, asking for the answer raises it.
        """
        self.check_available()
        if self.names is not None:
            asked = generation_args.model
            key = self.names.key(asked.model, asked.adapter, asked.draft)
            self.names.check(key)
            # What is compared and loaded; the answer says what the client said.
            generation_args.model = upstream.ModelDescription(key.model, key.draft, key.adapter)
        only_fills = generation_args.max_tokens == 0
        request = self._stabilized(TicketedRequest.of(request))
        ticket = request.ticket
        answers = Answers(ticket)
        try:
            known_before = self._queue(answers, request, generation_args)
            ctx = self._next_answer(answers, ticket)
            if isinstance(ctx, Exception):
                raise ctx
            # When requests are served one at a time, the context is handed out before the look.
            while not ticket.wait(SIGN_S) and self.generation_available():
                ticket.waits()
            if ticket.fetch is None:
                said = self._next_answer(answers, ticket)
                if isinstance(said, Exception):
                    raise said
                raise RuntimeError("The request was answered without a look into the cache.")
            if ticket.form is None and ticket.changes:
                self.cache.count_repairs(ticket.repaired)
            if known_before is not None:
                self.cache.count_shared(max(0, ticket.fetch.num_tokens - known_before))
        except BaseException as error:
            ticket.drop()
            self._release(ticket.ahead)
            if not isinstance(error, Exception) or not ticket.has_begun():
                raise
            return failing_answer(error)
        told = self._told(ctx, answers, ticket, progress_callback)
        return ctx, (one for one in told if not only_fills)

    def answer(self, asked: Asked, ticket: Ticket) -> Any:
        """Answer a request that upstream has no handler for; as `generate`."""
        return self.generate(*self._as_upstreams(asked, ticket))

    def _queue(
        self, answers: Answers, request: TicketedRequest, args: upstream.GenerationArguments
    ) -> int | None:
        """Queue a request as soon as nothing that it lacks is computed for an earlier one.

        Returns:
            What was known of its prompt before it waited for that; None if it did not.
        """
        ticket = request.ticket
        if self._is_distributed or ticket.shares_nothing:
            self.tokenize_ahead(request, args)
            self.bring_ahead(request, args)
            self.load_ahead(request, args)
            self.requests.put((answers, request, args))
            return None
        flight = Flight(
            ticket,
            (args.model.model, args.model.adapter, args.model.draft),
            salt=ticket.privacy.salt.encode(),
            leave_tokens=max(1, tokens_looked_back_at(args.logits)),
            shares_nothing=any(upstream._image_parts(request.messages)),
        )
        self.line.enter(flight)
        try:
            known_before = self._wait_in_line(flight, request, args)
            self.bring_ahead(request, args)
            self.load_ahead(request, args)
            self.requests.put((answers, request, args))
        except BaseException:
            self.line.leave(flight)
            raise
        self.line.queued(flight)
        return known_before

    def _wait_in_line(
        self, flight: Flight, request: TicketedRequest, args: upstream.GenerationArguments
    ) -> int | None:
        ticket, provider = request.ticket, self.model_provider

        def pause() -> None:
            self.check_available()
            ticket.waits()

        self.tokenize_ahead(request, args)
        self.line.wait_for_turn(flight, pause, SIGN_S)
        if ticket.prompt is None:
            self.tokenize_ahead(request, args)  # its model may have been loaded for another one
        prompt = ticket.prompt
        if prompt is None:
            return None

        def known(wanted: int) -> int:
            key = provider.model_key or ticket.model_key  # it may be let go at this moment
            look = functools.partial(
                self.cache.known_tokens, key, prompt.tokens, salt=ticket.privacy.salt
            )
            give_up = time.monotonic() + _SAVED_S
            while True:
                is_saving = self.cache.queued_jobs > 0 and time.monotonic() < give_up
                found = look(trail=ticket.trail)
                if found >= wanted or not is_saving:
                    return found
                time.sleep(SIGN_S)  # it is too large for memory, and on its way to the disk
                pause()

        return self.line.wait_for_shared(flight, known, pause, SIGN_S)

    def _told(
        self,
        ctx: Any,
        answers: Answers,
        ticket: Ticket,
        progress_callback: Callable[[int, int], None] | None,
    ) -> Iterator[Any]:
        """The answer, with the usage of `ctx` corrected before it is read.

        Upstream takes what it is handed for what was cached; that may have been computed just now.
        """
        while (one := self._next_answer(answers, ticket)) is not None:
            if isinstance(one, Exception):
                raise one
            ticket.check()
            if isinstance(one, tuple):
                ticket.computed = one
                if progress_callback is not None:
                    progress_callback(*one)
                continue
            ticket.times.first_token = ticket.times.first_token or time.monotonic()
            ticket.output_tokens += 1
            ctx.prompt_cache_count = 0 if ticket.fetch is None else ticket.fetch.num_tokens
            yield one
        ticket.times.ended = time.monotonic()

    def _next_answer(self, answers: Answers, ticket: Ticket) -> Any:
        """What the generation thread says next; there are signs of life until it does."""
        while True:
            try:
                one = answers.get(timeout=SIGN_S)
            except Empty:
                # Wherever the request was when the thread died, nothing more will come.
                if not self.generation_available() or self._is_cut_own(ticket):
                    raise self._no_more() from None
                ticket.waits()
            else:
                cut = isinstance(one, ConnectionAbortedError)
                return self._no_more() if cut and (self._stop or self._is_cut_own(ticket)) else one

    def _is_cut_own(self, ticket: Ticket) -> bool:
        """Whether a request is for no client, and was cut because the server ends."""
        return bool(ticket.keeps) and self._has_cut_own

    def check_available(self) -> None:
        """See whether there can be an answer.

        Raises:
            RefusedError: The server is stopping.
            RuntimeError: The generation thread died.
        """
        if not self.generation_available():
            raise self._no_more()

    def _no_more(self) -> Exception:
        """Why there will be no answer."""
        if self._stop or self._has_cut_own:
            return RefusedError(503, "The server is stopping; ask again when it is back.")
        return RuntimeError("generation thread died")

    # ---- on the generation thread ------------------------------------------------------------

    def forget(self, ticket: Ticket) -> None:
        """Let go of a request whose answer is over, if nothing of it is to be kept."""
        if ticket.privacy.no_store:
            ticket.body = b""
            self._leftovers.forget(ticket)

    def _next_request(self, timeout: float | None = None) -> Any:
        with self._changed:
            seen = list(self._tickets)
        for ticket in seen:
            ticket.tell_end()  # if upstream had no cache to hand over
        self._leftovers.clear(self.requests)
        if getattr(self.model_provider, "wants_spare", False):
            self._make_spare()
        elif timeout is not None and getattr(self.model_provider, "lacks_spare", False):
            self._make_spare_in_peace()
        taken = super()._next_request(timeout)
        if taken is not None:
            self._taken_came = taken[1].ticket.times.arrived
        return taken

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        if self.is_ending:
            raise self._no_more()
        request.ticket.model = args.model
        self._is_private = request.ticket.privacy.no_store
        with quiet(request.ticket.privacy.no_store):
            prompt = super()._tokenize(tokenizer, request, args)
        request.ticket.model_key = self.model_provider.model_key
        self._take_over(request.ticket)
        with self._changed:
            self._tickets.add(request.ticket)
        return prompt

    def _make_state_machine(self, model_key: Any, tokenizer: Any, stop_words: Any) -> Any:
        """As upstream's, which remembers the stop words of requests: not of private ones."""
        if not self._is_private:
            return super()._make_state_machine(model_key, tokenizer, stop_words)
        remembered = self._state_machine_cache
        self._state_machine_cache = {}
        try:
            return super()._make_state_machine(model_key, tokenizer, stop_words)
        finally:
            self._state_machine_cache = remembered

    def _take_over(self, ticket: Ticket) -> None:
        """End prefills of nobody that this request goes on with: it may be their client again."""
        for one in self._running():
            if one.is_given_up() or (one.model == ticket.model and one.is_begun_for(ticket)):
                one.underway.cut()
                one.underway.keep_now()

    def _make_spare_in_peace(self) -> None:
        """Make the spare tokenizer if nobody waits for this thread, or for the end of an answer.

        Threads that tell an answer would have to ask this one for the interpreter at each step.
        """
        give_up = time.monotonic() + _TOLD_S
        with self._changed:
            while self._in_flight > 0 and self.requests.empty() and time.monotonic() < give_up:
                self._changed.wait(_TOLD_S / 10)
            is_idle = self._in_flight <= 0 and self.requests.empty()
        if is_idle:
            self._make_spare()

    def _make_spare(self) -> None:
        if isinstance(self.model_provider, Provider):  # else it is upstream's
            self.model_provider.make_spare()

    def _is_batchable(self, args: Any) -> bool:
        """As upstream's, which asks it of each request that it takes from the queue."""
        is_batchable: bool = super()._is_batchable(args)
        for ticket in self._running():
            if not is_batchable or args.model != ticket.model:
                ticket.underway.hurry(self._taken_came)
        return is_batchable

    def _serve_single(self, request: Any, stream: Any) -> None:
        """One request at a time, where upstream knows no segments."""
        self._make_spare()  # until it is answered nobody else can
        answers, asked, args = request
        ticket: Ticket = asked.ticket
        ticket.leave_tokens = tokens_looked_back_at(args.logits)

        self._alone = Alone(
            ticket,
            answers,
            self.model_provider,
            on_stream=lambda: mx.stream(stream),
            is_given_up=lambda: self._is_to_be_cut(ticket),
            is_ending=lambda: self._stop and not self._is_distributed,
        )
        try:
            super()._serve_single((self._alone, asked, args), stream)
        finally:
            self._alone = None
            ticket.settle()
            ticket.tell_end()

    def _is_to_be_cut(self, ticket: Ticket) -> bool:
        """Whether a prefill beside which nothing else is computed is to end."""
        if self._is_distributed:
            return False
        with self.requests.mutex:
            waiting = [one.ticket.times.arrived for _, one, _ in self.requests.queue]
        if waiting:
            ticket.underway.hurry(min(waiting))  # for its own client, it may be, who asks again
        return ticket.is_given_up()

    def complete(
        self, model: Hashable, tokens: Sequence[int], cache: Any | None, rest: Sequence[int], /
    ) -> tuple[Any | None, Sequence[int]]:
        """Compute and keep what upstream's loop does not, when it serves a request alone.

        It is called within the look, when the context of the answer is out: so the client sees
        progress.
        """
        if self._alone is None:
            return cache, rest
        return self._alone.complete(self.cache, self.prefill_clock, model, tokens, cache, rest)

    def even_out(self, cache: Any, /) -> None:
        """Bring a reply's draft layers to where those of prompts are."""
        if self.model_provider.draft_model is not None:
            even_out_draft(self.model_provider.model, cache)

    # ---- what is being answered --------------------------------------------------------------

    @property
    def _stop(self) -> bool:
        """Whether upstream's loop is to end; it asks between two rounds of the batch.

        What is being computed then is kept, because upstream drops the batch.
        """
        if self.is_ending and self._is_generation_thread():
            for ticket in self._running():
                ticket.underway.keep_now()
        return self.is_ending or (self._leaves and self._is_generation_thread())

    @_stop.setter
    def _stop(self, value: bool) -> None:
        self.is_ending = value
        if value:
            self.recent.close()
        for ticket in self._running() if value else []:
            ticket.underway.cut()

    def _is_generation_thread(self) -> bool:
        return threading.current_thread() is self._generation_thread

    def _is_busy(self) -> bool:
        """Whether anything is computed: also for clients that are gone."""
        return self._in_flight > 0 or any(one.underway.is_running for one in self._running())

    def _running(self) -> list[Ticket]:
        """Requests whose prompts may be computed at present, and may be cut."""
        with self._changed:
            return [] if self._is_distributed else list(self._tickets)

    def cut_own(self) -> None:
        """End prefills that are for no client, keeping what they have computed: the server ends."""
        self._has_cut_own = not self._is_distributed
        for ticket in self._running():
            if ticket.keeps:
                ticket.underway.cut()

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request that is being answered: the end of the server waits for it."""
        with self._changed:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_flight -= 1
                self._idle_since = time.monotonic()
                self._changed.notify_all()

    def drain(self, grace_s: float) -> bool:
        """Wait for running requests; returns whether all of them ended in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._in_flight <= 0, grace_s)
