"""The latest requests of a server, for as many bytes as it is given.

What a request has in common with earlier ones is kept once (`chunks.py`); when there is no room the
oldest request goes. Nothing of it is ever written to disk, or to a log. It is filled by a thread of
its own, after the answer.
"""

from __future__ import annotations

import heapq
import logging
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from persist_cache.server.recent.chunks import (
    CHUNK_TOKENS,
    Chunked,
    Chunks,
    cut_body,
    cut_tokens,
    joined,
    shared_chunks,
    shared_tokens,
    tokens_in,
)
from persist_cache.server.recent.records import About, Outcome, Parted, Record, State
from persist_cache.server.ticket import Ticket
from persist_cache.server.validation import RefusedError, decode_object
from persist_cache.stability.causes.cause import Cause, Parting, cause_of
from persist_cache.stability.causes.kinds import Kind
from persist_cache.stability.causes.reading import Reading, read_body

log = logging.getLogger(__name__)

MAX_BYTES = 32 << 20
MAX_REQUESTS = 1_000
_MAX_BODY = 4 << 20
"""A larger body, of images mostly, would push out all others; it is not kept."""
_MAX_WAITING = 16
_RECORD_BYTES = 4 << 10
"""What a request takes beside its pieces: its values and the texts of its cause."""
_TEXT_TOKENS = 24
_TOKEN_BYTES = 4
"""Of a body, for each token, about."""
_LEAST_SHARE = 8
_OWN_BYTES = 256
"""A request of the same client is as like as one that has so much more in common."""
_COMPARED = 32
_FEW_TOKENS = 32
"""So much less than is shared is not worth a word: memory is a little behind the disk."""

Decode = Callable[[Hashable, Sequence[int]], str]
Seconds = Callable[[Hashable, int], float]


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as others are compared with it.

    Attributes:
        about: What it says of itself.
        outcome: With its tokens.
        body: As it was read.
    """

    about: About
    outcome: Outcome
    body: bytes

    def read(self) -> Reading | None:
        """What it asks for; None where its body is not kept."""
        if (body := _decoded(self.body)) is None:
            return None
        model = self.outcome.model
        names = model if isinstance(model, tuple) else (model,)
        named = " + ".join(str(one) for one in names if one)
        return read_body(body, model=named, repaired=self.outcome.repaired)


@dataclass(slots=True)
class _Underway:
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
        self._decode = decode
        self._seconds = seconds
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
            one.outcome = Outcome.of(one.ticket, state)
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

    def close(self) -> None:
        """Forget everything, and let go of who waits."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._underway.clear()
            self._changed.notify_all()

    # ---- who asks ------------------------------------------------------------------------------

    def latest(self, limit: int, after: int = 0) -> list[Record]:
        """The latest requests that are over, the newest first.

        Args:
            limit: So many at most.
            after: Only those with a larger number.
        """
        with self._changed:
            found: list[Record] = []
            for record in reversed(self._records.values()):
                if record.number <= after or len(found) >= limit:
                    break
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
        mine = Seen(earlier.about, Outcome.of(ticket), ticket.body)
        position = _shared(earlier.outcome.tokens, mine.outcome.tokens)
        return earlier, mine, self._parting(earlier, mine, position)

    def _seen(self, response_id: str) -> Seen | None:
        with self._changed:
            id = self._by_response.get(response_id, "")
            underway, record = self._underway.get(id), self._records.get(id)
        if underway is not None:
            return underway.seen()
        return None if record is None else self._reread(record)

    def _reread(self, record: Record) -> Seen:
        tokens = tokens_in(record.tokens)
        outcome = replace(record.outcome, tokens=tokens)
        return Seen(record.about, outcome, joined(record.body))

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
        parted = self._parted(replace(seen, body=raw), body, tokens)
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

    # ---- why -----------------------------------------------------------------------------------

    def _parted(self, seen: Seen, body: Chunked, tokens: Chunked) -> Parted | None:
        """From which earlier request one parts, and why."""
        outcome = seen.outcome
        if outcome.fetch is None or not tokens:
            return None
        with self._changed:
            known = list(self._records.values())
        earlier, shared, alike = _likest(known, seen, body, tokens)
        if earlier is None:
            return None
        least = _TOKEN_BYTES * len(outcome.tokens) // _LEAST_SHARE
        if earlier.about.client != seen.about.client and alike < least:
            return None  # another client's, which happens to begin with the same words
        cause = self._cause(earlier, seen, shared)
        lost_s = None
        if cause is not None:
            lost_s = self._seconds(outcome.model, cause.lost_tokens) or None
        return Parted(earlier.about.id, earlier.about.response_id, shared, cause, lost_s)

    def _cause(self, earlier: Record, seen: Seen, shared: int) -> Cause | None:
        outcome, total = seen.outcome, len(seen.outcome.tokens)
        found = 0 if outcome.fetch is None else outcome.fetch.num_tokens
        if found > shared + _FEW_TOKENS:
            return None  # what it was found by came before all that is remembered
        whole = min(earlier.num_tokens, total - 1)
        is_same_model = earlier.outcome.model == outcome.model
        cause: Cause | None = None
        if not is_same_model or shared < whole:
            other = self._reread(earlier)
            before, after = other.read(), seen.read()
            if before is None or after is None:
                return None
            cause = cause_of(before, after, self._parting(other, seen, shared))
        if cause is not None:
            # A cache that cannot be cut where prompts part loses what is in front of that, too.
            is_less = is_same_model and found < cause.position
            return replace(cause, lost_tokens=max(0, whole - found)) if is_less else cause
        if found + _FEW_TOKENS >= min(shared, total - 1):
            return None
        kind = Kind.GIVEN_UP if earlier.outcome.state == "left" else Kind.NOT_KEPT
        return Cause(kind, "", "", "", None, found, whole - found)

    def _parting(self, old: Seen, new: Seen, position: int) -> Parting:
        sides = [list(one.outcome.tokens) for one in (old, new)]
        before = sides[1][max(0, position - _TEXT_TOKENS) : position]
        end = position + _TEXT_TOKENS
        model = new.outcome.model
        head = self._decode(model, before) if before else ""
        wholes = [self._decode(model, before + side[position:end]) for side in sides]
        return Parting(
            position,
            len(sides[0]),
            len(sides[1]),
            head,
            *(one[len(head) :] if one.startswith(head) else one for one in wholes),
        )


