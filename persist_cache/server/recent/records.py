"""One request as it is remembered: who asked, what was found, why it is no more, and its text."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Literal

from msgspec import Struct, field

from persist_cache.cache.stats import Fetch, FromRemote
from persist_cache.server.recent.chunks import Chunked
from persist_cache.server.ticket import Ticket
from persist_cache.stability.causes.cause import Cause

State = Literal["done", "failed", "left"]
_CLIENT = 120


class About(Struct, frozen=True):
    """What a request says of itself, beside its body.

    Attributes:
        id: Ours.
        response_id: What its protocol calls the answer.
        path: That it was sent to.
        client: Its `User-Agent`, as one line.
        at: When it came, in UTC seconds.
    """

    id: str
    response_id: str
    path: str
    client: str = ""
    at: float = field(default_factory=time.time)

    @classmethod
    def of(cls, id: str, response_id: str, path: str, user_agent: str | None) -> About:
        """With a client's name that is harmless in a terminal."""
        client = "".join(one for one in user_agent or "" if one.isprintable())[:_CLIENT].strip()
        return cls(id, response_id, path, client)


class Outcome(Struct, frozen=True):
    """What came of a request.

    Attributes:
        state: It was answered, it failed, or its client left.
        tokens: Its prompt; empty when it did not become one.
        model: mlx-lm's key of the model that computed it, or None.
        fetch: What the first look found, or None.
        written_tokens: Tokens of its prompt that went to the disk.
        output_tokens: Of its answer.
        first_token_s: Seconds from its arrival to the first token, or None.
        total_s: Seconds that it took in all.
        repaired: Names of what was changed in it.
        salt: Digest of its salt: it is compared with requests of the same one alone.
        waited_s: Seconds until the cache was asked for it, or None: it was tokenized, and stood in
            the line.
        saved_s: Seconds that what was found saved, less what reading it took; None where nobody
            measured.
        remote: What a remote said of it, or None.
    """

    state: State
    tokens: Sequence[int]
    model: Hashable
    fetch: Fetch | None
    written_tokens: int = 0
    output_tokens: int = 0
    first_token_s: float | None = None
    total_s: float = 0.0
    repaired: tuple[str, ...] = ()
    salt: str = ""
    waited_s: float | None = None
    saved_s: float | None = None
    remote: FromRemote | None = None

    @classmethod
    def of(cls, ticket: Ticket, state: State = "done") -> Outcome:
        """What a ticket knows of it by now."""
        times, prompt = ticket.times, ticket.prompt
        first, looked = times.first_token, times.looked
        return cls(
            state=state,
            tokens=() if prompt is None else prompt.tokens,
            model=ticket.model_key,
            fetch=ticket.fetch,
            written_tokens=ticket.written_tokens,
            output_tokens=ticket.output_tokens,
            first_token_s=None if first is None else first - times.arrived,
            total_s=time.monotonic() - times.arrived,
            repaired=ticket.repaired,
            salt=ticket.privacy.salt,
            waited_s=None if looked is None else looked - times.arrived,
            remote=ticket.brought,
        )

    @property
    def reused_tokens(self) -> dict[str, int]:
        """Tokens that were not computed, by where they came from."""
        fetch = self.fetch
        return {} if fetch is None or not fetch.num_tokens else {fetch.source: fetch.num_tokens}

    @property
    def counted(self) -> tuple[State, int, dict[str, int], float | None]:
        """What sums take of it: state, tokens asked, tokens reused by source, seconds saved."""
        asked = 0 if self.fetch is None else len(self.tokens)
        return self.state, asked, self.reused_tokens, self.saved_s


class Parted(Struct, frozen=True):
    """From which earlier request one parts, and why.

    Attributes:
        id: Of the earlier request.
        response_id: Of its answer.
        shared_tokens: Tokens that both prompts begin with.
        cause: Why it is no more; None where the later one goes on from the end of the earlier one.
        lost_s: Seconds that computing what was lost takes; None where no speed was measured.
    """

    id: str
    response_id: str
    shared_tokens: int
    cause: Cause | None
    lost_s: float | None = None


class Record(Struct, frozen=True):
    """A request that is over.

    Attributes:
        number: Of the requests of this server.
        about: What it says of itself.
        outcome: What came of it, without the tokens.
        named: The model that it named, or "".
        num_tokens: Length of its prompt.
        parted: From which earlier one it parts; None when there is none like it.
        body: As it was read.
        tokens: Its prompt.
    """

    number: int
    about: About
    outcome: Outcome
    named: str
    num_tokens: int
    parted: Parted | None
    body: Chunked
    tokens: Chunked
