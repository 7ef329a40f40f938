"""From a prompt to more of it in the store: look, choose, judge, pull, put.

Thread safety: `Bringer` may be shared between threads. What several requests would pull alike is
pulled once (`_Flight`); `_lock` guards the flights and the measured speed.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

from persist_cache.entry import Match, Tier
from persist_cache.errors import PersistCacheError, StoreFullError
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.portable.needs import Need, need_of
from persist_cache.remote.keys import MIN_TOKENS, places_to_ask
from persist_cache.remote.looking import Candidate, Looker
from persist_cache.remote.manifest import Manifest, RefusedError
from persist_cache.remote.means import Means
from persist_cache.remote.pulling import (
    GoneError,
    TooSlowError,
    Wanted,
    Watch,
    pull,
    pulled_entry,
)
from persist_cache.remote.told import Brought, Why
from persist_cache.remote.transport import Failure, TransportError
from persist_cache.tokens import TOKEN_BYTES, pack_tokens

log = logging.getLogger(__name__)
_MEASURED_BYTES = 4 << 20
"""What a speed can be told from: less is mostly waiting for the first byte."""
_SPEED_LASTS_S = 600.0
"""A speed measured before is not believed any more: the network may be a better one by now."""
_FLIGHT_NAP_S = 0.02
_SLOWER = 4
"""Where nothing was timed here, computing is taken to be so many times as slow as it was for the
publisher: a request does not wait longer for a slow line."""
_TRIES = 3
"""Entries that are tried when blobs of the best ones are gone or bad."""


class _Flight(Struct):
    """A look-up under way, for whose end those wait that would ask the same."""

    packed: bytes
    ended: threading.Event = msgspec.field(default_factory=threading.Event)
    outcome: Brought | None = None
    found_nothing: bool = False


class _Question(Struct, frozen=True):
    """What is asked for."""

    fingerprint: Fingerprint
    packed: bytes
    known: int
    limit: int
    ends: Sequence[int]
    prefill_s: Callable[[int], float]
    pause: Callable[[], None]
    is_instead: bool

    def worth_s(self, manifest: Manifest, num_tokens: int) -> float:
        """What computing so many tokens takes that a manifest has; 0 when nobody knows."""
        if not self.is_instead:
            return math.inf
        if timed_s := max(0.0, self.prefill_s(num_tokens)):
            return timed_s
        return _SLOWER * manifest.prefill_s * num_tokens / manifest.num_tokens


class Bringer:
    """Looks prompts up, and pulls what is worth it."""

    def __init__(self, means: Means, looker: Looker) -> None:
        self._means = means
        self._store = means.store
        self._looker = looker
        self._lock = threading.Lock()
        self._flights: dict[bytes, _Flight] = {}
        self._bytes_per_s = 0.0
        self._measured_at = 0.0

    @property
    def bytes_per_s(self) -> float:
        """The measured speed of pulls; 0 for none, or none of late."""
        with self._lock:
            if time.monotonic() - self._measured_at > _SPEED_LASTS_S:
                return 0.0
            return self._bytes_per_s

    def bring(
        self,
        fingerprint: Fingerprint,
        tokens: bytes | Sequence[int],
        known: int,
        limit: int,
        prefill_s: Callable[[int], float] | None,
        pause: Callable[[], None],
        ends: Sequence[int],
    ) -> Brought:
        """See `Remote.bring`."""
        started = time.monotonic()
        packed = tokens if isinstance(tokens, bytes) else pack_tokens(tokens)
        limit = min(limit, len(packed) // TOKEN_BYTES)
        left: list[bool] = []

        def watched() -> None:
            try:
                pause()
            except BaseException:
                left.append(True)
                raise

        asked = _Question(
            fingerprint,
            packed,
            max(known, 0),
            limit,
            (*ends, limit),
            prefill_s or (lambda num_tokens: 0.0),
            watched,
            is_instead=prefill_s is not None,
        )
        try:
            outcome = self._answer(asked)
        except Exception:
            if left:
                raise
            # A fault of this room costs no request its answer.
            log.exception("the remote could not be looked at")
            outcome = _miss(Why.FAILED)
        outcome = Brought(
            outcome.num_tokens, outcome.nbytes, time.monotonic() - started, outcome.why
        )
        self._note(outcome, asked)
        return outcome

    def _note(self, outcome: Brought, asked: _Question) -> None:
        if outcome.is_hit:
            self._means.counters.add("hits")
            self._means.counters.add("hit_tokens", outcome.num_tokens - asked.known)
            saved_s = asked.prefill_s(outcome.num_tokens - asked.known) - outcome.seconds
            self._means.counters.add("saved_ms", int(1000 * saved_s))
        elif outcome.why not in (Why.ENOUGH_KNOWN, Why.NOT_ALLOWED):
            self._means.counters.add(f"misses:{outcome.why.value}")

    def _answer(self, asked: _Question) -> Brought:
        if not asked.fingerprint.may_publish:
            return _miss(Why.NOT_ALLOWED)
        if asked.limit - asked.known < MIN_TOKENS:
            return _miss(Why.ENOUGH_KNOWN)
        if not self._means.breaker.allows():
            return _miss(Why.BREAKER_OPEN)
        head = asked.packed[: MIN_TOKENS * TOKEN_BYTES]
        key = asked.fingerprint.digest + head
        while True:
            with self._lock:
                flight = self._flights.get(key)
                if flight is None:
                    flight = self._flights[key] = _Flight(asked.packed)
                    break
            worth_s = asked.prefill_s(asked.limit - asked.known)
            give_up = time.monotonic() + worth_s if worth_s > 0 else math.inf
            while not flight.ended.wait(_FLIGHT_NAP_S):
                if time.monotonic() > give_up:
                    return _miss(Why.TOO_SLOW)
                asked.pause()
            shared = self._shared(asked, flight)
            if shared is not None:
                return shared
        try:
            flight.outcome = outcome = self._fetch(asked, flight)
            return outcome
        finally:
            with self._lock:
                del self._flights[key]
            flight.ended.set()

    def _shared(self, asked: _Question, flight: _Flight) -> Brought | None:
        """What another's look-up means for this one; None if it has to look itself."""
        outcome = flight.outcome
        if outcome is None:  # its client left
            return None
        match = self._match(asked)
        if match.num_tokens > asked.known and outcome.is_hit:
            return Brought(match.num_tokens, 0, 0.0, Why.SHARED)
        if (
            flight.packed == asked.packed
            or flight.found_nothing
            or not self._means.breaker.allows()
        ):
            return _miss(outcome.why if not outcome.is_hit else Why.NOT_FOUND)
        return None

    def _match(self, asked: _Question) -> Match:
        try:
            return self._store.match(asked.fingerprint, asked.packed, limit=asked.limit)
        except PersistCacheError:
            return Match(0)

    def _fetch(self, asked: _Question, flight: _Flight) -> Brought:
        self._means.counters.add("lookups")
        places = places_to_ask(asked.known, asked.limit, asked.ends)
        try:
            look = self._looker.look(asked.fingerprint, asked.packed, places, asked.pause)
        except TransportError as error:
            return self._failed(error, 0)
        if look.failure is not None and not look.candidates:
            return self._failed(look.failure, look.nbytes)
        # S3 denies what is missing to those who may not list; something was found, though.
        is_sound = look.failure is None or look.failure.kind == Failure.DENIED
        if look.failure is not None and not is_sound:
            self._means.breaker.failed(str(look.failure))
        usable = {
            candidate.anchor: candidate.manifest.usable(candidate.common, asked.limit)
            for candidate in look.candidates.values()
        }
        candidates = [
            one
            for one in look.candidates.values()
            if usable[one.anchor] > asked.known and not self._is_over(asked.fingerprint, one)
        ]
        if not candidates:
            flight.found_nothing = not look.candidates and asked.known == 0
            if is_sound:
                self._means.breaker.succeeded()
            return Brought(0, look.nbytes, 0.0, Why.REFUSED if look.refused else Why.NOT_FOUND)
        outcome = _miss(Why.NOT_FOUND)
        nbytes = look.nbytes
        for _ in range(_TRIES):
            if not candidates:
                break
            # The same entry is found under several anchors.
            best = max(candidates, key=lambda one: (usable[one.anchor], -len(one.packed)))
            outcome = self._try(asked, best, usable[best.anchor])
            nbytes += outcome.nbytes
            if outcome.why not in (Why.GONE, Why.REFUSED):
                break
            alike = [one for one in candidates if one.manifest.blobs == best.manifest.blobs]
            for one in alike:
                self._looker.bad.add(one.anchor)
            candidates = [one for one in candidates if one not in alike]
        if is_sound and outcome.why not in (Why.TIMED_OUT, Why.FAILED, Why.CLOSED):
            # Not before: blobs may fail where manifests do not.
            self._means.breaker.succeeded()
        return Brought(outcome.num_tokens, nbytes, 0.0, outcome.why)

    def _is_over(self, fingerprint: Fingerprint, candidate: Candidate) -> bool:
        """Whether it would expire at once, by the lifetimes of the store: those count its age."""
        try:
            lives = self._store.lifetimes()
        except PersistCacheError:
            return True
        is_whole = candidate.common == candidate.manifest.num_tokens
        tier = Tier.parse(candidate.manifest.tier) if is_whole else Tier.ASSISTANT
        seconds = None if lives is None else lives(tier, fingerprint)
        return seconds is not None and candidate.manifest.created + seconds <= self._store.clock()

    def _try(self, asked: _Question, candidate: Candidate, usable: int) -> Brought:
        """Pull one entry, or its beginning."""
        manifest = candidate.manifest
        num_tokens = candidate.common if manifest.complete else manifest.num_tokens
        packed = candidate.packed[: num_tokens * TOKEN_BYTES]
        wanted = Wanted(manifest, packed, 0)
        try:
            with self._store.read() as txn:
                has_state = wanted.state is not None
                need = need_of(
                    txn, wanted.namespace, packed, has_state=has_state, what="What was found"
                )
        except PersistCacheError as error:
            self._means.breaker.note(str(error))
            return _miss(Why.FAILED)
        if need.is_there:
            found = self._match(asked).num_tokens
            return (
                Brought(found, 0, 0.0, Why.SHARED) if found > asked.known else _miss(Why.NOT_FOUND)
            )
        wanted = Wanted(manifest, packed, need.common)
        worth_s = asked.worth_s(manifest, usable - asked.known)
        speed = self.bytes_per_s
        if worth_s and speed and wanted.nbytes / speed > worth_s:
            return _miss(Why.NOT_WORTH_IT)
        why, nbytes = self._pull(asked, candidate, wanted, need, worth_s)
        if why != Why.BROUGHT:
            return Brought(0, nbytes, 0.0, why)
        found = self._match(asked).num_tokens
        if found <= asked.known:  # evicted at once: there is no room for it
            return Brought(0, nbytes, 0.0, Why.NO_ROOM)
        return Brought(found, nbytes, 0.0, Why.BROUGHT)

    def _pull(
        self, asked: _Question, candidate: Candidate, wanted: Wanted, need: Need, worth_s: float
    ) -> tuple[Why, int]:
        """Pull and put; how it ended, and the bytes received."""
        watch = Watch(wanted.nbytes, worth_s)
        try:
            self._pull_into_store(asked, wanted, need, watch)
        except TooSlowError:
            why = Why.TOO_SLOW
        except GoneError:
            why = Why.GONE
        except RefusedError as error:
            self._looker.refuse(candidate.anchor, error.kind)
            self._means.breaker.note(f"what it has was refused, because {error.reason}")
            why = Why.REFUSED
        except TransportError as error:
            why = self._failed(error, 0).why
        except StoreFullError as error:
            self._means.breaker.note(str(error))
            why = Why.NO_ROOM
        except (PersistCacheError, OSError, ValueError) as error:
            self._means.breaker.note(str(error))
            why = Why.FAILED
        else:
            self._means.counters.add("pulled")
            why = Why.BROUGHT
        return why, watch.done

    def _pull_into_store(self, asked: _Question, wanted: Wanted, need: Need, watch: Watch) -> None:
        def pause() -> None:
            watch.check()
            asked.pause()

        # The pulled bytes and the store's own copy of them are there at the same time.
        self._store.refuse_without_room(
            2 * wanted.nbytes,
            wanted.num_tokens,
            need.nodes,
            f"what was found on the remote ({wanted.nbytes} bytes, and as many meanwhile)",
        )
        with (
            self._store.serving(self._match(asked).entries),
            self._store.scratch(wanted.nbytes, need.nodes) as scratch,
        ):
            watch.begin()
            try:
                work = pull(self._means.transport, self._means.keys, wanted, scratch.fd, watch)
                self._means.transport.call(work, pause)
            except TooSlowError:
                self._measure(watch, is_enough=True)
                raise
            self._measure(watch, is_enough=watch.done >= _MEASURED_BYTES)
            entry = pulled_entry(wanted, scratch, asked.fingerprint)
            done = self._store.put(
                asked.fingerprint,
                entry.packed,
                entry,
                tier=entry.tier,
                prefill_s=asked.prefill_s(entry.num_tokens) or entry.prefill_s,
            )
        if done.entry is not None:
            self._store.date_back(done.entry, min(entry.created, self._store.clock()))

    def _measure(self, watch: Watch, *, is_enough: bool) -> None:
        """Remember a speed; of a small pull, which is mostly waiting, only if it is higher."""
        speed = max(watch.done, 1) / max(watch.seconds, 1e-6)
        with self._lock:
            if is_enough or speed > self._bytes_per_s > 0:
                self._bytes_per_s = speed
                self._measured_at = time.monotonic()

    def _failed(self, error: TransportError, nbytes: int) -> Brought:
        if error.kind == Failure.CLOSED:
            return Brought(0, nbytes, 0.0, Why.CLOSED)
        is_late = error.kind == Failure.TIME_OUT
        self._means.note_failure(error, at_once=is_late)
        return Brought(0, nbytes, 0.0, Why.TIMED_OUT if is_late else Why.FAILED)


def _miss(why: Why) -> Brought:
    return Brought(0, 0, 0.0, why)