def _likest(
    known: Sequence[Record], seen: Seen, body: Chunked, tokens: Chunked
) -> tuple[Record | None, int, int]:
    """The earlier request that has most in common with one, and how much.

    What a body has in common counts as well as the prompt's beginning: prompts that part at their
    first line may have all the rest in common.

    Returns:
        The request, or None; the tokens that both begin with; and about how many bytes of prompt
        and body are the same.
    """
    mine = {id(chunk): chunk.size for chunk in body}
    model, client = seen.outcome.model, seen.about.client
    ranks = []
    for record in known:
        if not record.tokens:
            continue
        alike = sum(mine.get(one, 0) for one in {id(chunk) for chunk in record.body})
        alike += _OWN_BYTES * (record.about.client == client)
        is_same = record.outcome.model == model
        pieces = shared_chunks(record.tokens, tokens) if is_same else 0
        ranks.append((_TOKEN_BYTES * CHUNK_TOKENS * pieces + alike, record.number, record))
    if not ranks:
        return None, 0, 0
    # Within a piece tokens are compared where that can make a difference.
    least = max(ranks)[0] - _TOKEN_BYTES * CHUNK_TOKENS
    nearest = heapq.nlargest(_COMPARED, (one for one in ranks if one[0] >= least))
    best: tuple[tuple[int, int], Record, int] | None = None
    for rank, number, record in nearest:
        is_same = record.outcome.model == model
        shared = shared_tokens(record.tokens, tokens) if is_same else 0
        exact = rank + _TOKEN_BYTES * (shared % CHUNK_TOKENS), number
        if best is None or exact > best[0]:
            best = exact, record, shared
    assert best is not None, "there was one"
    return best[1], best[2], best[0][0]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    places = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in places if a != b), min(len(one), len(other)))


def _decoded(raw: bytes) -> dict[str, Any] | None:
    """A body, or None when it is not kept."""
    try:
        return decode_object(raw) if raw else None
    except RefusedError:
        return None


def _named(raw: bytes) -> str:
    """The model that a body names."""
    named = (_decoded(raw) or {}).get("model")
    return "".join(one for one in str(named or "") if one.isprintable())[:200]
