"""What the remote tells: the values that calls return, and the state that people look at."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

from msgspec import Struct

COUNTERS: Mapping[str, str] = MappingProxyType(
    {
        "requests": "Requests to the remote.",
        "requests_get": "Requests that read an object.",
        "requests_create": "Requests that create an object.",
        "received_bytes": "Bytes of objects received.",
        "sent_bytes": "Bytes of objects sent.",
        "lookups": "Prompts that the remote was asked for.",
        "hits": "Prompts of which the remote had more than was known here.",
        "hit_tokens": "Tokens that need not be computed because the remote had them.",
        "saved_ms": "Milliseconds of prefill that hits saved, less what they took; estimated.",
        "pulled": "Entries, or beginnings of entries, that were pulled into the store.",
        "misses": "Look-ups without a find, by reason.",
        "refused": "Objects that were not what was published, by kind.",
        "errors": "Requests that failed, by kind.",
        "published": "Entries published.",
        "published_tokens": "Tokens of entries published.",
        "budget_refused": "Publications that the bytes of a day did not allow.",
        "probes": "Attempts to find out whether a remote that failed is back.",
    }
)
"""What is counted. Of `misses`, `refused` and `errors` the full name has a reason, as in
`misses:not_found`."""


class Why(enum.Enum):
    """Why a look-up ended as it did; the values are labels of counters.

    `BROUGHT` and `SHARED` are hits, the others are misses.
    """

    BROUGHT = "brought"
    """Pulled into the store by this call."""
    SHARED = "shared"
    """Pulled by another request of this process, for which this call waited."""
    ENOUGH_KNOWN = "enough_known"
    """What is known here leaves less than 256 tokens to be found; nothing was asked."""
    NOT_ALLOWED = "not_allowed"
    """Requests with a salt are never looked up; nothing was asked."""
    BREAKER_OPEN = "breaker_open"
    """The remote failed a moment ago; nothing was asked."""
    CLOSED = "closed"
    """This process is about to end; nothing was asked."""
    NOT_FOUND = "not_found"
    """The remote has no more of this prompt."""
    NOT_WORTH_IT = "not_worth_it"
    """Computing the tokens is estimated to take less time than fetching them."""
    TOO_SLOW = "too_slow"
    """Fetching turned out to take longer than computing, and was given up."""
    GONE = "gone"
    """A blob is not there any more, perhaps by a lifecycle rule."""
    REFUSED = "refused"
    """What is there is not what a holder of the secret published; nothing was stored."""
    NO_ROOM = "no_room"
    """The local store has no room for it."""
    TIMED_OUT = "timed_out"
    FAILED = "failed"
    """The remote, or the local disk, gave an error; `RemoteStatus.last_error` says which."""


class Brought(Struct, frozen=True):
    """What a look-up brought into the store.

    Attributes:
        num_tokens: Leading tokens of the prompt that the store has now and that the remote gave;
            0 for a miss. The caller's usual look-up finds them.
        nbytes: Bytes received for it, manifests included.
        seconds: What the call took.
        why: How it ended.
    """

    num_tokens: int
    nbytes: int
    seconds: float
    why: Why

    @property
    def is_hit(self) -> bool:
        return self.why in (Why.BROUGHT, Why.SHARED)


class PublishOutcome(enum.Enum):
    """What became of an entry that was to be published."""

    SENT = "sent"
    THERE_ALREADY = "there_already"
    CLAIMED = "claimed"
    """Another process is publishing it at this moment."""


class Published(Struct, frozen=True):
    """What publishing one entry did.

    Attributes:
        entry: Its id.
        outcome: What became of it.
        num_tokens: Its length.
        nbytes: Bytes sent.
        requests: Requests made.
        blobs: Blobs sent; those that were there already are not counted.
    """

    entry: str
    outcome: PublishOutcome
    num_tokens: int
    nbytes: int
    requests: int
    blobs: int


class Probe(Struct, frozen=True):
    """What `Remote.probe` found.

    Attributes:
        reachable: It answered.
        latency_s: Of the first answer, 0 without one.
        may_read: Objects can be read.
        may_create: Objects can be created; None when that was not tried, because nothing is to be
            published.
        create_is_exclusive: Of several that create one name at once exactly one succeeds; None
            when that was not tried. Where it is False, use another server: publishers would
            overwrite each other.
        message: What is wrong, in a sentence; "" for nothing.
    """

    reachable: bool
    latency_s: float
    may_read: bool
    may_create: bool | None
    create_is_exclusive: bool | None
    message: str


class RemoteStatus(Struct, frozen=True):
    """The remote as this process sees it.

    Attributes:
        url: Where it is, without credentials.
        breaker: `closed` (in use), `open` (left alone after failures) or `half-open` (being
            probed).
        retry_in_s: Seconds until the next probe while the breaker is not closed, else 0.
        last_error: The last failure in a sentence, "" for none yet.
        bytes_per_s: Measured speed of pulls, 0 before the first.
        publishes: Whether this process may publish.
        queued: Entries that wait to be published.
        counters: Of this process since it opened the remote, by the names of `COUNTERS`; the store
            has the totals of all processes under `remote_` and the same names.
    """

    url: str
    breaker: str
    retry_in_s: float
    last_error: str
    bytes_per_s: float
    publishes: bool
    queued: int
    counters: Mapping[str, int]
