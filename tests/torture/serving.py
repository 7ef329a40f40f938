"""`serve` itself, without its socket: clients in threads of its process, and a judge of answers.

Every answer is held against the very model that gave it, run over the whole prompt and the reply
in one piece and without any cache, so a difference at one token does not make the next ones
incomparable.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from mlx_lm import server as upstream

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.server import run
from persist_cache.server.launch import ServeOptions
from persist_cache.server.ticket import Ticket
from persist_cache.server.upstream.generator import Generator
from persist_cache.server.upstream.requests import TicketedRequest
from persist_cache.store.store import Store
from tests.torture.tiny import VOCABULARY

DEFAULT = "default_model"
"""What a client that names no model asks for."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request.

    Attributes:
        messages: The chat; empty for a completion.
        prompt: What is to be completed, when it is no chat.
        max_tokens: Length of the reply at most.
        model: Name of the model.
        adapter: Folder of its adapter.
        seed: Makes the server answer it alone, even if it could be batched.
        leave_after: Tokens after which the client is gone, None if it stays.
    """

    messages: Sequence[dict[str, str]] = ()
    prompt: str = ""
    max_tokens: int = 4
    model: str = DEFAULT
    adapter: str | None = None
    seed: int | None = None
    leave_after: int | None = None


@dataclass(slots=True)
class Answer:
    """What came back.

    Attributes:
        ask: The request.
        prompt: Its tokens.
        tokens: The reply.
        logprobs: What the server said each of them has.
        source: Where the beginning of the prompt came from: `memory`, `disk` or `miss`.
        reused: Length of that beginning.
        model: The model that answered, as it is in memory.
        error: What was raised instead.
    """

    ask: Ask
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    source: str = "miss"
    reused: int = 0
    model: Any = None
    error: str = ""

    @property
    def text(self) -> str:
        """The reply as a message would repeat it."""
        end = VOCABULARY.index("<|end|>")
        return " ".join(VOCABULARY[token] for token in self.tokens if token != end)


class _Recording(Generator):
    """Notes which model a request is answered by: a name says little where files are replaced."""

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        request.ticket.answered_by = self.model_provider.model
        return super()._tokenize(tokenizer, request, args)


class Session:
    """The clients of one server.

    Thread safety: `ask` may be called by any thread; the rest by the one that made it.
    """

    def __init__(self, generator: Any, store: Store | None) -> None:
        self.generator = generator
        self.store = store
        self._pool = ThreadPoolExecutor(5, "client")

    def ask(self, ask: Ask) -> Answer:
        """Send a request and read its answer, or leave in the middle of it."""
        answer = Answer(ask)
        ticket = Ticket()
        request = TicketedRequest(
            "chat" if ask.messages else "text",
            ask.prompt,
            [dict(message) for message in ask.messages],
            None,
            None,
            ticket,
        )
        try:
            with self.generator.in_flight():
                ctx, responses = self.generator.generate(request, _arguments(ask))
                answer.prompt = list(ctx.prompt)
                assert ticket.fetch is not None
                answer.source, answer.reused = ticket.fetch.source, ticket.fetch.num_tokens
                if ask.leave_after != 0:
                    for response in responses:
                        answer.tokens.append(int(response.token))
                        answer.logprobs.append(float(response.logprob))
                        if len(answer.tokens) == ask.leave_after:
                            break
                if ask.leave_after is not None:
                    ctx.stop()
        except Exception as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.model = getattr(ticket, "answered_by", None)
        return answer

    def ask_all(
        self, asks: Sequence[Ask], beside: Callable[[], object] = lambda: None
    ) -> list[Answer]:
        """Send requests at once, do something beside them, and wait for all of it."""
        other = self._pool.submit(beside)
        answers = list(self._pool.map(self.ask, asks))
        other.result()
        return answers

    def close(self) -> None:
        self._pool.shutdown()


def _arguments(ask: Ask) -> Any:
    return upstream.GenerationArguments(
        model=upstream.ModelDescription(ask.model, DEFAULT, ask.adapter),
        sampling=upstream.SamplingArguments(0.0, 1.0, 0, 0.0, 0.0, 0.0),
        logits=upstream.LogitsProcessorArguments(None, 0.0, 20, 0.0, 20, 0.0, 20),
        stop_words=[],
        max_tokens=ask.max_tokens,
        num_draft_tokens=3,
        logprobs=False,
        top_logprobs=0,
        seed=ask.seed,
        chat_template_kwargs=None,
    )


def serve(
    flags: Sequence[str],
    options: ServeOptions,
    drive: Callable[[Session], None],
    *,
    idle_s: float = 2.0,
) -> None:
    """Run a server in this process while `drive` sends it requests; then the process ends.

    To be called in a forked child that has not run MLX before. `idle_s` is the `PromptCache`'s.
    """
    stores: list[Store | None] = []
    mx.disable_compile()  # for the CPU it starts a C++ compiler for every function
    logging.disable(logging.CRITICAL)

    def listen(host: str, port: int, generator: Any, *_: Any) -> None:
        session = Session(generator, stores[0])
        try:
            drive(session)
        except BaseException:
            generator.stop_and_join()
            raise
        session.close()
        generator.stop_and_join()

    def prompt_cache(*sizes: int, store: Store | None, **more: Any) -> PromptCache:
        stores.append(store)
        return PromptCache(*sizes, store=store, idle_s=idle_s, **more)

    with mock.patch.multiple(
        run, answer_until_ended=listen, Generator=_Recording, PromptCache=prompt_cache
    ):
        run.serve(["--log-level", "CRITICAL", *flags], options)


# ---- the judge -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Judged:
    """What a comparison found.

    Attributes:
        tokens: Tokens compared.
        ties: Those where the model has no clear preference, and another one was chosen.
        wrong: Those that it would not have chosen, or that it gives another probability.
        worst: The largest difference of a log probability.
        said: The first wrong one, in words.
    """

    tokens: int = 0
    ties: int = 0
    wrong: int = 0
    worst: float = 0.0
    said: str = ""


def judge(answer: Answer, tolerance: float) -> Judged:
    """Hold a greedy answer against its model without a cache.

    A token is right if the reference gives it the highest logit, a tie if another one's is higher
    by no more than `tolerance`, and wrong otherwise. The probability that the server named has to
    be the reference's, too: that shows a wrong cache long before it shows in a token.
    """
    judged = Judged(tokens=len(answer.tokens))
    if not answer.tokens:
        return judged
    whole = answer.prompt + answer.tokens[:-1]
    logits = answer.model(mx.array([whole]))[0, len(answer.prompt) - 1 :].astype(mx.float32)
    rows = np.array(logits)
    best = rows.max(axis=-1)
    logprobs = rows - best[:, None]
    logprobs -= np.log(np.exp(logprobs).sum(axis=-1, keepdims=True))
    for place, (token, said) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        gap = float(best[place] - rows[place, token])
        apart = abs(float(logprobs[place, token]) - said)
        judged.worst = max(judged.worst, apart)
        if gap > tolerance or not apart <= tolerance:
            judged.wrong += 1
            judged.said = judged.said or (
                f"token {place} of the reply to {len(answer.prompt)} tokens, "
                f"{answer.reused} from {answer.source}: {token}, which has {gap:.2g} less than the "
                f"best; log probability {said:.4f}, without a cache {logprobs[place, token]:.4f}"
            )
        elif gap > 0:
            judged.ties += 1
    return judged


def prepare_process(home: Path) -> None:
    """Set what has to be set before MLX and tokenizers are used; `home` is for memos."""
    os.environ["PERSIST_CACHE_HOME"] = str(home)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
