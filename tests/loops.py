"""A generation loop of ours in this process, with a tiny model whose calls are counted.

As `serve` runs it, but for the socket: a test asks it as the HTTP handler does.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

from mlx_lm import server as upstream
from mlx_lm.models.cache import LRUPromptCache

from persist_cache import PromptCache, Store
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.server.ticket import Ticket
from persist_cache.server.upstream.batch import Batch
from persist_cache.server.upstream.generator import Generator
from persist_cache.server.upstream.provider import Provider
from persist_cache.server.upstream.requests import TicketedRequest
from persist_cache.tokens import common_prefix_tokens, pack_tokens
from tests.computed import Call, count_calls
from tests.torture.tiny import VOCABULARY, Kind, write_model
from tests.waiting import until

DEFAULT = "default_model"


@dataclass
class Answered:
    """A request and its answer.

    Attributes:
        ticket: Of the request.
        prompt: Its tokens.
        reply: Token ids of the answer.
        progress: What was reported of its prefill.
    """

    ticket: Ticket
    prompt: list[int] = field(default_factory=list)
    reply: list[int] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Tokens that need not be computed, by the ticket."""
        assert self.ticket.fetch is not None
        return self.ticket.fetch.num_tokens


class Loop:
    """A generator with its thread; a context manager that ends it.

    Attributes:
        cache: Its cache.
        generator: Itself.
        provider: Has the model.
        calls: Calls of the model (and of the draft model, by its path) so far.
    """

    def __init__(
        self,
        model: Path,
        store: Store | Path | None = None,
        *,
        draft: Path | None = None,
        memory_bytes: int = 1 << 63,
        waits: bool = True,
        **options: Any,
    ) -> None:
        """Load a model.

        Args:
            model: Its folder.
            store: Of the cache; None for memory alone.
            draft: Folder of a draft model.
            memory_bytes: Of the cache's memory.
            waits: The block begins when the model is there, and its tokenizer for other threads.
            options: Of the server, such as `kv_bits`.
        """
        self.model = model
        self.provider = make_provider(model, draft, **options)
        self.cache = PromptCache(
            max_bytes=memory_bytes,
            store=store,
            identify=self.provider.identifier,
            leave_tokens=1,
            idle_s=60,
        )
        self.calls: list[Call] = []
        self._counted: list[Any] = []
        self._waits = waits
        self.generator = self._make_generator()
        self._batches = self._own_batches()

    def _make_generator(self) -> Any:
        return Generator(self.provider, self.cache)

    def _own_batches(self) -> AbstractContextManager[object]:
        made = functools.partial(Batch, self.generator.prefill_clock)
        return mock.patch.object(upstream, "BatchGenerator", made)

    def _answering(self) -> AbstractContextManager[None]:
        found: AbstractContextManager[None] = self.generator.in_flight()
        return found

    def __enter__(self) -> Self:
        self._batches.__enter__()
        if self._waits:
            until(lambda: self.provider.spare is not None or not self._is_alive(), "no model")
        return self

    def _is_alive(self) -> bool:
        return bool(self.generator.generation_available())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.generator.stop_and_join()
        self._batches.__exit__(None, None, None)
        self.cache.close()

    def ask(
        self,
        messages: Sequence[Mapping[str, Any]] = (),
        *,
        text: str = "",
        tools: list[dict[str, Any]] | None = None,
        ticket: Ticket | None = None,
        read: Callable[[Iterator[Any]], list[Any]] = list,
        **sampling: Any,
    ) -> Answered:
        """Send a request as the HTTP handler does, and read its answer.

        Args:
            messages: A chat.
            text: What is to be completed instead.
            tools: Tool definitions.
            ticket: Of the request; a new one by default.
            read: Reads the answer.
            sampling: `max_tokens`, `seed`, `repetition_penalty`.
        """
        request = TicketedRequest(
            "chat" if messages else "text",
            text,
            [dict(message) for message in messages],
            tools,
            None,
            ticket or Ticket(),
        )
        answered = Answered(request.ticket)
        with self._answering():
            ctx, responses = self.generator.generate(
                request,
                arguments(**sampling),
                lambda done, total: answered.progress.append((done, total)),
            )
            try:
                answered.prompt = list(ctx.prompt)
                answered.reply = [int(one.token) for one in read(responses)]
            finally:
                ctx.stop()
        return answered

    def count(self) -> None:
        """Count the calls of the models from now on; they have to be loaded."""
        for model, name in (
            (self.provider.model, self.model),
            (self.provider.draft_model, "draft"),
        ):
            if model is not None and not any(model is one for one in self._counted):
                count_calls(model, str(name), self.calls.append)
                self._counted.append(model)

    def prefilled(self) -> int:
        """Tokens that the model computed before it sampled, since asked last."""
        calls, self.calls[:] = list(self.calls), []
        return sum(
            len(row)
            for call in calls
            if call.model == str(self.model) and not call.sampling
            for row in call.rows
        )


