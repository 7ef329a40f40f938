"""Signs of life: a streamed answer shows that it is coming, whatever it waits for.

Upstream sends the headers of a stream once the request has left the queue. A client that sees
nothing until then gives up during another model's load or another request's prefill. So headers
go out early, with comments after them; what they could not tell yet is a comment later on, and
what goes wrong is an event.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

from persist_cache.server.guard import OUTCOME_HEADER
from persist_cache.server.protocols.openai import error_object, refusal_of
from persist_cache.server.recent.records import Outcome, State
from persist_cache.server.recent.ring import Ring
from persist_cache.server.stabilizing import chosen_by
from persist_cache.server.ticket import Ticket, cache_header
from persist_cache.server.told import line_of
from persist_cache.server.validation import RefusedError

log = logging.getLogger(__name__)

SIGN_S = 0.2
"""How often a sign of life may be due."""
_FIRST_S = 0.6
"""After which a stream begins, whatever it waits for."""
_PAUSE_S = 1.0
"""Between two signs of life."""


class Streaming(BaseHTTPRequestHandler):
    """To be mixed in before upstream's handler, which sets `stream` and writes the events.

    A subclass sets `ticket` for the time of a request.
    """

    response_generator: Any
    stream: bool
    ticket: Ticket | None = None
    _remembered = ""
    """The request's id among the latest ones."""
    _is_counted = False
    """It is a client's request, of which numbers are kept in any case."""
    _has_failed = False
    _has_begun = False
    _headers_follow = True
    _signed = 0.0

    def begin(self, ticket: Ticket, response_id: str = "") -> None:
        """Begin to answer a request, which may be one of many on its connection.

        Args:
            ticket: Of the request.
            response_id: What its protocol calls the answer; "" for what is not remembered.

        Raises:
            RefusedError: It asks for repairs that there are not.
        """
        ticket.stabilize = chosen_by(self.headers, self.response_generator)
        self.ticket = ticket
        self._has_failed, self._remembered = False, ""
        self._is_counted = bool(response_id) and not ticket.keeps
        if self._is_counted and not ticket.privacy.no_store:
            self._remembered = self.recent.begin(
                ticket,
                response_id=response_id,
                path=self.path,
                client=self.headers.get("User-Agent"),
            )
        self._has_begun, self._headers_follow, self._signed = False, True, 0.0
        ticket.has_left, ticket.has_begun = self.has_left, self.has_begun
        if self.stream:
            ticket.sign = self.sign

    def conclude(self) -> None:
        """Let go of the request, whose answer is over: while an error passes, because of that."""
        error = sys.exception()
        is_left = isinstance(error, ConnectionError)
        has_failed = error is not None or self._has_failed
        ticket, self.ticket = self.ticket, None
        state: State = "left" if is_left else "failed" if has_failed else "done"
        if ticket is not None:
            if self._is_counted:
                outcome = Outcome.of(ticket, state)
                log.info("%s", line_of(self.path, outcome))
                if not self._remembered:
                    self.recent.history.add(*outcome.counted)
                del outcome
            self.response_generator.forget(ticket)
        if self._remembered:
            self.recent.end(self._remembered, state)

    @property
    def recent(self) -> Ring:
        """What is remembered of the latest requests."""
        found: Ring = self.response_generator.recent
        return found

    def has_begun(self) -> bool:
        """Whether the headers of a stream are out, so that what goes wrong is an event."""
        return self._has_begun

    def sign(self) -> None:
        """Show that the answer is coming.

        Raises:
            ConnectionError: The client is gone.
        """
        ticket, now = self.ticket, time.monotonic()
        if ticket is None or now < max(ticket.times.arrived + _FIRST_S, self._signed + _PAUSE_S):
            return
        if not self._has_begun:
            self._set_stream_headers(200)
            self.end_headers()
        self._signed = now
        self._write(self.sign_of_life(*ticket.computed))

    def sign_of_life(self, done: int, total: int) -> str:
        """What shows that an answer is coming, of whose prompt so much is computed."""
        return f": keepalive {done}/{total}\n\n"

    def say_error(self, error: Exception) -> None:
        """Say in a stream that has begun, and in the log, what went wrong; nothing follows it."""
        # That the server stops, for instance, is no failure of it.
        level = logging.INFO if isinstance(error, RefusedError) else logging.ERROR
        log.log(level, "a request ended in its stream: %s", type(error).__name__)
        log.debug("why", exc_info=error)
        self.close_connection = self._has_failed = True
        self._write(self.last_words(error))

    def last_words(self, error: Exception) -> str:
        """What a stream says of an error."""
        return f"data: {json.dumps(error_object(refusal_of(error, 500)))}\n\n"

    def has_left(self) -> bool:
        """Whether the client has closed its connection; any thread may ask."""
        try:
            peeked = self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return False
        except (OSError, ValueError):
            return True
        return not peeked

    def _set_completion_headers(self, status_code: int = 200) -> None:
        super()._set_completion_headers(status_code)  # type: ignore[misc]
        self._say_outcome(status_code)

    def _set_stream_headers(self, status_code: int = 200) -> None:
        if not self._has_begun:
            self._has_begun = True
            super()._set_stream_headers(status_code)  # type: ignore[misc]
            self._say_outcome(status_code)
            return
        self._headers_follow = False
        if (said := self._outcome()) is not None:
            self._write(f": {OUTCOME_HEADER}: {said}\n\n")

    def end_headers(self) -> None:
        if self._headers_follow:
            super().end_headers()
        self._headers_follow = True

    def _say_outcome(self, status_code: int) -> None:
        said = self._outcome()
        if status_code == 200 and said is not None:
            self.send_header(OUTCOME_HEADER, said)

    def _outcome(self) -> str | None:
        if self.ticket is None or self.ticket.fetch is None:
            return None
        return cache_header(self.ticket.fetch, self.ticket.repaired)

    def _write(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()
