"""What a `PromptCache` did: outcomes of requests, and counters."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from persist_cache.entry import MissReason
from persist_cache.store.catalog import StoreStats
from persist_cache.store.reasons import kind_of_reason
from persist_cache.tokens import prompt_digest

_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Fetch:
    """How one request was answered.

    Attributes:
        source: One of `entry.SOURCES`, or `miss`.
        num_tokens: Tokens that need not be computed.
        reason: On a miss or a short hit, why it is no more.
        seconds: Time the look-up took, reading included.
        nbytes: Bytes read from disk.
        prefill_s: Seconds that computing those tokens took, 0 when nobody measured.
        why: The reason for programs; None when there is none.
    """

    source: str
    num_tokens: int
    reason: str = ""
    seconds: float = 0.0
    nbytes: int = 0
    prefill_s: float = 0.0
    why: MissReason | None = None


class FromRemote(NamedTuple):
    """What a remote said of a prompt before it was looked up.

    Attributes:
        known_tokens: Of the prompt, that were known here.
        num_tokens: That the store has of it by now because of that; 0 for nothing more.
        seconds: What asking took.
        why: How it ended, a word (`remote.Why`).
    """

    known_tokens: int
    num_tokens: int
    seconds: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class RecentFetch:
    """A prompt that was asked for, without its tokens, and how it was answered.

    Attributes:
        num_tokens: Length of the prompt when it was asked for.
        digest: Its `prompt_digest` then, or b"" when it was no list of token ids.
        fetch: The answer.
    """

    num_tokens: int
    digest: bytes
    fetch: Fetch


@dataclass(frozen=True, slots=True)
class PromptCacheStats:
    """What a `PromptCache` did since it was made.

    Attributes:
        memory: Sequences and bytes per tier label.
        hits: Requests served, by source.
        misses: Requests that found nothing, by reason in words (`store.reasons.reason_of`).
        tokens: Tokens that were not computed, by source.
        restore_s: Seconds spent in loading from disk, for hits of that source.
        restored_bytes: Bytes loaded for these.
        read_ahead_bytes: Bytes of files that the system was told to read for waiting requests.
        saves: Entries written.
        written_bytes: Bytes written.
        queued_jobs, queued_bytes: Saves that wait, and the cache memory they keep alive.
        problems: Things that went wrong or were refused, by name.
        disk_off: Why nothing is kept on disk, or "" when it is.
        disk_error: Class of the `StoreError` behind that, or "" if no error is.
        store: Totals of the store, or None without one.
        partial: Hits that left more than the last token to compute, by reason.
        asked: Tokens of all prompts that were asked for.
        repaired: Requests that were changed before they were rendered, by the repair's name.
        shared: Requests that waited for what was computed for another one.
        shared_tokens: Tokens that they did not have to compute.
    """

    memory: Mapping[str, Mapping[str, int]]
    hits: Mapping[str, int]
    misses: Mapping[str, int]
    tokens: Mapping[str, int]
    restore_s: float
    restored_bytes: int
    read_ahead_bytes: int
    saves: int
    written_bytes: int
    queued_jobs: int
    queued_bytes: int
    problems: Mapping[str, int]
    disk_off: str
    disk_error: str
    store: StoreStats | None
    partial: Mapping[str, int] = field(default_factory=dict)
    asked: int = 0
    repaired: Mapping[str, int] = field(default_factory=dict)
    shared: int = 0
    shared_tokens: int = 0


class Tally:
    """Counters of one cache.

    Thread safety: may be shared between threads; `_lock` guards everything.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: deque[RecentFetch] = deque(maxlen=_REMEMBERED)
        self._of_thread = threading.local()
        self._hits: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._partial: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._asked = 0
        self._repaired: Counter[str] = Counter()
        self._shared = 0
        self._shared_tokens = 0
        self._problems: Counter[str] = Counter()
        self._restore_s = 0.0
        self._restored_bytes = 0
        self._read_ahead_bytes = 0
        self._saves = 0
        self._written_bytes = 0

    def recent(self) -> list[RecentFetch]:
        """The latest prompts and how they were answered, oldest first."""
        with self._lock:
            return list(self._recent)

    def last_fetch(self) -> Fetch | None:
        """The outcome of the calling thread's latest request; of any thread's, if it made none."""
        mine: Fetch | None = getattr(self._of_thread, "fetch", None)
        if mine is not None:
            return mine
        with self._lock:
            return self._recent[-1].fetch if self._recent else None

    def fetched(self, num_tokens: int, packed: bytes | None, fetch: Fetch) -> None:
        """Count the outcome of a request of the calling thread.

        Args:
            num_tokens: Length of the prompt.
            packed: The prompt, which is not kept; None when it could not be packed.
            fetch: The outcome.
        """
        self._of_thread.fetch = fetch
        digest = b"" if packed is None else prompt_digest(packed)
        with self._lock:
            self._recent.append(RecentFetch(num_tokens, digest, fetch))
            self._asked += num_tokens
            if fetch.source == "miss":
                self._misses[kind_of_reason(fetch.reason)] += 1
            else:
                if fetch.reason:
                    self._partial[kind_of_reason(fetch.reason)] += 1
                self._hits[fetch.source] += 1
                self._tokens[fetch.source] += fetch.num_tokens
            if fetch.source == "disk":
                self._restore_s += fetch.seconds
                self._restored_bytes += fetch.nbytes

    def read_ahead(self, nbytes: int) -> None:
        """Count bytes that the system was told to read."""
        with self._lock:
            self._read_ahead_bytes += nbytes

    def saved(self, nbytes: int) -> None:
        """Count an entry that was written, unless all of it was there."""
        with self._lock:
            self._saves += nbytes > 0
            self._written_bytes += nbytes

    def repaired(self, names: Iterable[str]) -> None:
        """Count a request that was changed in these ways."""
        with self._lock:
            self._repaired.update(names)

    def shared(self, num_tokens: int) -> None:
        """Count a request that waited for another one, and so need not compute these tokens."""
        with self._lock:
            self._shared += 1
            self._shared_tokens += num_tokens

    def problem(self, name: str) -> None:
        """Count something that went wrong or was refused."""
        with self._lock:
            self._problems[name] += 1

    def stats(
        self,
        *,
        memory: Mapping[str, Mapping[str, int]],
        queue: tuple[int, int],
        disk_off: str,
        disk_error: str,
        store: StoreStats | None,
    ) -> PromptCacheStats:
        """All counters, together with what the cache knows of itself.

        Args:
            memory: Sequences and bytes per tier label.
            queue: Jobs that wait, and the bytes they keep alive.
            disk_off: Why nothing is kept on disk, or "".
            disk_error: Class of the error behind that, or "".
            store: Totals of the store.
        """
        with self._lock:
            return PromptCacheStats(
                memory=memory,
                hits=dict(self._hits),
                misses=dict(self._misses),
                tokens=dict(self._tokens),
                restore_s=self._restore_s,
                restored_bytes=self._restored_bytes,
                read_ahead_bytes=self._read_ahead_bytes,
                saves=self._saves,
                written_bytes=self._written_bytes,
                queued_jobs=queue[0],
                queued_bytes=queue[1],
                problems=dict(self._problems),
                disk_off=disk_off,
                disk_error=disk_error,
                store=store,
                partial=dict(self._partial),
                asked=self._asked,
                repaired=dict(self._repaired),
                shared=self._shared,
                shared_tokens=self._shared_tokens,
            )
