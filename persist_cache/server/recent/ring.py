"""The latest requests of a server, for as many bytes as it is given.

What a request has in common with earlier ones is kept once (`chunks.py`); when there is no room the
oldest request goes. Nothing of it is ever written to disk, or to a log. It is filled by a thread of
its own, after the answer.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from itertools import islice

from msgspec import Struct
from msgspec.structs import replace

from persist_cache.server.history.requests import RequestHistory
from persist_cache.server.recent.chunks import (
    Chunks,
    cut_body,
    cut_tokens,
    digests_of,
    shared_with,
)
from persist_cache.server.recent.comparing import Comparer, Decode, Seconds, Seen, decoded, reread
from persist_cache.server.recent.records import About, Outcome, Record, State
from persist_cache.server.ticket import Ticket
from persist_cache.stability.causes.cause import Parting

log = logging.getLogger(__name__)

MAX_BYTES = 32 << 20
MAX_REQUESTS = 2_000
_COMPARED = 1_000
"""With so many of the latest each request is compared."""
_LOOKED_AT = 300
"""So many are looked at for one that used an entry."""
_MAX_BODY = 4 << 20
"""A larger body, of images mostly, would push out all others; it is not kept."""
_MAX_WAITING = 16
_RECORD_BYTES = 4 << 10
"""What a request takes beside its pieces: its values and the texts of its cause."""


class _Underway(Struct):
    """A request that is answered, or waits to be recorded."""

    ticket: Ticket
    about: About
    outcome: Outcome | None = None

    def seen(self) -> Seen:
        return Seen(self.about, self.outcome or Outcome.of(self.ticket), self.ticket.body)


class Ring:
    """Remembers the latest requests.

    Thread safety: may be shared between threads. `_changed` guards what is known; `_chunks` is the
    recording thread's, and any thread may read a piece.

    Attributes:
        max_bytes: That it may take.
        history: Sums of all requests, also of those that are not remembered.
    """

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        *,
        decode: Decode = lambda model, tokens: "",
        seconds: Seconds = lambda model, tokens: 0.0,
    ) -> None:
        """Remember nothing yet.

        Args:
            max_bytes: That it may take.
            decode: Tokens as text, or "" when there is nothing at hand that knows.
            seconds: What computing so many tokens takes, 0 when nobody measured.
        """
        self.max_bytes = max_bytes
        self.history = RequestHistory()
        self._seconds = seconds
        self._comparer = Comparer(decode, seconds)
        self._changed = threading.Condition()
        self._chunks = Chunks()
        self._underway: dict[str, _Underway] = {}
        self._waiting: deque[_Underway] = deque()
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._by_response: dict[str, str] = {}
        self._number = 0
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self._chunks.nbytes + _RECORD_BYTES * len(self._records)

    # ---- the threads that answer ---------------------------------------------------------------

    def begin(self, ticket: Ticket, *, response_id: str, path: str, client: str | None) -> str:
        """Note that a request is answered now.

        Args:
            ticket: Of the request.
            response_id: What its protocol calls the answer.
            path: That it was sent to.
            client: Its `User-Agent`.

        Returns:
            Its id.
        """
        about = About.of(secrets.token_hex(6), response_id, path, client)
        with self._changed:
            self._underway[about.id] = _Underway(ticket, about)
            self._by_response[response_id] = about.id
        return about.id

    def end(self, id: str, state: State = "done") -> None:
        """Note that the answer to a request is over."""
        with self._changed:
            one = self._underway.get(id)
            if one is None or one.outcome is not None:
                return
            one.outcome = self._valued(Outcome.of(one.ticket, state))
            self.history.add(*one.outcome.counted)
            if self._is_closed or len(self._waiting) >= _MAX_WAITING:
                self._forget(one.about)  # requests come faster than they are recorded
                return
            self._waiting.append(one)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="persist-cache-recent", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def _valued(self, outcome: Outcome) -> Outcome:
        """An outcome with what the cache saved it, where that can be told."""
        fetch = outcome.fetch
        if fetch is None or not fetch.num_tokens:
            return outcome
        worth = fetch.prefill_s or self._seconds(outcome.model, fetch.num_tokens)
        return replace(outcome, saved_s=max(0.0, worth - fetch.seconds)) if worth else outcome

    def close(self) -> None:
        """Forget everything, and let go of who waits."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._underway.clear()
            self._changed.notify_all()

    # ---- who asks ------------------------------------------------------------------------------

    def underway(self) -> list[tuple[About, Ticket]]:
        """The requests that are answered now, the oldest first."""
        with self._changed:
            return [(one.about, one.ticket) for one in self._underway.values() if not one.outcome]

    def latest(self, limit: int, after: int = 0, before: int | None = None) -> list[Record]:
        """The latest requests that are over, the newest first.

        Args:
            limit: So many at most.
            after: Only those with a larger number.
            before: Only those with a smaller one.
        """
        with self._changed:
            found: list[Record] = []
            for record in reversed(self._records.values()):
                if record.number <= after or len(found) >= limit:
                    break
                if before is None or record.number < before:
                    found.append(record)
            return found

    def wait(self, after: int, timeout_s: float) -> bool:
        """Wait for a request with a larger number; False when there is none in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._number > after or self._is_closed, timeout_s)
            return self._number > after

    def settle(self, id: str = "", timeout_s: float = 2.0) -> bool:
        """Wait until all requests whose answers are complete are recorded.

        Args:
            id: Of a request, or of its answer, that is waited for, whatever is known of its end.
            timeout_s: At most.

        Returns:
            False when that took too long.
        """

        def is_settled() -> bool:
            wanted = self._by_response.get(id, id)
            return not any(
                one.outcome is not None or one.ticket.times.ended or one.about.id == wanted
                for one in self._underway.values()
            )

        with self._changed:
            return self._changed.wait_for(is_settled, timeout_s)

    def record(self, id: str) -> Record | None:
        """The request with that id, or with that id of its answer."""
        with self._changed:
            return self._records.get(self._by_response.get(id, id))

    def latest_with(
        self, tokens: Sequence[int], start: int, is_of_model: Callable[[Hashable], bool]
    ) -> Record | None:
        """The latest request whose prompt has these tokens, or ends behind `start` among them.

        Args:
            tokens: A prompt, perhaps with its answer.
            start: Where its own part begins.
            is_of_model: Whether a model is the one that the tokens are of.
        """
        with self._changed:
            latest = list(islice(reversed(self._records.values()), _LOOKED_AT))
        digests = digests_of(tokens)
        for record in latest:
            shared = shared_with(record.tokens, tokens, digests)
            whole = shared == len(tokens) or (shared == record.num_tokens and shared > start)
            if whole and is_of_model(record.outcome.model):
                return record
        return None

    def compare(self, ticket: Ticket, response_id: str) -> tuple[Seen, Seen, Parting] | None:
        """What a request whose prompt is known has in common with an earlier one.

        Args:
            ticket: Of the request.
            response_id: Of the answer to the earlier one.

        Returns:
            The earlier one, this one, and where their prompts part; None when the earlier one is
            not known, or not any more.
        """
        earlier = self._seen(response_id)
        if earlier is None or ticket.prompt is None:
            return None
        if earlier.outcome.salt != ticket.privacy.salt:
            return None
        mine = Seen(earlier.about, Outcome.of(ticket), ticket.body)
        return earlier, mine, self._comparer.parting(earlier, mine)

    def _seen(self, response_id: str) -> Seen | None:
        with self._changed:
            id = self._by_response.get(response_id, "")
            underway, record = self._underway.get(id), self._records.get(id)
        if underway is not None:
            return underway.seen()
        return None if record is None else reread(record)

    # ---- the recording thread ------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                one = self._waiting.popleft()
            try:
                self._record(one)
            except Exception as error:
                # The message may quote a prompt.
                log.error("a request could not be remembered: %s", type(error).__name__)
                log.debug("the failure", exc_info=True)
                with self._changed:
                    self._forget(one.about)
            del one  # which would be kept until the next one comes

    def _record(self, one: _Underway) -> None:
        seen = one.seen()
        raw = seen.body if len(seen.body) <= _MAX_BODY else b""
        body = self._chunks.add(cut_body(raw))
        tokens = self._chunks.add(cut_tokens(seen.outcome.tokens))
        with self._changed:
            salt = seen.outcome.salt
            alike = (one for one in reversed(self._records.values()) if one.outcome.salt == salt)
            known = list(islice(alike, _COMPARED))
        parted = self._comparer.parted(known, replace(seen, body=raw), body, tokens)
        with self._changed:
            if one.about.id not in self._underway:  # it was closed meanwhile
                return
            self._number += 1
            self._records[one.about.id] = Record(
                number=self._number,
                about=one.about,
                outcome=replace(seen.outcome, tokens=()),
                named=_named(raw),
                num_tokens=len(seen.outcome.tokens),
                parted=parted,
                body=body,
                tokens=tokens,
            )
            del self._underway[one.about.id]
            self._make_room()
            self._changed.notify_all()

    def _make_room(self) -> None:
        while self._records and (self.nbytes > self.max_bytes or len(self._records) > MAX_REQUESTS):
            _, oldest = self._records.popitem(last=False)
            self._forget(oldest.about)
            self._chunks.drop(oldest.body)
            self._chunks.drop(oldest.tokens)

    def _forget(self, about: About) -> None:
        self._underway.pop(about.id, None)
        if self._by_response.get(about.response_id) == about.id:
            del self._by_response[about.response_id]


def _named(raw: bytes) -> str:
    """The model that a body names."""
    named = (decoded(raw) or {}).get("model")
    return "".join(one for one in str(named or "") if one.isprintable())[:200]
