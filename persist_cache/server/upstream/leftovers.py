"""What upstream's loop still holds of private requests when their answers are over.

Its variables keep the values of the last request, and of the last answer, until there are others.
On an idle server that may be for ever.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from queue import Queue
from types import FrameType
from typing import Any

from persist_cache.server.privacy import scrub
from persist_cache.server.ticket import Ticket

_LOOP = "_generate"


class Leftovers:
    """Private requests that are over, to be cleared from the generation thread.

    Thread safety: any thread may `forget`; the generation thread calls `clear`, from within the
    loop.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over: list[Ticket] = []

    def forget(self, ticket: Ticket) -> None:
        """Note a request that nobody waits for any more."""
        with self._lock:
            self._over.append(ticket)

    def clear(self, queued: Queue[Any]) -> None:
        """Forget the requests that are over, and empty what the loop's variables hold of them.

        Args:
            queued: Requests that the loop has not taken yet.
        """
        if not self._over:
            return
        frame: FrameType | None = inspect.currentframe()
        while frame is not None and frame.f_code.co_name != _LOOP:
            frame = frame.f_back
        values = {} if frame is None else frame.f_locals
        at_work = {id(_ticket_of(one)) for one in _at_work(values)}
        with queued.mutex:
            at_work |= {id(_ticket_of(one)) for one in queued.queue}
        with self._lock:
            over = [one for one in self._over if id(one) not in at_work]
            self._over = [one for one in self._over if id(one) in at_work]
        tickets = set(map(id, over))
        result = values.get("result")
        if id(_ticket_of(values.get("rqueue"))) in tickets:
            _scrub_asked(values)
        # Of a request that it could not tokenize, the loop has no more than that.
        if id(_ticket_of(values.get("prompt"))) in tickets:
            _scrub_prompt(values)
        if isinstance(result, dict) and id(_ticket_of(result.get("rqueue"))) in tickets:
            _scrub_result(result)
        if isinstance(values, dict):
            values.clear()  # a copy, which the frame would keep
        for ticket in over:
            ticket.forget()


def _at_work(values: Mapping[str, Any]) -> list[Any]:
    """What the loop computes, or has taken from the queue for later."""
    results = (values.get("batch_results") or {}).values()
    return [*(one["rqueue"] for one in results), *(values.get("unprocessed_requests") or ())]


def _ticket_of(one: Any) -> Ticket | None:
    """The ticket of a request, of its answers, of its tokens, or of request and answers."""
    if isinstance(one, tuple):
        one = one[0] if one else None
    found: Ticket | None = getattr(one, "ticket", None)
    return found


def _scrub_asked(values: Mapping[str, Any]) -> None:
    """How the request that was taken last is to be answered; the loop has let go of the request."""
    if (args := values.get("args")) is not None:
        args.stop_words, args.chat_template_kwargs = [], None


def _scrub_prompt(values: Mapping[str, Any]) -> None:
    """Of the request that was tokenized last."""
    scrub(*map(values.get, ("prompt", "segments", "rest")))
    for words in map(values.get, ("stop_sequences", "text_sm")):
        if words is not None:
            scrub(vars(words))  # they are of this request alone, see `Generator`
    if (context := values.get("ctx")) is not None:
        scrub(context.prompt)


def _scrub_result(result: Mapping[str, Any]) -> None:
    """Of the answer that was said last; nobody asks for more of it."""
    if (detokenizer := result.get("detokenizer")) is not None:
        detokenizer.reset()
    answers = result["rqueue"]
    with answers.mutex:
        answers.queue.clear()
