"""PromptCache: live caches in memory over a store on disk; replaces mlx-lm's `LRUPromptCache`.

Look-ups take the longer of memory and disk. Inserts keep the cache in memory and save it behind
the answer: `system` and `user` at once, `assistant` when it leaves memory, when the process is
idle, at `flush` and at `close`. Nothing here raises into a generation thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, Protocol

from persist_cache.blobs import BlobReader
from persist_cache.entry import TIER_LABELS, TOKEN_BYTES, Match, Tier, pack_tokens
from persist_cache.errors import (
    StoreAccessError,
    StoreBusyError,
    StoreError,
    UnsupportedCacheError,
)
from persist_cache.fingerprint import Fingerprint, Identifier
from persist_cache.insert import Source
from persist_cache.resident import Candidate, Held, LiveCaches, Resident
from persist_cache.store import Store
from persist_cache.tally import Fetch, PromptCacheStats, Tally, kind_of_miss
from persist_cache.writer import WriteBehind

log = logging.getLogger(__name__)

_LONGEST_ANSWER_S = 600.0
_ENOUGH_GAIN_TOKENS = 32
"""Reading the disk beats a shorter cache in memory only for more than a few tokens."""


class Codec(LiveCaches, Protocol):
    """Between mlx-lm caches and bytes; `persist_cache.tensors` is the one for mlx-lm."""

    def group_size(self) -> int: ...

    def prepare(self, cache: Sequence[Any], num_tokens: int, /) -> int: ...

    def source(self, cache: Sequence[Any], num_tokens: int, /) -> Source: ...

    def restore(
        self,
        runs: Sequence[tuple[BlobReader, int]],
        checkpoint: BlobReader | None,
        num_tokens: int,
        /,
    ) -> Any: ...


class PromptCache:
    """A prompt cache that survives the process; drop-in for `mlx_lm.models.cache.LRUPromptCache`.

    With `store=None` it keeps caches in memory only.

    `fetch_nearest_cache` hands a cache over: the caller owns it and may decode on it.
    `insert_cache` takes a cache over: the caller must not use it any more.

    Thread safety: all methods may be called from any thread, except that a cache must be inserted
    on the thread that computed it (MLX streams are thread-local). `_lock` guards the bookkeeping;
    it is not held while a disk is read or written.
    """

    def __init__(
        self,
        max_size: int = 10,
        max_bytes: int = 1 << 63,
        *,
        store: Store | str | os.PathLike[str] | None = None,
        identify: Callable[[Any], Fingerprint | None] | None = None,
        leave_tokens: int = 0,
        persist: Collection[str] = TIER_LABELS,
        idle_s: float = 2.0,
        queue_bytes: int = 4 << 30,
        codec: Codec | None = None,
        disk_off: str = "no store was given",
    ) -> None:
        """Make an empty memory over `store`.

        Args:
            max_size: Caches kept in memory.
            max_bytes: Bytes of caches kept in memory.
            store: An open store, which stays its opener's to close; or a folder, which is opened
                here and closed by `close`.
            identify: Gives the fingerprint of a `model` as `fetch_nearest_cache` gets it, or None
                when it cannot be identified: such models stay in memory. The default knows
                mlx-lm's model keys.
            leave_tokens: Tokens of a prompt that are always left to compute. A server needs 1:
                with 0, the resend of a known prompt leaves nothing to start from.
            persist: Labels of the tiers that go to disk.
            idle_s: Seconds without requests after which `assistant` caches are saved.
            queue_bytes: Cache memory that waiting saves may keep alive.
            codec: How caches become bytes; mlx-lm's by default.
            disk_off: Why there is no `store`, for whoever asks; unused when there is one.

        Raises:
            ValueError: An unknown tier, or a negative number.
            MissingDependencyError: MLX or mlx-lm is not installed.
            StoreError: The folder `store` cannot be opened.
        """
        if min(max_size, max_bytes, leave_tokens, queue_bytes) < 0 or idle_s < 0:
            raise ValueError("sizes and times of a prompt cache must not be negative")
        self._persist = frozenset(Tier.parse(label).label for label in persist)
        if codec is None:
            from persist_cache import tensors

            codec = tensors
        self._codec = codec
        self._leave_tokens = leave_tokens
        self._lock = threading.RLock()
        self._resident = Resident(codec, max_size, max_bytes)
        self._tally = Tally()
        self._memory_only = "" if store is not None else disk_off
        self._disk_error: StoreError | None = None
        if store is not None and codec.group_size() > 1:
            # Every rank has a shard of each layer, and all would have the same fingerprint.
            store, self._memory_only = None, "several ranks share one model; shards are not stored"
        self._owns_store = store is not None and not isinstance(store, Store)
        self._store = store if isinstance(store, Store) or store is None else Store.open(store)
        self._identify: Callable[[Any], Fingerprint | None] = identify or Identifier()
        self._computing_until = 0.0
        self.is_busy: Callable[[], bool] = lambda: time.monotonic() < self._computing_until
        """Asked before files are merged: whether an answer is being computed. A server knows;
        else it is so from a look-up to the insert of the reply, for ten minutes at most."""
        self._closed = False
        self._pid = os.getpid()
        self._cuts: deque[tuple[bytes, int]] = deque(maxlen=16)
        self._writer: WriteBehind | None = None
        if self._store is not None and not self._store.read_only:
            self._writer = WriteBehind(
                max_bytes=queue_bytes, idle_s=idle_s, on_idle=self._save_when_idle
            )

    def __len__(self) -> int:
        """Number of caches in memory."""
        with self._lock:
            return len(self._resident)

    def __enter__(self) -> PromptCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def max_size(self) -> int:
        """Caches kept in memory."""
        return self._resident.max_size

    @property
    def max_bytes(self) -> int:
        """Bytes of caches kept in memory."""
        return self._resident.max_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the caches in memory."""
        with self._lock:
            return self._resident.nbytes

    @property
    def disk_off(self) -> str:
        """Why nothing is kept on disk at present; "" when it is."""
        error = self._disk_trouble()
        return self._memory_only if error is None else str(error)

    @property
    def last_fetch(self) -> Fetch:
        """How the most recent request was answered."""
        recent = self._tally.recent()
        return recent[-1][1] if recent else Fetch("miss", 0)

    def recent_fetches(self) -> list[tuple[Sequence[int], Fetch]]:
        """The latest prompts and how they were answered, oldest first; for response headers."""
        return self._tally.recent()

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """Sequences and bytes in memory per tier: `{tier: {"n_sequences", "n_bytes"}}`."""
        with self._lock:
            return self._resident.stats()

    # ---- the five calls of a server ----------------------------------------------------------

    def fetch_nearest_cache(
        self, model: Hashable, tokens: Sequence[int]
    ) -> tuple[Any | None, Sequence[int]]:
        """Find the cache of the longest known prefix of a prompt.

        Never raises: what goes wrong is a miss, a counter, and a line in the log.

        Args:
            model: mlx-lm's model key, `(model path, adapter path, draft model path)`.
            tokens: The prompt.

        Returns:
            A cache that the caller owns, or None; and the tokens that are left to compute.
        """
        started = time.monotonic()
        try:
            if not hasattr(tokens, "__getitem__"):
                tokens = list(tokens)  # what can be read only once
            packed = pack_tokens(tokens)
            cache, fetch = self._fetch(model, packed)
            self._tally.begun(model, packed, fetch.num_tokens)
        except Exception as error:
            log.exception("a look-up failed; the prompt is computed anew")
            self._tally.problem(f"fetch_failed:{type(error).__name__}")
            cache, fetch = None, Fetch("miss", 0, "the look-up failed")
        fetch = Fetch(
            fetch.source, fetch.num_tokens, fetch.reason, time.monotonic() - started, fetch.nbytes
        )
        try:
            self._account(tokens, fetch)
        except Exception:
            log.exception("a look-up could not be counted")
        rest = tokens[fetch.num_tokens :] if fetch.num_tokens else tokens
        return cache, rest

    def insert_cache(
        self,
        model: Hashable,
        tokens: Sequence[int],
        prompt_cache: Any,
        *,
        cache_type: str = "assistant",
        prefill_s: float = 0.0,
    ) -> None:
        """Keep the cache of a prompt, and save it behind the answer.

        Never raises: what goes wrong is a counter and a line in the log.

        Args:
            model: mlx-lm's model key.
            tokens: What the cache has seen; copied.
            prompt_cache: The cache, which belongs to this object from now on. A `KVCache` has
                arrays of shape `(B, n_kv_heads, T, head_dim)`.
            cache_type: Tier: `system`, `user` or `assistant`.
            prefill_s: Seconds that computing it took, if known: `stats` tells what a hit saves.
        """
        try:
            if not hasattr(tokens, "__getitem__"):
                tokens = list(tokens)  # what can be read only once
            self._insert(model, tokens, prompt_cache, cache_type, prefill_s)
        except Exception as error:
            log.exception("a prompt could not be kept")
            self._tally.problem(f"insert_failed:{type(error).__name__}")

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Let caches go from memory until both limits hold; negative limits count as 0.

        What is not on disk yet is saved first.
        """
        n_sequences = 1 << 63 if n_sequences is None else max(0, n_sequences)
        n_bytes = 1 << 63 if n_bytes is None else max(0, n_bytes)
        with self._lock:
            self._spill(self._resident.trim_to(n_sequences, n_bytes))

    # ---- beyond LRUPromptCache ---------------------------------------------------------------

    def read_ahead(self, model: Hashable, tokens: Sequence[int]) -> int:
        """Have the system read what a fetch of this prompt would, for a request that waits.

        Runs no MLX operation, so any thread may call it, and counts nothing.

        Returns:
            Bytes of the files; 0 when memory serves the prompt.
        """
        fingerprint = self._fingerprint(model)
        if fingerprint is None or self._store is None:
            return 0
        packed = pack_tokens(tokens)
        match = self._match(fingerprint, packed, len(tokens))
        with self._lock:
            in_memory = self._resident.common_tokens(model, packed)
        if match.num_tokens - in_memory < _ENOUGH_GAIN_TOKENS:
            return 0
        nbytes = self._store.read_ahead(match)
        self._tally.read_ahead(nbytes)
        return nbytes

    def cut_answer(self, tokens: Sequence[int], num_tokens: int) -> None:
        """Of the next answer to a prompt, keep the cache of its first `num_tokens` and no more.

        For a prompt that is run to have its beginning computed. What cannot be cut there is not
        kept.
        """
        self._cuts.append((pack_tokens(tokens), num_tokens))

    def known_tokens(self, model: Hashable, tokens: Sequence[int]) -> int:
        """Length of the longest prefix that a fetch would serve; looks only, counts nothing."""
        return self._known(model, tokens)[0]

    def branch_point(
        self, model: Hashable, tokens: Sequence[int], *, min_gain_tokens: int = 1
    ) -> int:
        """Where a prompt leaves what is known, if it cannot be resumed there; else 0.

        A model whose cache cannot be trimmed needs a checkpoint at that point, for the next
        prompt that leaves there.

        Args:
            model: mlx-lm's model key.
            tokens: The prompt.
            min_gain_tokens: How far behind the last position that can be resumed it has to lie.
        """
        known, common = self._known(model, tokens)
        common = min(common, len(tokens) - 1)
        return common if common - known >= min_gain_tokens else 0

    def _known(self, model: Hashable, tokens: Sequence[int]) -> tuple[int, int]:
        """Tokens that can be served, and tokens shared with anything that is known."""
        try:
            packed = pack_tokens(tokens)
            with self._lock:
                candidate = self._candidate(model, packed, len(tokens))
                common = self._resident.common_tokens(model, packed)
            known = 0 if candidate is None else candidate.num_tokens
            match = self._match(self._fingerprint(model), packed, len(tokens))
            return max(known, match.num_tokens), max(common, match.common_tokens)
        except Exception:
            log.exception("a look-up failed")
            self._tally.problem("look_up_failed")
            return 0, 0

    def flush(self, timeout_s: float | None = None) -> bool:
        """Save everything that is to be on disk and is not yet, and wait for it.

        Returns:
            Whether all of it is on disk.
        """
        if self._writer is None or self._store is None:
            return True
        if self._writer.on_thread():
            raise RuntimeError("flush() must not be called from a save")
        if os.getpid() != self._pid:
            return False  # the thread that saves is the parent's
        left = _Deadline(timeout_s)
        done = self._writer.drain(left())
        # The queue is bounded, so what waits in memory goes in portions.
        while done and (waiting := self._waiting()):
            for held in waiting:
                self._save_later(held)
            done = self._writer.drain(left()) and not all(held.wanted for held in waiting)
        with self._store.patient(left()):
            self._flush_uses()
        return done

    def close(self, timeout_s: float | None = None) -> None:
        """Save what is not on disk yet, and end the writer thread. Further calls do nothing.

        In a forked child all of that is the parent's, and nothing is saved.

        Args:
            timeout_s: After so long, what is not saved yet is given up. None: no longer than the
                disk takes, and than a change waits for other processes.
        """
        if self._closed:
            return
        if os.getpid() != self._pid:
            self._closed = True
            return
        left = _Deadline(timeout_s)
        if self._writer is not None:
            self.flush(left())
            self._writer.close(left())
        self._closed = True
        if self._owns_store and self._store is not None:
            self._store.close(left())

    def stats(self) -> PromptCacheStats:
        """What this cache did since it was made, and the totals of its store."""
        store = None
        trouble = self._disk_trouble()
        if self._store is not None:
            try:
                store = self._store.stats()
            except StoreError as error:
                trouble = trouble or error
        queue = self._writer.waiting() if self._writer is not None else (0, 0)
        return self._tally.stats(
            memory=self.stats_by_type(),
            queue=queue,
            disk_off=self._memory_only if trouble is None else str(trouble),
            disk_error="" if trouble is None else type(trouble).__name__,
            store=store,
        )

    # ---- look up -----------------------------------------------------------------------------

    def _fetch(self, model: Hashable, packed: bytes) -> tuple[Any | None, Fetch]:
        limit = max(0, len(packed) // TOKEN_BYTES - self._leave_tokens)
        if self._writer is not None:
            self._writer.poke()
        self._computing_until = time.monotonic() + _LONGEST_ANSWER_S
        fingerprint = self._fingerprint(model)
        match = self._match(fingerprint, packed, limit)
        with self._lock:
            candidate = self._candidate(model, packed, limit)
        in_memory = -1 if candidate is None else candidate.num_tokens
        gain = match.num_tokens - max(0, in_memory)
        if (
            fingerprint is not None
            and self._store is not None
            and match.num_tokens
            and (in_memory <= 0 or gain >= _ENOUGH_GAIN_TOKENS)
        ):
            found = self._store.fetch(
                fingerprint, packed, self._codec.restore, limit=limit, min_tokens=in_memory + 1
            )
            if found is not None:
                cache, match = found
                self._store.touch(match)
                return cache, Fetch("disk", match.num_tokens, match.reason, 0.0, match.nbytes)
            match = Match(0, reason="what was stored could not be read")
        if candidate is None:
            return None, Fetch("miss", 0, match.reason)
        cache = self._hand_over(model, packed, limit)
        if cache is None:
            return None, Fetch("miss", 0, "the cache in memory was changed by its former owner")
        if self._store is not None and match.num_tokens:
            self._store.touch(match)
        return cache, Fetch("memory", candidate.num_tokens, match.reason)

    def _match(self, fingerprint: Fingerprint | None, packed: bytes, limit: int) -> Match:
        """What the disk has of a prompt; nothing, with the reason, when it cannot be asked."""
        if fingerprint is None or self._store is None:
            return Match(0, reason=self.disk_off)
        try:
            return self._store.match(fingerprint, packed, limit=limit)
        except StoreError as error:
            self._disk_failed(error)
            return Match(0, reason=str(error))

    def _candidate(self, model: Hashable, packed: bytes, limit: int) -> Candidate | None:
        """The best cache in memory whose owner left it as it was inserted."""
        while True:
            candidate = self._resident.search(model, packed, limit)
            if candidate is None:
                return None
            counted = self._codec.num_tokens(candidate.held.cache)
            if counted is None or counted == candidate.held.num_tokens:
                return candidate
            # Somebody went on decoding on a cache that he had handed over.
            self._resident.remove(candidate.held)
            self._tally.problem("changed_after_insert")

    def _hand_over(self, model: Hashable, packed: bytes, limit: int) -> Any | None:
        """Give a cache away, or a copy of it.

        A cache that is on disk is lent: decoding on a copy would copy all of it at the first
        token. Prompts that many conversations share stay, and are copied.
        """
        with self._lock:
            candidate = self._candidate(model, packed, limit)
            if candidate is None:
                return None
            held, used = candidate.held, candidate.num_tokens
            if held.saved and used == held.num_tokens and held.tier != Tier.SYSTEM.label:
                self._resident.remove(held)
                return held.cache
            self._resident.touch(held)
            cache = self._codec.copy_cache(held.cache)
        surplus = held.num_tokens - used
        if surplus and self._codec.trim(cache, surplus) != surplus:
            self._tally.problem("trim_failed")
            return None
        return cache

    def _account(self, tokens: Sequence[int], fetch: Fetch) -> None:
        self._tally.fetched(tokens, fetch)
        if self._store is not None and not self._closed:
            if fetch.source == "miss":
                self._store.count(f"misses:{kind_of_miss(fetch.reason)}")
            self._store.count("misses" if fetch.source == "miss" else f"hits_{fetch.source}")
            self._store.count("tokens_saved", fetch.num_tokens)

    def _fingerprint(self, model: Hashable) -> Fingerprint | None:
        if self._store is None or self._closed:
            return None
        fingerprint = self._identify(model)
        if fingerprint is None:
            reason = getattr(self._identify, "reason", None)
            said = reason(model) if callable(reason) else "its identity is unknown"
            self._memory_only = f"this model is kept in memory only: {said}"
        else:
            self._memory_only = ""
        return fingerprint

    # ---- keep and save -----------------------------------------------------------------------

    def _insert(
        self, model: Hashable, tokens: Sequence[int], cache: Any, cache_type: str, prefill_s: float
    ) -> None:
        tier = Tier.parse(cache_type)
        if self._writer is not None:
            self._writer.poke()
        if tier == Tier.ASSISTANT:
            self._computing_until = 0.0
        try:
            num_tokens = self._codec.prepare(cache, len(tokens))
        except UnsupportedCacheError as error:
            self._tally.problem(f"unsupported:{error.class_name}")
            log.warning("a prompt is not kept: %s", error)
            return
        packed = pack_tokens(tokens)
        surplus = num_tokens - self._kept_tokens(packed, num_tokens)
        if surplus:
            if not self._codec.can_trim(cache) or self._codec.trim(cache, surplus) != surplus:
                return
            num_tokens -= surplus
        packed = packed[: num_tokens * TOKEN_BYTES]
        nbytes = self._codec.nbytes(cache)
        prefill_s = prefill_s or self._tally.prefill_s(model, packed, tier)
        held = Held(model, packed, cache, nbytes, tier.label, prefill_s)
        if self._writer is not None and tier.label in self._persist and num_tokens > 0:
            # Now: by the time it is saved, the files may be those of another model.
            held.fingerprint = self._fingerprint(model)
            held.wanted = held.fingerprint is not None
        with self._lock:
            at_once = held.wanted and tier != Tier.ASSISTANT
            if at_once:
                self._save_later(held)
            if nbytes > self._resident.max_bytes:
                # Keeping it would flush everything else, and then itself.
                self._tally.problem("too_large_for_memory")
                self._spill([held])
                return
            self._spill(self._resident.add(held))

    def _kept_tokens(self, packed: bytes, num_tokens: int) -> int:
        """How much of a cache is to be kept: all of it, or as `cut_answer` said."""
        for cut in list(self._cuts):
            prompt, kept = cut
            if packed.startswith(prompt) or prompt.startswith(packed):
                if len(packed) > len(prompt):
                    # With the reply the answer has ended.
                    self._cuts.remove(cut)
                return min(kept, num_tokens)
        return num_tokens

    def _waiting(self) -> list[Held]:
        """Caches that are to be on disk, are not, and have no save under way."""
        with self._lock:
            return [held for held in self._resident.held() if held.wanted]

    def _save_when_idle(self) -> None:
        self._recover_store()
        waiting = self._waiting()
        for held in waiting:
            self._save_later(held)
        if self._store is not None and self._disk_error is not None and not waiting:
            # With nothing to save, only a commit of its own can tell whether the disk is back.
            self._store.count("disk_retries")
        self._flush_uses()
        self._merge_runs()

    def _recover_store(self) -> None:
        """Begin anew when the store's folder was removed; runs on the writer thread."""
        if self._store is None or not self._store.is_lost:
            return
        self._disk_failed(_removed(self._store))
        try:
            self._store.reopen()
        except StoreError as error:
            log.debug("the store could not be begun anew: %s", error)
            return
        self._disk_error = None
        log.warning("the store at %s was begun anew", self._store.root)
        with self._lock:
            for held in self._resident.held():
                if held.saved:
                    held.saved, held.wanted = False, True

    def _flush_uses(self) -> None:
        if self._store is None:
            return
        try:
            if self._store.flush():
                self._disk_error = None
        except StoreError as error:
            self._disk_failed(error)

    def _merge_runs(self) -> None:
        """Make the next restart's first answer of a long conversation faster, while idle."""
        store, writer = self._store, self._writer
        if store is None or writer is None or self._disk_error is not None:
            return
        try:
            store.merge_runs(lambda: writer.is_idle() and not self.is_busy())
        except StoreError as error:
            log.warning("the runs of a conversation could not be merged: %s", error)

    def _spill(self, gone: Sequence[Held]) -> None:
        """Save what leaves memory unsaved."""
        for held in gone:
            if held.wanted and not self._save_later(held):
                self._tally.problem("dropped_queue_full")
                log.warning("a prompt left memory unsaved: the queue of saves is full")

    def _save_later(self, held: Held) -> bool:
        """Queue a save; False when the queue is full and the cache has to wait."""
        if self._writer is None:
            return False
        with self._lock:
            if not held.wanted:
                return True
            try:
                source = self._codec.source(held.cache, held.num_tokens)
            except UnsupportedCacheError as error:
                held.wanted = False
                self._tally.problem(f"unsupported:{error.class_name}")
                log.warning("a prompt stays in memory: %s", error)
                return True
            rank = Tier.parse(held.tier)
            accepted = self._writer.submit(
                lambda: self._save(held, source), rank=rank, nbytes=held.nbytes
            )
            if accepted:
                held.wanted = False
            return accepted

    def _save(self, held: Held, source: Source) -> None:
        """Write one cache; runs on the writer thread, and touches bytes only."""
        if held.fingerprint is None or self._store is None:
            return
        self._recover_store()
        # Whoever kept the one before waiting keeps them all waiting.
        patience_s = 1.0 if isinstance(self._disk_error, StoreBusyError) else None
        try:
            with self._store.patient(patience_s):
                result = self._store.put(
                    held.fingerprint, held.packed, source, tier=held.tier, prefill_s=held.prefill_s
                )
        except StoreError as error:
            self._disk_failed(error)
            with self._lock:
                held.wanted = True  # tried again when idle, or when it leaves memory
            return
        with self._lock:
            held.saved = True
            self._disk_error = None
        self._tally.saved(result.nbytes)

    def _disk_failed(self, error: StoreError) -> None:
        self._tally.problem(f"disk:{type(error).__name__}")
        if str(error) != str(self._disk_error):
            log.warning("the disk is not used: %s", error)
        self._disk_error = error

    def _disk_trouble(self) -> StoreError | None:
        """What keeps the disk from being used, as of the last attempt."""
        if self._store is not None and self._store.is_lost:
            return _removed(self._store)
        if self._store is not None and (why := self._store.waits_for):
            return StoreBusyError(why)
        return self._disk_error


class _Deadline:
    """Seconds that are left of a time limit, whenever it is asked; None for no limit."""

    def __init__(self, timeout_s: float | None) -> None:
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    def __call__(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def _removed(store: Store) -> StoreAccessError:
    return StoreAccessError(f"The folder {store.root} was removed.")