class StockLoop(Loop):
    """The same with mlx-lm's own generator and cache."""

    def _is_alive(self) -> bool:
        return False  # it makes no copy of its tokenizer

    def _make_generator(self) -> Any:
        return upstream.ResponseGenerator(self.provider, LRUPromptCache(10))

    def _answering(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _own_batches(self) -> AbstractContextManager[object]:
        return nullcontext()


def computed_of_new(
    loop: Loop, role: str, *, turns: int, turn_words: int, system_words: int, **sampling: Any
) -> float:
    """Tokens computed for each new one, in a conversation whose messages are of that role.

    New is what a prompt does not share with the one before it. For a model of `tests.torture.tiny`,
    whose tokens are words: so a reply that is sent back is the same tokens.
    """
    loop.count()
    loop.prefilled()
    messages = [
        {"role": "system", "content": words(sum(map(ord, role)), system_words)},
        {"role": "user", "content": words(1, turn_words)},
    ]
    before: list[int] = []
    computed = new = 0
    for turn in range(turns):
        answered = loop.ask(messages, **sampling)
        computed += loop.prefilled() + 1  # the last one is computed by the call that samples
        shared = common_prefix_tokens(pack_tokens(before), pack_tokens(answered.prompt))
        new += len(answered.prompt) - shared
        before = answered.prompt
        messages += [
            {"role": "assistant", "content": text_of(answered)},
            {"role": role, "content": words(turn + 2, turn_words)},
        ]
    return computed / new


def write_thinking_model(folder: Path, kind: Kind, seed: int) -> Path:
    """A model whose prompts end in an open thought of two tokens, as those of Qwen 3.5 do."""
    write_model(folder, replace(kind, thinks=True), seed)
    template = folder / "chat_template.jinja"
    text = template.read_text()
    assert "<think> {" in text
    template.write_text(text.replace("<think> {", "<think> w0 {"))
    return folder


def words(seed: int, count: int) -> str:
    """Words of the vocabulary of `tests.torture.tiny`, each a token."""
    return " ".join(f"w{(seed * 31 + number * number) % 80}" for number in range(count))


def text_of(answered: Answered) -> str:
    """A reply as its client sends it back, without the end of the message."""
    end = VOCABULARY.index("<|end|>")
    return " ".join(VOCABULARY[token] for token in answered.reply if token != end)


def make_provider(model: Path, draft: Path | None = None, **options: Any) -> Provider:
    """A server's model provider that has loaded nothing yet; `options` are of the server."""
    given: dict[str, Any] = {
        "model": str(model),
        "draft_model": None if draft is None else str(draft),
        "adapter_path": None,
        "trust_remote_code": False,
        "chat_template": None,
        "chat_template_args": {},
        "use_default_chat_template": False,
        "pipeline": False,
        "kv_bits": None,
        "kv_group_size": 64,
        "quantized_kv_start": 0,
        "prefill_step_size": 2048,
        "decode_concurrency": 8,
        "prompt_concurrency": 8,
        "prompt_cache_bytes": None,
        **options,
    }
    provider = Provider(Namespace(**given))
    provider.identifier = Identifier(
        kv_bits=given["kv_bits"],
        kv_group_size=given["kv_group_size"],
        quantized_kv_start=given["quantized_kv_start"],
    )
    return provider


def arguments(
    *,
    max_tokens: int = 4,
    seed: int | None = None,
    model: str = DEFAULT,
    draft: str = DEFAULT,
    repetition_penalty: float = 0.0,
    **more: Any,
) -> Any:
    """Upstream's arguments of a greedy request."""
    return upstream.GenerationArguments(
        model=upstream.ModelDescription(model, draft, None),
        sampling=upstream.SamplingArguments(0.0, 1.0, 0, 0.0, 0.0, 0.0),
        logits=upstream.LogitsProcessorArguments(None, repetition_penalty, 20, 0.0, 20, 0.0, 20),
        stop_words=[],
        max_tokens=max_tokens,
        num_draft_tokens=3,
        logprobs=False,
        top_logprobs=0,
        seed=seed,
        chat_template_kwargs=more.pop("chat_template_kwargs", None),
        **more,
    )
