"""What memory keeps: caches that are inserted, and for which weights.

A cache is kept for the weights that computed it. When a model is loaded again, what the former
weights computed leaves memory, and what they had begun is kept for nobody.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Sequence
from typing import Any

from persist_cache.cache.live_caches import Held, Resident
from persist_cache.cache.origin import Origin
from persist_cache.cache.owners import Owner, Owners
from persist_cache.cache.saver import Saver
from persist_cache.cache.stats import Tally
from persist_cache.codec import Codec, sharing
from persist_cache.entry import Tier
from persist_cache.errors import UnsupportedCacheError
from persist_cache.prefill.clock import Prefills
from persist_cache.tokens import TOKEN_BYTES, pack_tokens

log = logging.getLogger(__name__)


class Keeper:
    """Takes caches over and keeps them in memory.

    Thread safety: may be shared between threads, except that a cache is inserted on the thread
    that computed it. `lock` is the `PromptCache`'s, and guards the caches in memory.
    """

    def __init__(
        self,
        codec: Codec,
        resident: Resident,
        lock: threading.RLock,
        owners: Owners,
        saver: Saver,
        prefills: Prefills,
        tally: Tally,
    ) -> None:
        """Keep in `resident`, and have the saver save.

        Args:
            codec: Prepares, measures and trims caches.
            resident: The caches in memory.
            lock: Guards them.
            owners: Tells whose KV a cache is.
            saver: Saves what is to be on disk.
            prefills: Tells what computing a cache cost.
            tally: Counts what is not kept.
        """
        self._codec = codec
        self._sharing = sharing(codec)
        self._resident = resident
        self._lock = lock
        self._owners = owners
        self._saver = saver
        self._prefills = prefills
        self._tally = tally

    def owner(self, model: Hashable, salt: str = "") -> Owner:
        """Whose KV a model computes now; what others left under its key goes."""
        owner = self._owners.of(model, may_read=self._saver.wants_disk, salt=salt)
        self._saver.serves(owner)
        with self._lock:
            if self._resident.now_computed_by(owner):
                self._saver.let_go_of_former()
        return owner

    def insert(
        self,
        model: Hashable,
        tokens: Sequence[int],
        cache: Any,
        tier: Tier,
        *,
        prefill_s: float = 0.0,
        keep_tokens: int | None = None,
        origin: Origin | None = None,
        partial: bool = False,
    ) -> None:
        """Keep a cache, and have it saved if it is to be on disk.

        Args:
            model: mlx-lm's model key.
            tokens: What the cache has seen; copied.
            cache: The cache, which is taken over.
            tier: Role class.
            prefill_s: Seconds that computing all of it takes; added up here when 0.
            keep_tokens: How much of it to keep at most; all when None.
            origin: Of the look-up that its computation began with; searched when None.
            partial: It is on the way to a longer one.
        """
        origin = origin or Origin()
        if origin.keeps_nothing:
            return
        packed = pack_tokens(tokens)
        owner = self.owner(model, origin.salt)
        try:
            num_tokens = self._prepare(owner, packed, cache)
        except UnsupportedCacheError as error:
            self._tally.problem(f"unsupported:{error.class_name}")
            log.warning("a prompt is not kept: %s", error)
            return
        ends = tier == Tier.ASSISTANT
        if self._owners.is_of_another(owner, packed, cache, ends=ends, begun_for=origin.owner):
            # Begun before the model was loaded again, it is neither's.
            self._tally.problem("computed_before_reload")
            log.warning("a prompt is not kept: its model was loaded again while it was computed")
            return
        surplus = 0 if keep_tokens is None else max(0, num_tokens - keep_tokens)
        seen = packed[: num_tokens * TOKEN_BYTES]
        prefill_s = prefill_s or self._prefills.ended(model, seen, tier, origin.prefill)
        if surplus:
            if (
                surplus == num_tokens
                or not self._codec.can_trim(cache)
                or self._codec.trim(cache, surplus) != surplus
            ):
                return
            prefill_s *= 1 - surplus / num_tokens
            num_tokens -= surplus
        packed = packed[: num_tokens * TOKEN_BYTES]
        nbytes = self._codec.nbytes(cache)
        held = Held(owner, packed, cache, nbytes, tier.label, prefill_s, partial=partial)
        held.keep_s = {} if ends else origin.keep_s
        held.group = origin.group
        held.memory_only = origin.memory_only
        witness = getattr(self._codec, "witness", None)
        held.witness = None if witness is None else witness(cache)
        held.stays = self._sharing is not None and self._sharing.is_pieced(cache)
        self._saver.try_late_store_soon()
        with self._lock:
            held.wanted = self._saver.is_for_disk(held)
            if not self._resident.is_current(owner):
                # Another thread has seen a later load meanwhile.
                self._saver.spill([held])
                return
            if nbytes > self._resident.max_bytes:
                # Keeping it would flush everything else, and then itself.
                self._tally.problem("too_large_for_memory")
                gone = [held]
            else:
                gone = self._resident.add(held)
            # Last of all: the writer thread wakes, and this one would wait for the interpreter.
            if held.wanted and tier != Tier.ASSISTANT:
                stored = num_tokens
                if origin.counts_written:
                    promised = self._saver.promised.tokens(owner, packed, origin.arrived)
                    stored = max(origin.stored_tokens, promised)
                if self._saver.save_later(held) and not self._saver.is_known_off:
                    origin.written_tokens += max(0, num_tokens - stored)
            self._saver.spill(gone)

    def _prepare(self, owner: Owner, packed: bytes, cache: Any) -> int:
        """Make a cache fit to be kept; returns the tokens that it stands for."""
        num_tokens = len(packed) // TOKEN_BYTES
        if self._sharing is None:
            return self._codec.prepare(cache, num_tokens)

        def find_known() -> Any | None:
            with self._lock:
                return self._resident.known_rows(owner, packed)

        return self._sharing.prepare(cache, num_tokens, find_known)
