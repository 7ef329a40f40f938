"""What a prompt gets: the longer of what memory and the disk have of it, and why it is no more.

`answer` gives a cache away; the other methods only look.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from persist_cache.cache.ahead import Ahead
from persist_cache.cache.live_caches import Candidate, Held, Resident
from persist_cache.cache.origin import Origin
from persist_cache.cache.owners import Owner
from persist_cache.cache.saver import Saver
from persist_cache.cache.stats import Fetch, Tally
from persist_cache.codec import Codec, sharing
from persist_cache.entry import Match, MissReason, Tier
from persist_cache.errors import StoreError
from persist_cache.store.reasons import nothing, reason_of, why_no_more
from persist_cache.store.trail import Trail
from persist_cache.tokens import TOKEN_BYTES

_ENOUGH_GAIN_TOKENS = 32
"""Reading the disk beats a shorter cache in memory only for more than a few tokens."""


class Taken(NamedTuple):
    """What memory gave for a prompt: a cache, if it is to be used, its length and its cost.

    `parting` is what `Resident.parting` said before it was given away; `held` is what it was.
    """

    cache: Any | None
    num_tokens: int
    parting: tuple[int, bool]
    prefill_s: float = 0.0
    held: Held | None = None


class Lookup:
    """Looks into memory and on the disk.

    Thread safety: may be shared between threads. `lock` is the `PromptCache`'s: a cache is chosen
    and given away within one hold of it, and it is not held while the disk is asked.
    """

    def __init__(
        self,
        codec: Codec,
        resident: Resident,
        lock: threading.RLock,
        saver: Saver,
        tally: Tally,
        on_use: Callable[[Owner, Match], None] = lambda owner, match: None,
    ) -> None:
        """Look into `resident` and, for what the saver has on disk, into its store.

        Args:
            codec: Copies and trims caches, and restores them from bytes.
            resident: The caches in memory.
            lock: Guards them.
            saver: Has the store, and saves what has to leave memory.
            tally: Counts what goes wrong.
            on_use: Called with each use that is noted in the store.
        """
        self._codec = codec
        self._on_use = on_use
        self._sharing = sharing(codec)
        self._resident = resident
        self._lock = lock
        self._saver = saver
        self._tally = tally

    def answer(
        self,
        owner: Owner,
        packed: bytes,
        limit: int,
        counted: bool,
        trail: Trail | None = None,
        to_copy: bool = False,
        ahead: Ahead | None = None,
        origin: Origin | None = None,
    ) -> tuple[Any | None, Fetch]:
        """The longer of memory and disk, what it is, and why it is no more.

        Args:
            owner: Whose KV it is to be.
            packed: The prompt.
            limit: Tokens that it may get at most.
            counted: Whether the use is to be noted in the store.
            trail: Of the request; for any of these methods, None means that this is its only look.
            to_copy: Whether the caller copies the cache before it writes to it, as a batch does.
                Then it stays in memory, also one from the disk, where the next one of the same
                conversation shares its rows.
            ahead: What `load_ahead` read for this request.
            origin: Of the request; what the disk has of the prompt is noted there.

        Returns:
            A cache that the caller owns, or None; and the outcome.
        """
        match = self.match(owner, packed, limit, trail)
        group = "" if origin is None else origin.group
        leaves_no_trace = origin is not None and origin.keeps_nothing
        counted = counted and not leaves_no_trace
        if origin is not None and origin.counts_written:
            # In this order: what is saved in between is seen on the disk.
            origin.arrived = self._saver.promised.arrived
            promised = self._saver.promised.tokens(owner, packed, origin.arrived)
            origin.stored_tokens = max(promised, self._prompt_tokens(owner, packed, trail))
        asks_disk = self._saver.disk is not None and owner.fingerprint is not None
        if ahead is not None and not ahead.is_shared:
            found_ahead = self._taken_alone(owner, packed, limit, ahead)
            if found_ahead is not None:
                read, used = ahead.match, ahead.held.num_tokens
                with self._lock:
                    parting = self._resident.parting(owner, packed)
                why, said = why_no_more(used, limit, read, parting, asked_disk=asks_disk)
                return found_ahead, Fetch(
                    "disk", used, said, ahead.seconds, read.nbytes, read.saved_s, why
                )
        take = functools.partial(
            self.take, owner, packed, limit, to_copy=to_copy, in_passing=leaves_no_trace
        )
        taken = take(on_disk=match)
        parting = taken.parting
        if taken.cache is None and match.num_tokens:
            found = self._load(owner, packed, match, limit, taken.num_tokens + 1, counted, group)
            if found is not None:
                cache, match = found
                used = match.num_tokens
                if to_copy and not leaves_no_trace:
                    cache = self._promote(owner, packed, cache, match)
                why, said = why_no_more(used, limit, match, parting, asked_disk=asks_disk)
                return cache, Fetch("disk", used, said, 0.0, match.nbytes, match.saved_s, why)
            match = nothing(MissReason.UNREADABLE)
            taken = take(on_disk=match)
        used = 0 if taken.cache is None else taken.num_tokens
        why, said = why_no_more(used, limit, match, parting, asked_disk=asks_disk)
        if taken.cache is None:
            return None, Fetch("miss", 0, said, why=why)
        store = self._saver.store
        if ahead is not None and ahead.held is taken.held:
            ahead.is_used = True
            read = ahead.match
            if counted and store is not None:
                store.touch(read, num_tokens=used, spent_s=ahead.seconds, group=group)
                self._on_use(owner, read)
            return taken.cache, Fetch(
                "disk", used, said, ahead.seconds, read.nbytes, read.saved_s, why
            )
        if counted and store is not None and match.num_tokens:
            store.touch(match, num_tokens=used, group=group)
            self._on_use(owner, match)
        cost = taken.prefill_s
        return taken.cache, Fetch("memory", used, said, 0.0, 0, cost, why)

    def _taken_alone(self, owner: Owner, packed: bytes, limit: int, ahead: Ahead) -> Any | None:
        """What was read for one request alone, if memory has no more by now."""
        held: Held = ahead.held
        with self._lock:
            candidate = self._resident.find(owner, packed, limit)
        in_memory = 0 if candidate is None else candidate.num_tokens
        if held.owner != owner or not in_memory <= held.num_tokens <= limit:
            return None
        ahead.is_used = True
        return held.cache if self._sharing is None else self._sharing.join(held.cache)

    def outlook(self, owner: Owner, packed: bytes, limit: int) -> tuple[int, int]:
        """Tokens that would not be computed, and how many memory alone would serve."""
        with self._lock:
            candidate = self._resident.find(owner, packed, limit)
        in_memory = 0 if candidate is None else candidate.num_tokens
        on_disk = self.match(owner, packed, limit).num_tokens
        reads_disk = in_memory == 0 or on_disk - in_memory >= _ENOUGH_GAIN_TOKENS
        return (max(on_disk, in_memory) if reads_disk else in_memory), in_memory

    def known(
        self, owner: Owner, packed: bytes, limit: int, trail: Trail | None = None
    ) -> tuple[int, int]:
        """Tokens that can be served, and tokens shared with anything that is known."""
        with self._lock:
            candidate = self._resident.find(owner, packed, limit)
            common = self._resident.common_tokens(owner, packed)
        known = 0 if candidate is None else candidate.num_tokens
        match = self.match(owner, packed, limit, trail)
        return max(known, match.num_tokens), max(common, match.common_tokens)

    def load_ahead(
        self,
        owner: Owner,
        packed: bytes,
        limit: int,
        trail: Trail | None = None,
        *,
        to_copy: bool,
        in_passing: bool = False,
    ) -> Ahead | None:
        """Read from the disk into memory what `answer` would, for a request that still waits.

        It is held as the caches of others are, and counted with them, until it is used or
        released, or its room is needed for others; with `in_passing`, it is that request's alone.

        Returns:
            What was read; None when nothing is worth it. What memory may not hold is left to the
            system to read.
        """
        match = self.match(owner, packed, limit, trail)
        with self._lock:
            candidate = self._resident.find(owner, packed, limit)
        in_memory = 0 if candidate is None else candidate.num_tokens
        gain = match.num_tokens - in_memory
        store = self._saver.store
        if store is None or gain <= 0 or (in_memory > 0 and gain < _ENOUGH_GAIN_TOKENS):
            return None
        if match.nbytes > self._resident.max_bytes:
            self._tally.read_ahead(store.read_ahead(match))
            return None
        started = time.monotonic()
        found = self._load(owner, packed, match, limit, in_memory + 1, counted=False)
        if found is None:
            return None
        cache, match = found
        held = self._held(owner, packed, cache, match)
        held.stays = to_copy
        with self._lock:
            if held.nbytes > self._resident.max_bytes or not self._resident.is_current(owner):
                return None
            if not in_passing:
                self._saver.spill(self._resident.add(held))
        self._tally.read_ahead(match.nbytes)
        return Ahead(held, match, time.monotonic() - started, is_shared=not in_passing)

    def release(self, ahead: Ahead) -> None:
        """Let go of what was read for a request that is not answered."""
        with self._lock:
            if not ahead.is_used:
                self._resident.remove(ahead.held)

    def read_ahead(
        self, owner: Owner, packed: bytes, limit: int, trail: Trail | None = None
    ) -> int:
        """Have the system read what `answer` would; returns the bytes of the files."""
        store = self._saver.store
        if store is None:
            return 0
        match = self.match(owner, packed, limit, trail)
        with self._lock:
            in_memory = self._resident.common_tokens(owner, packed)
        if match.num_tokens - in_memory < _ENOUGH_GAIN_TOKENS:
            return 0
        nbytes = store.read_ahead(match)
        self._tally.read_ahead(nbytes)
        return nbytes

    def match(self, owner: Owner, packed: bytes, limit: int, trail: Trail | None = None) -> Match:
        """What the disk has of a prompt; nothing, with the reason, when it cannot be asked."""
        store = self._saver.disk
        if store is None:
            said = self._saver.disk_off  # as the caller of `PromptCache` says it, or the disk
            return Match(0, reason=said, why=reason_of(said))
        if owner.fingerprint is None:
            return nothing(MissReason.UNIDENTIFIED_MODEL, owner.reason)
        try:
            return store.match(owner.fingerprint, packed, limit=limit, trail=trail)
        except StoreError as error:
            self._saver.failed(error)
            return nothing(MissReason.DISK_ERROR, str(error))

    def _prompt_tokens(self, owner: Owner, packed: bytes, trail: Trail | None) -> int:
        """Tokens that prompts on the disk have rows of; 0 when it cannot be asked."""
        store = self._saver.disk
        if store is None or owner.fingerprint is None:
            return 0
        try:
            return store.prompt_tokens(owner.fingerprint, packed, trail=trail)
        except StoreError:
            return 0  # of which `match` has said what there is to say

    def take(
        self,
        owner: Owner,
        packed: bytes,
        limit: int,
        *,
        on_disk: Match,
        to_copy: bool = False,
        in_passing: bool = False,
    ) -> Taken:
        """Give away the best cache in memory, unless the disk's is worth reading instead.

        With `in_passing` it is a copy, and memory stays as it is.

        Returns:
            The cache and its length; without a cache, the length of the one that stays behind.
        """
        with self._lock:
            while (candidate := self._resident.find(owner, packed, limit)) is not None:
                used, parting = candidate.num_tokens, self._resident.parting(owner, packed)
                gain = on_disk.num_tokens - used
                if on_disk.num_tokens and (used <= 0 or gain >= _ENOUGH_GAIN_TOKENS):
                    return Taken(None, used, parting)
                cache = self._give(candidate, to_copy, in_passing)
                if cache is not None:
                    taken = Taken(cache, used, parting, _cost(candidate, on_disk), candidate.held)
                    break
                self._tally.problem("trim_failed")
                self._resident.remove(candidate.held)
                self._saver.spill([candidate.held])
            else:
                return Taken(None, 0, self._resident.parting(owner, packed))
        return taken._replace(cache=self._joined(candidate, cache))

    def _give(self, candidate: Candidate, to_copy: bool, in_passing: bool) -> Any | None:
        """Give a cache away, or a copy of it; the caller holds the lock.

        A cache that is on disk is lent: decoding on a copy would copy all of it at the first
        token. Prompts that many conversations share stay, and are copied. So is what a batch is
        given, which copies it anyway; it stays while there is room, and the next one of the same
        conversation shares its rows.

        Returns:
            The cache, cut to the candidate's length; None if that cannot be done.
        """
        held, used = candidate.held, candidate.num_tokens
        if in_passing:
            pass
        elif not held.saved or used != held.num_tokens or held.tier == Tier.SYSTEM.label:
            self._resident.touch(held)
        elif to_copy or held.stays:
            self._resident.spare(held)
        else:
            self._resident.remove(held)
            held.witness = None  # with its references, the next token would copy all of it
            return held.cache
        cache = self._codec.copy_cache(held.cache)
        surplus = held.num_tokens - used
        if surplus and self._codec.trim(cache, surplus) != surplus:
            return None
        return cache

    def _joined(self, candidate: Candidate, cache: Any) -> Any:
        """What `_give` gave, to decode on; without the lock, since it may copy."""
        if self._sharing is None:
            return cache
        held = candidate.held
        if candidate.num_tokens == held.num_tokens and self._sharing.condense(cache):
            with self._lock:
                self._resident.replace(held, self._codec.copy_cache(cache))
        return self._sharing.join(cache)

    def _promote(self, owner: Owner, packed: bytes, cache: Any, match: Match) -> Any:
        """Keep what was read from the disk; returns a copy to decode on."""
        if self._sharing is None:
            return cache
        held = self._held(owner, packed, cache, match)
        held.stays = True
        with self._lock:
            if held.nbytes <= self._resident.max_bytes and self._resident.is_current(owner):
                self._saver.spill(self._resident.add(held, spare=True))
        return self._codec.copy_cache(cache)

    def _held(self, owner: Owner, packed: bytes, cache: Any, match: Match) -> Held:
        """What was read from the disk, as memory holds it."""
        tokens = packed[: match.num_tokens * TOKEN_BYTES]
        nbytes = self._codec.nbytes(cache)
        return Held(owner, tokens, cache, nbytes, Tier.ASSISTANT.label, match.saved_s, saved=True)

    def _load(
        self,
        owner: Owner,
        packed: bytes,
        match: Match,
        limit: int,
        min_tokens: int,
        counted: bool,
        group: str = "",
    ) -> tuple[Any, Match] | None:
        """Read what was found on the disk, or what is there by now; None if that is too little."""
        store = self._saver.store
        if store is None or owner.fingerprint is None:
            return None
        started = time.monotonic()
        found = store.load(
            owner.fingerprint,
            packed,
            match,
            self._codec.restore,
            limit=limit,
            min_tokens=min_tokens,
        )
        if found is not None and counted:
            store.touch(found[1], spent_s=time.monotonic() - started, group=group)
            self._on_use(owner, found[1])
        return found


def _cost(candidate: Candidate, match: Match) -> float:
    """Seconds that computing what memory serves took; 0 when nobody measured."""
    used, held = candidate.num_tokens, candidate.held
    if match.num_tokens == used and match.saved_s:
        return match.saved_s  # the disk knows each entry on the way
    return held.prefill_s * used / held.num_tokens if used else 0.0
