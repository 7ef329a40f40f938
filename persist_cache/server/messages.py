"""Anthropic's Messages over HTTP: `/v1/messages` and `/v1/messages/count_tokens`.

What a body means and what an answer looks like is pure (`server/protocols/`); here a request is
queued as a chat's is, and what the model says is handed on as it comes.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any

from persist_cache.server import answers
from persist_cache.server.form import Form
from persist_cache.server.guard import IGNORED_HEADER, OUTCOME_HEADER
from persist_cache.server.protocols.anthropic_answer import (
    Answer,
    Event,
    Usage,
    as_bytes,
    error_object,
    failed,
    ping,
)
from persist_cache.server.protocols.anthropic_messages import Mark
from persist_cache.server.protocols.anthropic_request import MessagesRequest, read_messages
from persist_cache.server.protocols.openai import refusal_of
from persist_cache.server.protocols.output import Call, Finish, OutputReader
from persist_cache.server.protocols.recognized import MESSAGES
from persist_cache.server.recent.diagnosis import of_messages, previous_message
from persist_cache.server.ticket import Part, Ticket
from persist_cache.server.validation import RefusedError, decode_object

log = logging.getLogger(__name__)

MESSAGES_PATH = "/v1/messages"
COUNT_PATH = f"{MESSAGES_PATH}/count_tokens"
PATHS = (MESSAGES_PATH, COUNT_PATH)


class Messages(BaseHTTPRequestHandler):
    """To be mixed in before `Streaming` and `Front`, whose methods it uses."""

    response_generator: Any
    stream: bool
    ticket: Ticket | None
    keeps: Part
    body_as_read: bytes
    _ignored: list[str]
    _answer: Answer | None = None
    _started = False
    _is_told = False

    def _checked_post(self) -> None:
        if self.path not in PATHS:
            super()._checked_post()  # type: ignore[misc]
            return
        self._answer_body(self._read_body())  # type: ignore[attr-defined]

    def _post_own(self, body: dict[str, Any], protocol: str) -> None:
        if protocol != MESSAGES:
            super()._post_own(body, protocol)  # type: ignore[misc]
            return
        self.path = MESSAGES_PATH
        self._answer_body(json.dumps(body).encode())

    def _answer_body(self, raw: bytes) -> None:
        self.body_as_read = raw
        counts = self.path == COUNT_PATH
        body = decode_object(self.body_as_read)
        request = read_messages(body, counting=counts)
        is_asked, previous = previous_message(body)
        self._tell_ignored(list(request.ignored))  # type: ignore[attr-defined]
        generator = self.response_generator
        form = Form(request, generator.templates, generator.cli_args.chat_template_args)
        ticket = Ticket(self.body_as_read, keeps=self.keeps, form=form)
        self.stream = request.stream and not counts
        diagnose = functools.partial(of_messages, generator.recent, ticket, previous)
        self._answer = Answer(request.model, diagnose=diagnose if is_asked else None)
        self._started = self._is_told = False
        self.begin(ticket, "" if counts else self._answer.id)  # type: ignore[attr-defined]
        try:
            with generator.in_flight():
                if counts:
                    self._count(request, ticket, form)
                else:
                    self._answer_messages(request, ticket, form)
        finally:
            self._answer = None
            self.conclude()  # type: ignore[attr-defined]

    def _count(self, request: MessagesRequest, ticket: Ticket, form: Form) -> None:
        try:
            counted = self.response_generator.count_tokens(request, ticket)
        except ConnectionError:
            raise
        except Exception as error:
            raise refusal_of(error, 500) from error
        self._say_whole({"input_tokens": counted}, form)

    def _answer_messages(self, request: MessagesRequest, ticket: Ticket, form: Form) -> None:
        answer = self._answer
        assert answer is not None
        try:
            context, pieces = self.response_generator.answer(request, ticket)
            self.response_generator.cache.count_repairs(form.repaired)
            try:
                reader = self._reader(request, ticket, context)
                output = self._say(request, ticket, form, reader, pieces)
            finally:
                context.stop()
            usage = usage_of(ticket, output, request.marks)
            rest = answer.say(reader.close())
            finish = reader.finish or Finish("end")
            if request.max_tokens == 0:
                finish = Finish("length")
            elif finish.reason == "length" and output < request.max_tokens:
                finish = Finish("context")
            if self.stream:
                self._say_events([*rest, *answer.end(finish, usage)], usage, form)
            else:
                self._say_whole(answer.message(finish, usage), form)
        except ConnectionError:
            raise
        except Exception as error:
            if not self.has_begun():  # type: ignore[attr-defined]
                raise refusal_of(error, 500) from error
            log.error("a request failed in its stream: %s", type(error).__name__)
            log.debug("the failure", exc_info=True)
            self.say_error(error)  # type: ignore[attr-defined]

    def _reader(self, request: MessagesRequest, ticket: Ticket, context: Any) -> OutputReader:
        return OutputReader(
            context.text_sm,
            initial=context.initial_state,
            parse=context.tool_parser if request.may_call else None,
            tools=request.tools,
            stop_words={word: ticket.stop_tokens.get(word, ()) for word in request.stop_words},
        )

    def _say(
        self,
        request: MessagesRequest,
        ticket: Ticket,
        form: Form,
        reader: OutputReader,
        pieces: Iterator[Any],
    ) -> int:
        """Hand on what the model says; returns how many tokens that were."""
        answer, output = self._answer, 0
        assert answer is not None
        for piece in pieces:
            output += 1
            parts = reader.feed(piece.text, piece.token, piece.finish_reason)
            if request.one_call:
                calls = [at for at, part in enumerate(parts) if isinstance(part, Call)]
                parts = parts[: calls[0] + 1] if calls else parts
            events = answer.say(parts)
            if self.stream and (events or output == 1):
                self._say_events(events, usage_of(ticket, marks=request.marks), form)
            elif self.stream:
                ticket.sign()  # a long tool call is said when it is complete
            if request.one_call and answer.calls:
                reader.close()  # what it holds is behind the call
                break
            if reader.finish is not None and piece.finish_reason is None:
                break  # mlx-lm recognizes stop words by their tokens alone, and would go on
        return output

    # ---- on the wire -------------------------------------------------------------------------

    def _say_events(self, events: list[Event], usage: Usage, form: Form) -> None:
        if not self.has_begun() or not self._is_told:  # type: ignore[attr-defined]
            self._is_told, before = True, list(self._ignored)
            begun = self.has_begun()  # type: ignore[attr-defined]
            self._set_stream_headers(200)  # type: ignore[attr-defined]
            self.end_headers()
            if begun and form.ignored and list(form.ignored) != before:
                said = f": {IGNORED_HEADER}: {', '.join(form.ignored)}\n\n"
                self._write(said)  # type: ignore[attr-defined]
        self._write((self._start(usage) + as_bytes(events)).decode())  # type: ignore[attr-defined]

    def _start(self, usage: Usage | None = None) -> bytes:
        """The first event of the stream, unless it was sent."""
        if self._started or self._answer is None:
            return b""
        self._started = True
        return as_bytes(self._answer.start(usage))

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
        if self._answer is None:
            return str(super().sign_of_life(done, total))  # type: ignore[misc]
        return (self._start() + as_bytes([ping()])).decode()

    def last_words(self, error: Exception) -> str:
        if self._answer is None:
            return str(super().last_words(error))  # type: ignore[misc]
        return as_bytes([failed(refusal_of(error, 500))]).decode()

    def _no_such_method(self) -> RefusedError:
        if self.path not in PATHS:
            return super()._no_such_method()  # type: ignore[misc,no-any-return]
        return RefusedError(405, "This path knows no such method.", {"Allow": "POST"})

    def _refuse(self, refusal: RefusedError) -> None:
        path = getattr(self, "path", "").partition("?")[0]
        if path not in PATHS and not path.startswith(f"{MESSAGES_PATH}/"):
            super()._refuse(refusal)  # type: ignore[misc]
            return
        self._send(  # type: ignore[attr-defined]
            answers.json_response(error_object(refusal), refusal.status, refusal.headers)
        )


def usage_of(ticket: Ticket, output: int = 0, marks: Sequence[Mark] = ()) -> Usage:
    """What a request used, as far as its ticket knows by now.

    Args:
        ticket: Of the request.
        output: Tokens of its answer so far.
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
        kept_s=max((mark.ttl_s for mark in marks), default=0),
    )
