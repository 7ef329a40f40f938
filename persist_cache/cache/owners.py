"""Whose KV a cache is: which weights computed it.

A model key names files, and files may be replaced; KV is right only for the weights that computed
it. So whatever is kept in memory is kept for an `Owner`: a model key together with the identity of
the weights behind it or, where they have none, with the number of their load.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from persist_cache.fingerprint.identifier import Identifier
from persist_cache.fingerprint.loads import Unidentified
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.tokens import PrefixDigests

_ATTEMPTS = 8
_REMEMBERED = 128
_MOST_SALTED = 256


@dataclass(frozen=True, slots=True)
class Owner:
    """Weights in memory, as far as they can be told apart.

    Attributes:
        model: The model key.
        identity: Digest of the fingerprint; without one, what stands for the load.
        fingerprint: Of the weights, or None when they are not identified.
        reason: Why they are not, or "".
        load: Number of the load; None when `identify` counts none.
        salt: Digest of the salt of the requests that may have it; "" for those without one.
            `identity` is that of the weights alone, `fingerprint` depends on it.
    """

    model: Hashable
    identity: Hashable
    fingerprint: Fingerprint | None = field(default=None, compare=False)
    reason: str = field(default="", compare=False)
    load: int | None = field(default=None, compare=False)
    salt: str = ""

    def is_same_model(self, other: Owner) -> bool:
        """Whether both are of the same weights, whatever their salts."""
        return (self.model, self.identity) == (other.model, other.identity)

    def is_same_load(self, other: Owner) -> bool:
        """Whether both are the same weights, though one may be from before they were identified.

        Of another salt is another's.
        """
        return self == other or (
            (self.model, self.salt) == (other.model, other.salt)
            and self.load is not None
            and self.load == other.load
        )

    def is_older(self, other: Owner) -> bool:
        """Whether this is surely of a load before that of `other`."""
        return self.load is not None and other.load is not None and self.load < other.load


class _Asked(Struct, frozen=True):
    """A look-up whose prompt is being computed, as far as is known."""

    owner: Owner
    prompt: PrefixDigests


class Owners:
    """Tells the owner of a model's KV now, and notices a cache that an earlier owner computed.

    Thread safety: may be shared between threads. `_lock` guards the notes; it is not held while a
    model is identified.
    """

    def __init__(self, identify: Callable[[Any], Fingerprint | None]) -> None:
        """Ask `identify` for the identity of models.

        Args:
            identify: An `Identifier`, or any callable. If it has `load_number` and `settled`, as
                an `Identifier` has, loads without identity are told apart, and looking costs
                nothing; else it is called each time.
        """
        self._identify = identify
        self._lock = threading.Lock()
        self._asked_by_any: deque[_Asked] = deque(maxlen=_REMEMBERED)
        self._of_thread = threading.local()
        self._given: weakref.WeakKeyDictionary[Any, Owner] = weakref.WeakKeyDictionary()
        self._salted: dict[tuple[bytes, str], Fingerprint] = {}

    def of(self, model: Hashable, *, may_read: bool, salt: str = "") -> Owner:
        """The owner of what the model computes now.

        Args:
            model: The model key.
            salt: Digest of the request's salt, or "".
            may_read: Whether the model's files may be read for it. If not, an `Identifier` that
                has not settled an answer gives none.
        """
        number = self._load_number(model)
        for _ in range(_ATTEMPTS):
            fingerprint, reason = self._ask(model, may_read)
            before, number = number, self._load_number(model)
            if number == before:
                break  # not loaded again in between
        identity: Hashable = ("load", number) if fingerprint is None else fingerprint.digest
        if fingerprint is not None and salt:
            fingerprint = self._with_salt(fingerprint, salt)
        return Owner(model, identity, fingerprint, reason, number, salt)

    def _with_salt(self, fingerprint: Fingerprint, salt: str) -> Fingerprint:
        """The fingerprint for one salt, which takes longer to make than to look up."""
        key = (fingerprint.digest, salt)
        with self._lock:
            found = self._salted.get(key)
        if found is None:
            found = fingerprint.salted(salt)
            with self._lock:
                if len(self._salted) >= _MOST_SALTED:
                    self._salted.clear()
                self._salted[key] = found
        return found

    def identify_now(self, model: Any) -> Fingerprint | Unidentified:
        """Identify a model that has just been loaded, whatever was known of it before."""
        if isinstance(self._identify, Identifier):
            return self._identify.identify_again(model)
        fingerprint, reason = self._ask(model, may_read=True)
        return Unidentified(reason) if fingerprint is None else fingerprint

    def asked(self, owner: Owner, packed: bytes) -> None:
        """Note that the calling thread looked a prompt up, to compute the rest of it."""
        if packed:
            asked = _Asked(owner, PrefixDigests.of(packed))
            self._asked_here().append(asked)
            with self._lock:
                self._asked_by_any.append(asked)

    def gave(self, owner: Owner, cache: Any) -> None:
        """Note whose KV a cache is that is given away."""
        try:
            with self._lock:
                self._given[cache[0]] = owner
        except (TypeError, LookupError):
            pass  # nothing that can be recognised

    def is_of_another(
        self,
        owner: Owner,
        packed: bytes,
        cache: Any,
        *,
        ends: bool,
        begun_for: Owner | None = None,
    ) -> bool:
        """Whether a cache was computed, or begun, by other weights than those of `owner`.

        A cache that was given away is recognised itself. One that was computed from the first
        token on belongs to the weights that were there when its prompt was looked up: for
        `begun_for`, if that is known; else by the calling thread or, if that did not ask for it,
        by any. Where several did, and not all of the same weights, it may be another's.

        Args:
            owner: Whose it would be now.
            packed: The tokens of the cache.
            cache: The cache.
            ends: It holds the whole answer, so nothing more is to come of that look-up.
            begun_for: Whose it was when its prompt was looked up; searched when None.
        """
        given = None
        try:
            with self._lock:
                given = self._given.get(cache[0])
        except (TypeError, LookupError):
            pass
        origins = [one for one in (given, begun_for) if one is not None]
        if begun_for is None:
            origins += [one.owner for one in self._asked_for(owner.model, packed, forget=ends)]
        return any(not origin.is_same_load(owner) for origin in origins)

    def _asked_here(self) -> deque[_Asked]:
        """Look-ups of the calling thread; what others do meanwhile pushes none of them out."""
        here: deque[_Asked] | None = getattr(self._of_thread, "asked", None)
        if here is None:
            here = self._of_thread.asked = deque(maxlen=_REMEMBERED)
        return here

    def _asked_for(self, model: Hashable, packed: bytes, *, forget: bool) -> list[_Asked]:
        """The look-ups that the tokens can come from.

        The calling thread's latest one, if it asked. Else nobody can tell which of all it is.
        """
        here = self._asked_here()

        def fits(asked: _Asked) -> bool:
            return asked.owner.model == model and (
                asked.prompt.begin_with(packed) or asked.prompt.is_begun_by(packed)
            )

        mine = next(filter(fits, reversed(here)), None)
        found = [] if mine is None else [mine]
        if mine is None:
            with self._lock:
                anywhere = list(self._asked_by_any)
            found = list(filter(fits, anywhere))
        if forget and found:
            # Of several the first has most likely ended.
            with self._lock:
                _drop(self._asked_by_any, found[0])
            _drop(here, found[0])
        return found

    def _ask(self, model: Hashable, may_read: bool) -> tuple[Fingerprint | None, str]:
        settled = getattr(self._identify, "settled", None)
        ask = settled if not may_read and callable(settled) else self._identify
        found = ask(model)
        if isinstance(found, Fingerprint):
            return found, ""
        if isinstance(found, Unidentified):
            return None, found.reason
        reason = getattr(self._identify, "reason", None)
        if may_read and callable(reason):
            return None, str(reason(model))
        return None, "its identity is unknown"

    def _load_number(self, model: Hashable) -> int | None:
        load_number = getattr(self._identify, "load_number", None)
        return int(load_number(model)) if callable(load_number) else None


def _drop(notes: deque[_Asked], note: _Asked) -> None:
    """Remove a note if it is there; it is recognised itself, for others may look like it."""
    for place, other in enumerate(notes):
        if other is note:
            del notes[place]
            return
