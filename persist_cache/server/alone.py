"""Requests that are served alone, with a seed, `--kv-bits` or a draft model.

Upstream's loop computes their prompts in one go, and says nothing of it until the end. Here they
are computed as those of a batch are: piece by piece, with progress, kept after each piece, and
only for as long as somebody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from queue import Queue
from typing import Any

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.errors import ModelError
from persist_cache.prefill.clock import PrefillClock
from persist_cache.prefill.run import Computation, KVQuantization
from persist_cache.server.segments import checkpoints
from persist_cache.server.ticket import Ticket


class Alone:
    """One request while it is served alone; for upstream it is the queue of its answers.

    Thread safety: for the generation thread alone.
    """

    def __init__(
        self,
        ticket: Ticket,
        answers: Queue[Any],
        provider: Any,
        on_stream: Callable[[], AbstractContextManager[object]],
        is_given_up: Callable[[], bool],
        is_ending: Callable[[], bool],
    ) -> None:
        """Compute nothing yet.

        Args:
            ticket: Of the request.
            answers: Where its client waits.
            provider: Has the models, and the options of the server.
            on_stream: Makes what is computed within it go to upstream's stream.
            is_given_up: Says whether nobody waits for the answer any more.
            is_ending: Says whether the server ends, and has given all the grace it had.
        """
        self._ticket = ticket
        self._answers = answers
        self._provider = provider
        self._on_stream = on_stream
        self._is_given_up = is_given_up
        self._is_ending = is_ending
        self._done = 0

    def put(self, answer: Any) -> None:
        """Hand on what upstream says; it counts from where we have computed.

        Raises:
            ConnectionAbortedError: The server ends: upstream's loop would go on to the last token.
        """
        if answer is not None and not isinstance(answer, Exception):
            self._check_end()
        if isinstance(answer, tuple):
            answer = tuple(self._done + count for count in answer)
        self._answers.put(answer)

    def _check_end(self) -> None:
        if self._is_ending():
            raise ConnectionAbortedError("The server ends.")

    def complete(
        self,
        keep: PromptCache,
        clock: PrefillClock,
        model: Hashable,
        tokens: Sequence[int],
        cache: Any | None,
        rest: Sequence[int],
    ) -> tuple[Any | None, Sequence[int]]:
        """Compute the prompt and keep it after each of its pieces.

        Args:
            keep: Where to.
            clock: Runs meanwhile.
            model: mlx-lm's model key.
            tokens: The prompt.
            cache: What was found of it, or None.
            rest: The tokens that this has not seen.

        Returns:
            What is handed to upstream: the cache, and the tokens that it has not seen.

        Raises:
            ConnectionAbortedError: It was cut. What was computed is kept.
            ModelError: mlx-lm cannot quantize the cache.
        """
        prompt, provider, options = self._ticket.prompt, self._provider, self._provider.cli_args
        if prompt is None or prompt.vision is not None:
            return cache, rest
        found = len(tokens) - len(rest)
        places = checkpoints(prompt.segments, prompt.kinds, self._ticket.leave_tokens)
        work = Computation(
            provider.model,
            provider.draft_model,
            cache,
            found,
            step_tokens=options.prefill_step_size,
            quantize=KVQuantization.of(options),
        )
        state_layers: Sequence[int] = getattr(provider, "state_layers", ())
        anywhere = not state_layers
        underway = self._ticket.underway

        def insert(kind: str, *, partial: bool = False) -> None:
            if underway.is_new(work.num_tokens) and not self._ticket.privacy.no_store:
                keep.insert_cache(
                    model,
                    tokens[: work.num_tokens],
                    work.snapshot(),
                    cache_type=kind,
                    keep_tokens=self._ticket.keep_tokens,
                    origin=self._ticket.origin,
                    partial=partial,
                )
                underway.kept(work.num_tokens)

        def sizes() -> tuple[int, int]:
            nbytes = work.layers_nbytes
            return sum(nbytes), sum(nbytes[index] for index in state_layers)

        def after() -> None:
            self._done = work.num_tokens - found
            self._answers.put((self._done, len(rest)))
            self._check_end()
            if self._is_given_up():
                raise ConnectionAbortedError("The client is gone.")

        def compute(end: int) -> None:
            while work.num_tokens < end:
                upto = min(work.num_tokens + options.prefill_step_size, end)
                if not anywhere:
                    upto = underway.next_place(work.num_tokens, upto)
                work.advance(tokens, upto, after)
                if work.num_tokens < end:
                    if underway.reached(work.num_tokens):
                        insert("user", partial=anywhere)
                    elif underway.claims_saving(work.num_tokens, *sizes()):
                        insert("user", partial=True)

        underway.begin(found, anywhere=anywhere)
        with self._on_stream(), clock.running():
            try:
                after()
                for end, kind in places:
                    compute(end)
                    insert(kind)
                if self._ticket.is_over:
                    raise ConnectionAbortedError("The client is gone.")
            except ConnectionAbortedError:
                ends = dict(places)
                insert(ends.get(work.num_tokens, "user"), partial=work.num_tokens not in ends)
                raise
            except NotImplementedError as error:
                raise ModelError(
                    f"The cache of this model cannot be quantized ({error}); start the server "
                    "without --kv-bits."
                ) from error
            handed = work.finish(tokens)
        self._ticket.prefilled()
        return handed, tokens[work.num_tokens :]


def tokens_looked_back_at(logits: Any) -> int:
    """Tokens of the prompt that the sampling of its answer takes into account.

    Served alone, a request shows its sampler only those that upstream's loop computes itself.

    Args:
        logits: Upstream's `LogitsProcessorArguments`.
    """
    penalties = ("repetition", "presence", "frequency")
    sizes = [
        getattr(logits, f"{name}_context_size")
        for name in penalties
        if getattr(logits, f"{name}_penalty")
    ]
    return max(sizes, default=0)
