"""Requests of our own protocols over HTTP, whatever their protocol.

What a body means and what an answer looks like is pure (`server/protocols/`); here a request is
queued as a chat's is, and what the model says is handed on as it comes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any

from persist_cache.server import answers
from persist_cache.server.form import Form
from persist_cache.server.guard import IGNORED_HEADER, OUTCOME_HEADER
from persist_cache.server.privacy import Privacy
from persist_cache.server.protocols.answering import Answer, Event, Usage, as_bytes
from persist_cache.server.protocols.asked import Asked, Mark
from persist_cache.server.protocols.openai import refusal_of
from persist_cache.server.protocols.output import Call, Finish, OutputReader, Reasoning
from persist_cache.server.recent.ring import Ring
from persist_cache.server.ticket import Part, Ticket


class Translated(BaseHTTPRequestHandler):
    """To be mixed in behind the protocols, and before `Streaming` and `Front`.

    It uses the methods of those two; a protocol reads a body and calls `answer_asked`.
    """

    response_generator: Any
    stream: bool
    ticket: Ticket | None
    keeps: Part
    privacy: Privacy
    body_as_read: bytes
    until_answered: contextlib.ExitStack
    _ignored: list[str]
    _answer: Answer | None = None
    _started = False
    _is_told = False

    def answer_asked(
        self,
        asked: Asked,
        answer: Answer,
        diagnose: Callable[[Ring, Ticket], dict[str, Any] | None] | None = None,
    ) -> None:
        """Answer a request, whose body was read.

        Args:
            asked: The request.
            answer: Says what the model does.
            diagnose: Says why the cache had no more, if the client asks for it.

        Raises:
            RefusedError: It cannot be answered, and nothing was sent.
            ConnectionError: The client is gone.
        """
        self.stream = asked.stream
        ticket, form = self._begun(asked, answer)
        if diagnose is not None:
            ring = self.response_generator.recent
            answer.diagnose = functools.partial(diagnose, ring, ticket)
        try:
            self.until_answered.enter_context(self.response_generator.in_flight())
            self._generate(asked, answer, ticket, form)
        finally:
            self._answer = None
            self.conclude()  # type: ignore[attr-defined]

    def count_asked(self, asked: Asked, said: Callable[[int], dict[str, Any]]) -> None:
        """Answer with the number of tokens of a request's prompt.

        Args:
            asked: The request.
            said: Makes the answer of the number.

        Raises:
            RefusedError: It cannot be counted.
            ConnectionError: The client is gone.
        """
        self.stream = False
        ticket, form = self._begun(asked, None)
        generator = self.response_generator
        try:
            self.until_answered.enter_context(generator.in_flight())
            counted = generator.count_tokens(asked, ticket)
            self._say_whole(said(counted), form)
        except ConnectionError:
            raise
        except Exception as error:
            raise refusal_of(error, 500) from error
        finally:
            self.conclude()  # type: ignore[attr-defined]

    def _begun(self, asked: Asked, answer: Answer | None) -> tuple[Ticket, Form]:
        self._tell_ignored(list(asked.ignored))  # type: ignore[attr-defined]
        generator = self.response_generator
        form = Form(
            asked,
            generator.templates,
            generator.cli_args.chat_template_args,
            is_remembered=not self.privacy.no_store,
        )
        ticket = Ticket(self.body_as_read, keeps=self.keeps, form=form, privacy=self.privacy)
        self._answer = answer
        self._started = self._is_told = False
        self.begin(ticket, "" if answer is None else answer.id)  # type: ignore[attr-defined]
        return ticket, form

    def _generate(self, asked: Asked, answer: Answer, ticket: Ticket, form: Form) -> None:
        try:
            context, pieces = self.response_generator.answer(asked, ticket)
            self.response_generator.cache.count_repairs(form.repaired)
            try:
                reader = _reader(asked, ticket, context)
                output, thought = self._say(asked, answer, ticket, form, reader, pieces)
            finally:
                context.stop()
            usage = usage_of(ticket, output, thought, asked.marks)
            rest = [*self._start(usage), *answer.say(reader.close())]
            finish = reader.finish or Finish("end")
            if asked.max_tokens == 0:
                finish = Finish("length")
            elif finish.reason == "length" and output < (asked.max_tokens or 0):
                finish = Finish("context")
            if self.stream:
                self._say_events([*rest, *answer.end(finish, usage)], form)
            else:
                self._say_whole(answer.whole(finish, usage), form)
        except ConnectionError:
            raise
        except Exception as error:
            if not self.has_begun():  # type: ignore[attr-defined]
                raise refusal_of(error, 500) from error
            self.say_error(error)  # type: ignore[attr-defined]

    def _say(
        self,
        asked: Asked,
        answer: Answer,
        ticket: Ticket,
        form: Form,
        reader: OutputReader,
        pieces: Iterator[Any],
    ) -> tuple[int, int]:
        """Hand on what the model says; returns how many tokens, and how many were thoughts."""
        output = thought = 0
        for piece in pieces:
            output += 1
            was_thinking = reader.is_thinking
            parts = reader.feed(piece.text, piece.token, piece.finish_reason)
            is_thinking = reader.is_thinking or any(isinstance(one, Reasoning) for one in parts)
            thought += was_thinking or is_thinking
            if asked.one_call:
                calls = [at for at, part in enumerate(parts) if isinstance(part, Call)]
                parts = parts[: calls[0] + 1] if calls else parts
            begun = [] if self._started else self._start(usage_of(ticket, marks=asked.marks))
            events = [*begun, *answer.say(parts)]
            if self.stream and (events or output == 1):
                self._say_events(events, form)
            elif self.stream:
                ticket.sign()  # a long tool call is said when it is complete
            if asked.one_call and answer.calls:
                reader.close()  # what it holds is behind the call
                break
            if reader.finish is not None and piece.finish_reason is None:
                break  # mlx-lm recognizes stop words by their tokens alone, and would go on
        return output, thought

    # ---- on the wire -------------------------------------------------------------------------

    def _say_events(self, events: list[Event], form: Form) -> None:
        if not self.has_begun() or not self._is_told:  # type: ignore[attr-defined]
            self._is_told, before = True, list(self._ignored)
            begun = self.has_begun()  # type: ignore[attr-defined]
            self._set_stream_headers(200)  # type: ignore[attr-defined]
            self.end_headers()
            if begun and form.ignored and list(form.ignored) != before:
                said = f": {IGNORED_HEADER}: {', '.join(form.ignored)}\n\n"
                self._write(said)  # type: ignore[attr-defined]
        self._write(as_bytes(events).decode())  # type: ignore[attr-defined]

    def _start(self, usage: Usage) -> list[Event]:
        """The first events of the stream, unless they were made: nothing is said before them."""
        if self._started or self._answer is None:
            return []
        self._started = True
        return self._answer.start(usage)

    def _say_whole(self, said: dict[str, Any], form: Form) -> None:
        outcome = self._outcome()  # type: ignore[attr-defined]
        if outcome is None and form.repaired:
            outcome = f"repaired={','.join(form.repaired)}"
        headers = {} if outcome is None else {OUTCOME_HEADER: outcome}
        if form.ignored:
            headers[IGNORED_HEADER] = ", ".join(form.ignored)
        self._send(answers.json_response(said, headers=headers))  # type: ignore[attr-defined]

    def _say_ignored(self, status_code: int) -> None:
        form = None if self.ticket is None else self.ticket.form
        if form is not None:
            self._ignored = list(form.ignored)  # what the template lacks is known by now, or later
        super()._say_ignored(status_code)  # type: ignore[misc]

    def sign_of_life(self, done: int, total: int) -> str:
        comment = str(super().sign_of_life(done, total))  # type: ignore[misc]
        if self._answer is None:
            return comment
        return as_bytes([*self._start(Usage()), *self._answer.sign()]).decode() or comment

    def last_words(self, error: Exception) -> str:
        if self._answer is None:
            return str(super().last_words(error))  # type: ignore[misc]
        begun = self._start(Usage())
        return as_bytes([*begun, *self._answer.fail(refusal_of(error, 500))]).decode()


def _reader(asked: Asked, ticket: Ticket, context: Any) -> OutputReader:
    return OutputReader(
        context.text_sm,
        initial=context.initial_state,
        parse=context.tool_parser if asked.may_call else None,
        tools=asked.tools,
        stop_words={word: ticket.stop_tokens.get(word, ()) for word in asked.stop_words},
    )


def usage_of(
    ticket: Ticket, output: int = 0, thought: int = 0, marks: Sequence[Mark] = ()
) -> Usage:
    """What a request used, as far as its ticket knows by now.

    Args:
        ticket: Of the request.
        output: Tokens of its answer so far.
        thought: Those of them that were thoughts.
        marks: Of the request.
    """
    total = 0 if ticket.prompt is None else len(ticket.prompt.tokens)
    read = 0 if ticket.fetch is None else ticket.fetch.num_tokens
    written = ticket.written_tokens
    return Usage(
        input=total - read - written,
        read=read,
        written=written,
        output=output,
        reasoning=thought,
        kept_s=max((mark.ttl_s for mark in marks), default=0),
    )
