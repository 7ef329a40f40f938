"""What is told of a remote, as JSON: the same objects from commands and the admin API.

Members may be added, never renamed or removed.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import UNSET, Struct, UnsetType

from persist_cache.queries.schema import BroughtJson
from persist_cache.remote import Brought, Published, RemoteSettings, RemoteStatus


class SettingsJson(Struct, frozen=True, kw_only=True):
    """Which remote a store uses, and how.

    Attributes:
        url: Where it is.
        trust: `secret`, or `publisher`.
        secret_file: With the secret, or ""; never the secret itself.
        public_key: Of the publisher, or "".
        publish_plain: Whether prompts may be published, unencrypted.
        tiers: Which are, by themselves.
        publish_after: At which hit.
        budget_bytes_per_day: Most that is sent in a UTC day, or null.
    """

    url: str
    trust: str
    secret_file: str
    public_key: str
    publish_plain: bool
    tiers: tuple[str, ...]
    publish_after: int
    budget_bytes_per_day: int | None


class RemoteJson(Struct, frozen=True, kw_only=True):
    """A remote as a server sees it.

    Attributes:
        url: Where it is; "" where it could not be opened.
        breaker: `closed` while it is in use, `open` after failures, `half-open` while it is
            probed, `off` where it could not be opened.
        retry_in_s: Seconds until it is tried again.
        last_error: The last failure, or "".
        bytes_per_s: Measured speed of pulls, 0 before the first.
        publishes: Whether this server publishes.
        queued: Entries that wait for that.
        hits: Look-ups that it had something for.
        misses: Others, by reason.
        counters: All that is counted, since the server started.
    """

    url: str
    breaker: str
    retry_in_s: float
    last_error: str
    bytes_per_s: float
    publishes: bool
    queued: int
    hits: int
    misses: dict[str, int]
    counters: dict[str, int]


class PublishedJson(Struct, frozen=True, kw_only=True):
    """What publishing an entry did.

    Attributes:
        id: Of the entry.
        outcome: `sent`, `there_already`, `claimed` by another process, or `failed`.
        num_tokens: Its length.
        bytes: Sent.
        requests: Made.
        error: Why it failed, or "".
    """

    id: str
    outcome: str
    num_tokens: int
    bytes: int
    requests: int
    error: str = ""


def settings_json(settings: RemoteSettings) -> SettingsJson:
    """Which remote a store uses."""
    return SettingsJson(
        url=settings.url,
        trust=settings.trust,
        secret_file=settings.secret_file,
        public_key=settings.public_key,
        publish_plain=settings.publish_plain,
        tiers=settings.tiers,
        publish_after=settings.publish_after,
        budget_bytes_per_day=settings.budget_bytes_per_day,
    )


def remote_json(status: RemoteStatus | None, trouble: str) -> RemoteJson | None:
    """A remote as a server sees it; None where there is none.

    Args:
        status: Its state, if it is open.
        trouble: Why it could not be opened, or "".
    """
    if status is None:
        return _off(trouble) if trouble else None
    return RemoteJson(
        url=status.url,
        breaker=status.breaker,
        retry_in_s=status.retry_in_s,
        last_error=status.last_error,
        bytes_per_s=status.bytes_per_s,
        publishes=status.publishes,
        queued=status.queued,
        hits=status.counters.get("hits", 0),
        misses=by_reason(status.counters, "misses"),
        counters=dict(status.counters),
    )


def by_reason(counters: Mapping[str, int], name: str) -> dict[str, int]:
    """The counters of one name, such as `misses`, by their reasons."""
    return {
        one.removeprefix(f"{name}:"): count
        for one, count in counters.items()
        if one.startswith(f"{name}:")
    }


def _off(trouble: str) -> RemoteJson:
    return RemoteJson(
        url="",
        breaker="off",
        retry_in_s=0.0,
        last_error=trouble,
        bytes_per_s=0.0,
        publishes=False,
        queued=0,
        hits=0,
        misses={},
        counters={},
    )


def brought_json(brought: Brought, *, at: float | UnsetType = UNSET) -> BroughtJson:
    """What a remote had of a prompt."""
    return BroughtJson(
        num_tokens=brought.num_tokens,
        bytes=brought.nbytes,
        seconds=brought.seconds,
        why=brought.why.value,
        at=at,
    )


def published_json(done: Published) -> PublishedJson:
    """What publishing an entry did."""
    return PublishedJson(
        id=done.entry,
        outcome=done.outcome.value,
        num_tokens=done.num_tokens,
        bytes=done.nbytes,
        requests=done.requests,
    )
