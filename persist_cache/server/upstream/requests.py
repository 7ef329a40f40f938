"""Requests and answers as upstream passes them between its threads, with their tickets."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from queue import Queue
from typing import Any

from mlx_lm import server as upstream

from persist_cache.server.names import DEFAULT
from persist_cache.server.protocols.asked import Asked
from persist_cache.server.ticket import Ticket


@dataclasses.dataclass
class TicketedRequest(upstream.CompletionRequest):  # type: ignore[misc]
    """Upstream's request with its ticket: the generation thread gets nothing else of it."""

    ticket: Ticket = dataclasses.field(default_factory=Ticket)

    @classmethod
    def of(cls, request: Any, ticket: Ticket | None = None) -> TicketedRequest:
        """The same request with a ticket: its own, `ticket` or a new one."""
        if isinstance(request, cls):
            return request
        values = {one.name: getattr(request, one.name) for one in dataclasses.fields(request)}
        return cls(**values, ticket=ticket or Ticket())


def as_upstreams(
    asked: Asked, ticket: Ticket, provider: Any, *, is_known: bool
) -> tuple[TicketedRequest, upstream.GenerationArguments]:
    """A request of a protocol of our own, as upstream's loop takes it.

    Args:
        asked: What was asked.
        ticket: Of the request.
        provider: Has the model, and the options of the server.
        is_known: Whether the model that it names is one of here. Clients ask for models of their
            protocol's maker, which stand for the one of the command line.
    """
    cli, sampling = provider.cli_args, asked.sampling
    args = upstream.GenerationArguments(
        model=upstream.ModelDescription(asked.model if is_known else DEFAULT, DEFAULT, None),
        sampling=upstream.SamplingArguments(
            temperature=sampling.get("temperature", cli.temp),
            top_p=sampling.get("top_p", cli.top_p),
            top_k=sampling.get("top_k", cli.top_k),
            min_p=cli.min_p,
            xtc_probability=0.0,
            xtc_threshold=0.1,
        ),
        logits=upstream.LogitsProcessorArguments(None, 0.0, 20, 0.0, 20, 0.0, 20),
        stop_words=asked.stop_words,
        max_tokens=cli.max_tokens if asked.max_tokens is None else asked.max_tokens,
        num_draft_tokens=cli.num_draft_tokens,
        logprobs=False,
        top_logprobs=-1,
        seed=None,
        chat_template_kwargs=asked.template_args or None,
    )
    request = TicketedRequest("chat", "", asked.messages, asked.tools, None, ticket=ticket)
    if provider.is_distributed and ticket.form is not None:
        # Ranks send each other requests as upstream knows them.
        fitted = ticket.form.fit(provider.tokenizer)
        request.messages, request.tools = fitted.messages, fitted.tools
        args.chat_template_kwargs = fitted.template_args
        ticket.form = ticket.wishes = None
    return request, args


class Answers(Queue[Any]):
    """What the generation thread has to say of a request.

    Its context comes first. From then on the ticket tells the loop that nobody waits any more.
    Upstream ends an answer, by None, before it hands its cache over: the ticket holds that back.
    """

    def __init__(self, ticket: Ticket) -> None:
        super().__init__()
        self.ticket = ticket

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if isinstance(item, upstream.GenerationContext):
            stop, item.stop = item.stop, self.ticket.drop
            self.ticket.runs(stop)
        elif isinstance(item, Exception):
            self.ticket.prefilled()
            self.ticket.tell_end()
        elif item is None:
            self.ticket.prefilled()
            self.ticket.hold_end(functools.partial(super().put, None))
            return
        super().put(item, block, timeout)


def failing_answer(error: Exception) -> tuple[Any, Iterator[Any]]:
    """An answer whose stream has begun, and which then fails."""

    def answer() -> Iterator[Any]:
        raise error
        yield

    context = upstream.GenerationContext(
        has_tool_calling=False,
        has_thinking=False,
        tool_parser=None,
        text_sm=upstream.TextStateMachine(),
        initial_state="normal",
        prompt=[],
    )
    return context, answer()
