"""From which earlier request one parts, and why."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from persist_cache.server.recent.chunks import (
    CHUNK_TOKENS,
    Chunked,
    joined,
    shared_chunks,
    shared_tokens,
    tokens_in,
)
from persist_cache.server.recent.records import About, Outcome, Parted, Record
from persist_cache.server.validation import RefusedError, decode_object
from persist_cache.stability.causes.cause import Cause, Parting, cause_of
from persist_cache.stability.causes.kinds import Kind
from persist_cache.stability.causes.reading import Reading, read_body

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


class Seen(Struct, frozen=True):
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
        """What it asks for; None where its body is not kept, or too deep."""
        if (body := decoded(self.body)) is None:
            return None
        model = self.outcome.model
        names = model if isinstance(model, tuple) else (model,)
        named = " + ".join(str(one) for one in names if one)
        try:
            return read_body(body, model=named, repaired=self.outcome.repaired)
        except RecursionError:
            return None  # it is nested so deeply that only its prompt can be compared


def reread(record: Record) -> Seen:
    """A request that is over, with its tokens and its body."""
    outcome = replace(record.outcome, tokens=tokens_in(record.tokens))
    return Seen(record.about, outcome, joined(record.body))


class Comparer:
    """Compares requests. Thread safety: any thread may ask."""

    def __init__(self, decode: Decode, seconds: Seconds) -> None:
        """Compare with these helps.

        Args:
            decode: Tokens as text, or "" when there is nothing at hand that knows.
            seconds: What computing so many tokens takes, 0 when nobody measured.
        """
        self._decode = decode
        self._seconds = seconds

    def parted(
        self, known: Sequence[Record], seen: Seen, body: Chunked, tokens: Chunked
    ) -> Parted | None:
        """From which earlier request one parts, and why."""
        outcome = seen.outcome
        if outcome.fetch is None or not tokens:
            return None
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
            other = reread(earlier)
            before, after = other.read(), seen.read()
            if before is None or after is None:
                return None
            cause = cause_of(before, after, self.parting(other, seen))
        if cause is not None:
            # A cache that cannot be cut where prompts part loses what is in front of that, too.
            is_less = is_same_model and found < cause.position
            return replace(cause, lost_tokens=max(0, whole - found)) if is_less else cause
        if found + _FEW_TOKENS >= min(shared, total - 1):
            return None
        kind = Kind.GIVEN_UP if earlier.outcome.state == "left" else Kind.NOT_KEPT
        return Cause(kind, "", "", "", None, found, whole - found)

    def parting(self, old: Seen, new: Seen) -> Parting:
        """Where the prompts of two requests part."""
        position = _shared(old.outcome.tokens, new.outcome.tokens)
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


def decoded(raw: bytes) -> dict[str, Any] | None:
    """A body, or None when it is not kept."""
    try:
        return decode_object(raw) if raw else None
    except RefusedError:
        return None
