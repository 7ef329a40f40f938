"""PromptCache: live caches in memory over a store on disk; replaces mlx-lm's `LRUPromptCache`.

Look-ups take the longer of memory and disk. Inserts keep the cache in memory and save it behind
the answer: `system` and `user` at once, `assistant` when it leaves memory, when the process is
idle, at `flush` and at `close`. Nothing here raises into a generation thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from persist_cache.blobs.reader import BlobReader
from persist_cache.cache.late_store import LateStore
from persist_cache.cache.live_caches import Candidate, Held, LiveCaches, Resident
from persist_cache.cache.owners import Owner, Owners
from persist_cache.cache.stats import Fetch, PromptCacheStats, RecentFetch, Tally
from persist_cache.cache.write_behind import WriteBehind
from persist_cache.entry import TIER_LABELS, Match, Tier
from persist_cache.errors import (
    StoreAccessError,
    StoreBusyError,
    StoreError,
    UnsupportedCacheError,
)
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.fingerprint.loads import Unidentified
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.prefill.clock import Prefills
from persist_cache.store.kin import STORED_OTHERWISE
from persist_cache.store.put import Source
from persist_cache.store.reasons import UNREADABLE, kind_of_reason, why_no_more
from persist_cache.store.store import Store
from persist_cache.tokens import TOKEN_BYTES, pack_tokens

log = logging.getLogger(__name__)

_LONGEST_ANSWER_S = 600.0
_ENOUGH_GAIN_TOKENS = 32
"""Reading the disk beats a shorter cache in memory only for more than a few tokens."""


class Codec(LiveCaches, Protocol):
    """Between mlx-lm caches and bytes; `persist_cache.tensors` is the one for mlx-lm.

    It may also have `witness(cache)`, which gives a `resident.Witness`: then a cache is let go
    that its former owner changed without changing its length.
    """

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


class _Taken(NamedTuple):
    """What memory gave for a prompt: a cache, if it is to be used, its length and its cost.

    `parting` is what `Resident.parting` said before it was given away.
    """

    cache: Any | None
    num_tokens: int
    parting: tuple[int, bool]
    prefill_s: float = 0.0


def _rest(tokens: Sequence[int], num_tokens: int) -> Sequence[int]:
    """What follows the leading tokens, also of a sequence that has no slices, such as a deque."""
    if not num_tokens:
        return tokens
    try:
        return tokens[num_tokens:]
    except (TypeError, KeyError):
        return list(tokens)[num_tokens:]


class PromptCache:
    """A prompt cache that survives the process; drop-in for `mlx_lm.models.cache.LRUPromptCache`.

    With `store=None` it keeps caches in memory only.

    `fetch_nearest_cache` hands a cache over: the caller owns it and may decode on it.
    `insert_cache` takes a cache over: do not use it after that.

    What is kept is found only for the weights that computed it. A program that loads a model again
    under the same key says so with `identify_now`.

    Thread safety: all methods may be called from any thread, except that a cache must be inserted
    on the thread that computed it (MLX streams are thread-local). `_lock` guards the bookkeeping;
    it is not held while a disk is read or written. A cache is chosen and given away within one
    hold of it, so what is reported of a cache is true of that cache.
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
        open_store: Callable[[], Store] | None = None,
        prefill_clock: Callable[[], float] | None = None,
    ) -> None:
        """Make an empty memory over `store`.

        Args:
            max_size: Caches kept in memory.
            max_bytes: Bytes of caches kept in memory.
            store: An open store, which stays its opener's to close; or a folder, which is opened
                here and closed by `close`.
            identify: Gives the fingerprint of a `model` as `fetch_nearest_cache` gets it, or None
                when it cannot be identified: such models stay in memory. The default is an
                `Identifier`, which knows mlx-lm's model keys. Anything without its methods
                `settled` and `load_number` is called at every look-up and insert, so it must be
                fast; when its answer changes, what was kept for the former one is found no more.
            leave_tokens: Tokens of a prompt that are always left to compute. A server needs 1:
                with 0, the resend of a known prompt leaves nothing to start from.
            persist: Labels of the tiers that go to disk.
            idle_s: Seconds without requests after which `assistant` caches are saved.
            queue_bytes: Cache memory that waiting saves may keep alive.
            codec: How caches become bytes; mlx-lm's by default.
            disk_off: Why there is no `store`, for whoever asks; unused when there is one.
            open_store: Opens the store that there is none of yet, unless it raises a `StoreError`,
                which `disk_off` says from then on. It is tried on the writer thread, when the
                process is idle, every five `idle_s`, and by `flush`. What it gives is used from
                then on, for what is in memory as well, and closed by `close`.
            prefill_clock: Seconds by which prefill is timed, `time.monotonic` by default. A server
                has one that stands still while it does other things, such as decoding for others.

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
        self._prefills = Prefills(prefill_clock)
        self._memory_only = "" if store is not None else disk_off
        self._disk_error: StoreError | None = None
        if (store is not None or open_store is not None) and codec.group_size() > 1:
            # Every rank has a shard of each layer, and all would have the same fingerprint.
            store, self._memory_only = None, "several ranks share one model; shards are not stored"
            open_store = None
        self._late: LateStore | None = None
        if store is None and open_store is not None:
            # Somewhat less than the pauses of idle work, else every other one would be too early.
            self._late = LateStore(open_store, disk_off, 4 * idle_s)
        self._owns_store = store is not None and not isinstance(store, Store)
        self._store = store if isinstance(store, Store) or store is None else Store.open(store)
        self._owners = Owners(identify or Identifier())
        self._current: dict[Hashable, Owner] = {}
        """Per model key, whose KV is kept in memory."""
        self._computing_until = 0.0
        self.is_busy: Callable[[], bool] = lambda: time.monotonic() < self._computing_until
        """Asked before files are merged: whether an answer is being computed. A server knows;
        else it is so from a look-up to the insert of the reply, for ten minutes at most."""
        self.on_disk: Callable[[], None] = lambda: None
        """Called on the writer thread whenever the store's folder is there again, or at last."""
        self._why_lost = ""
        """Why a store whose folder was removed could not be begun anew."""
        self._closed = False
        self._told: set[str] = set()
        self._pid = os.getpid()
        self._cuts: deque[tuple[Owner | None, bytes, int]] = deque(maxlen=16)
        self._writer: WriteBehind | None = None
        if self._late is not None or (self._store is not None and not self._store.read_only):
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
    def store(self) -> Store | None:
        """The store behind it, or None where there is none, or not yet."""
        return self._store

    @property
    def disk_off(self) -> str:
        """Why nothing is kept on disk at present; "" when it is."""
        error = self._disk_trouble()
        return self._memory_only if error is None else str(error)

    @property
    def eviction_paused(self) -> str:
        """Why nothing is evicted for the free-space floor at present; "" when it may be."""
        if self._store is None or self._closed:
            return ""
        try:
            return self._store.eviction_paused
        except StoreError:
            return ""  # which `disk_off` says

    @property
    def last_fetch(self) -> Fetch:
        """How the calling thread's most recent `fetch_nearest_cache` was answered.

        A thread that never called it sees the most recent of all threads.
        """
        return self._tally.last_fetch() or Fetch("miss", 0)

    def recent_fetches(self) -> list[RecentFetch]:
        """The latest prompts, by length and digest, and how they were answered, oldest first."""
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
        cache, rest, _ = self.look_up(model, tokens)
        return cache, rest

    def look_up(
        self, model: Hashable, tokens: Sequence[int], *, counted: bool = True
    ) -> tuple[Any | None, Sequence[int], Fetch]:
        """As `fetch_nearest_cache`, with its outcome.

        Args:
            model: mlx-lm's model key.
            tokens: The prompt.
            counted: Whether it is a client's request. Others are in no statistics.

        Returns:
            Cache and rest, and how the request was answered.
        """
        started = time.monotonic()
        packed: bytes | None = None
        try:
            if not hasattr(tokens, "__getitem__"):
                tokens = list(tokens)  # what can be read only once
            packed = pack_tokens(tokens)
            cache, fetch = self._fetch(model, packed, counted)
            self._prefills.begun(model, packed, fetch.num_tokens, fetch.prefill_s)
        except Exception as error:
            log.exception("a look-up failed; the prompt is computed anew")
            self._tally.problem(f"fetch_failed:{type(error).__name__}")
            cache, fetch = None, Fetch("miss", 0, "the look-up failed")
        fetch = replace(fetch, seconds=time.monotonic() - started)
        if counted:
            try:
                self._account(len(tokens), packed, fetch)
            except Exception:
                log.exception("a look-up could not be counted")
        return cache, _rest(tokens, fetch.num_tokens), fetch

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
            prefill_s: Seconds that computing all of `tokens` takes, if known, from which `stats`
                tells what a hit saves. Else it is added up: what was fetched cost when that was
                computed, and the time since the fetch.
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

    def identify_now(self, model: Hashable) -> Fingerprint | Unidentified:
        """Identify a model that was just loaded, instead of at the next look-up.

        The identity is that of the model's files at the time of the call, so call it right after
        loading, and after every later load of the same model key. What is in memory for that key
        is found afterwards only if it was computed by the same weights. Else it goes: to the disk
        if it was to be there, under the identity it was computed with.

        It is not needed after `persist_cache.load`, which knows more than the files do: what was
        loaded with a `model_config`, a `revision`, or an adapter that the key does not name has
        no identity after this call.

        Args:
            model: mlx-lm's model key.

        Returns:
            The fingerprint, or why there is none: then what is computed now stays in memory only.
        """
        try:
            found = self._owners.identify_now(model)
            self._owner(model)
        except Exception as error:
            # An `identify` of the caller's.
            log.exception("a model could not be identified")
            return Unidentified(f"it cannot be identified: {type(error).__name__}: {error}")
        return found

    def read_ahead(self, model: Hashable, tokens: Sequence[int]) -> int:
        """Have the system read what a fetch of this prompt would, for a request that waits.

        Runs no MLX operation and identifies no model, so any thread may call it, and counts
        nothing.

        Returns:
            Bytes of the files; 0 when memory serves the prompt, or nothing was asked of the model
            yet.
        """
        with self._nothing_raised():
            if self._store is None:
                return 0
            owner = self._owners.of(model, may_read=False)
            packed = pack_tokens(tokens)
            match = self._match(owner, packed, len(tokens))
            with self._lock:
                in_memory = self._resident.common_tokens(owner, packed)
            if match.num_tokens - in_memory < _ENOUGH_GAIN_TOKENS:
                return 0
            nbytes = self._store.read_ahead(match)
            self._tally.read_ahead(nbytes)
            return nbytes
        return 0

    def cut_answer(
        self, tokens: Sequence[int], num_tokens: int, *, model: Hashable | None = None
    ) -> None:
        """Of the next answer to a prompt, keep the cache of its first `num_tokens` and no more.

        For a prompt that is run to have its beginning computed. What cannot be cut there is not
        kept.

        Args:
            tokens: The prompt.
            num_tokens: How much of it to keep.
            model: mlx-lm's model key; answers of other weights are not cut. Any answer when None,
                none when it cannot be told whose they are.
        """
        with self._nothing_raised():
            owner = None if model is None else self._owners.of(model, may_read=False)
            packed = pack_tokens(tokens)
            with self._lock:
                self._cuts.append((owner, packed, num_tokens))

    def known_tokens(self, model: Hashable, tokens: Sequence[int]) -> int:
        """Length of the longest prefix that a fetch would serve; looks only, counts nothing."""
        return self._known(model, tokens)[0]

    def outlook(self, model: Hashable, tokens: Sequence[int]) -> tuple[int, int]:
        """What a request with this prompt would get now; looks only, counts nothing.

        Returns:
            Tokens that would not be computed, and how many memory alone would serve. Nothing where
            the look-up would fail.
        """
        with self._nothing_raised():
            packed = pack_tokens(tokens)
            limit = max(0, len(tokens) - self._leave_tokens)
            owner = self._owners.of(model, may_read=self._wants_disk)
            with self._lock:
                candidate = self._candidate(owner, packed, limit)
            in_memory = 0 if candidate is None else candidate.num_tokens
            on_disk = self._match(owner, packed, limit).num_tokens
            reads_disk = in_memory == 0 or on_disk - in_memory >= _ENOUGH_GAIN_TOKENS
            return (max(on_disk, in_memory) if reads_disk else in_memory), in_memory
        return 0, 0

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
        if common == 0:
            return 0
        common = min(common, len(tokens) - 1)
        return common if common - known >= min_gain_tokens else 0

    def _known(self, model: Hashable, tokens: Sequence[int]) -> tuple[int, int]:
        """Tokens that can be served, and tokens shared with anything that is known."""
        with self._nothing_raised():
            packed = pack_tokens(tokens)
            owner = self._owners.of(model, may_read=self._wants_disk)
            with self._lock:
                candidate = self._candidate(owner, packed, len(tokens))
                common = self._resident.common_tokens(owner, packed)
            known = 0 if candidate is None else candidate.num_tokens
            match = self._match(owner, packed, len(tokens))
            return max(known, match.num_tokens), max(common, match.common_tokens)
        return 0, 0

    @contextlib.contextmanager
    def _nothing_raised(self) -> Iterator[None]:
        """Count and log what goes wrong in a look, and go on behind the block."""
        try:
            yield
        except Exception:
            log.exception("a look-up failed")
            self._tally.problem("look_up_failed")

    def flush(self, timeout_s: float | None = None) -> bool:
        """Save everything that is to be on disk and is not yet, and wait for it.

        Returns:
            Whether all of it is on disk.
        """
        if self._writer is None:
            return True
        if self._writer.on_thread():
            raise RuntimeError("flush() must not be called from a save")
        if os.getpid() != self._pid:
            return False  # the thread that saves is the parent's
        left = _Deadline(timeout_s)
        if self._store is None:
            self._writer.submit(self._try_late_store, rank=Tier.SYSTEM, nbytes=0)
        done = self._writer.drain(left())
        if self._store is None:
            with self._lock:
                return not any(held.tier in self._persist for held in self._resident.held())
        # The queue is bounded, so what waits in memory goes in portions.
        while done and (waiting := self._waiting()):
            for held in waiting:
                self._save_later(held)
            done = self._writer.drain(left()) and not all(held.wanted for held in waiting)
        self._let_go_of_former()
        self._flush_uses(left())
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
        with self._lock:
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

    def _fetch(self, model: Hashable, packed: bytes, counted: bool) -> tuple[Any | None, Fetch]:
        limit = max(0, len(packed) // TOKEN_BYTES - self._leave_tokens)
        if self._writer is not None:
            self._writer.poke()
        self._computing_until = time.monotonic() + _LONGEST_ANSWER_S
        owner = self._owner(model)
        self._owners.asked(owner, packed)
        cache, fetch = self._answer(owner, packed, limit, counted)
        if cache is not None:
            self._owners.gave(owner, cache)
        return cache, fetch

    def _answer(
        self, owner: Owner, packed: bytes, limit: int, counted: bool
    ) -> tuple[Any | None, Fetch]:
        """The longer of memory and disk, what it is, and why it is no more."""
        match = self._match(owner, packed, limit)
        asks_disk = self._uses_disk and owner.fingerprint is not None
        taken = self._take(owner, packed, limit, on_disk=match)
        parting = taken.parting
        if taken.cache is None and match.num_tokens:
            found = self._load(owner, packed, match, limit, taken.num_tokens + 1, counted)
            if found is not None:
                cache, match = found
                used = match.num_tokens
                why = why_no_more(used, limit, match, parting, asked_disk=asks_disk)
                return cache, Fetch("disk", used, why, 0.0, match.nbytes, match.saved_s)
            match = Match(0, reason=UNREADABLE)
            taken = self._take(owner, packed, limit, on_disk=match)
        used = 0 if taken.cache is None else taken.num_tokens
        why = why_no_more(used, limit, match, parting, asked_disk=asks_disk)
        if taken.cache is None:
            return None, Fetch("miss", 0, why)
        if counted and self._store is not None and match.num_tokens:
            self._store.touch(match, num_tokens=used)
        return taken.cache, Fetch("memory", used, why, prefill_s=taken.prefill_s)

    def _match(self, owner: Owner, packed: bytes, limit: int) -> Match:
        """What the disk has of a prompt; nothing, with the reason, when it cannot be asked."""
        if self._store is None or self._closed:
            return Match(0, reason=self.disk_off)
        if owner.fingerprint is None:
            return Match(0, reason=_only_in_memory(owner))
        try:
            return self._store.match(owner.fingerprint, packed, limit=limit)
        except StoreError as error:
            if not self._closed:  # else it was closed by us while it was asked
                self._disk_failed(error)
            return Match(0, reason=str(error))

    def _load(
        self,
        owner: Owner,
        packed: bytes,
        match: Match,
        limit: int,
        min_tokens: int,
        counted: bool,
    ) -> tuple[Any, Match] | None:
        """Read what was found on the disk, or what is there by now; None if that is too little."""
        if self._store is None or owner.fingerprint is None:
            return None
        started = time.monotonic()
        found = self._store.load(
            owner.fingerprint,
            packed,
            match,
            self._codec.restore,
            limit=limit,
            min_tokens=min_tokens,
        )
        if found is not None and counted:
            self._store.touch(found[1], spent_s=time.monotonic() - started)
        return found

    def _take(self, owner: Owner, packed: bytes, limit: int, *, on_disk: Match) -> _Taken:
        """Give away the best cache in memory, unless the disk's is worth reading instead.

        Returns:
            The cache and its length; without a cache, the length of the one that stays behind.
        """
        with self._lock:
            while (candidate := self._candidate(owner, packed, limit)) is not None:
                used, parting = candidate.num_tokens, self._resident.parting(owner, packed)
                gain = on_disk.num_tokens - used
                if on_disk.num_tokens and (used <= 0 or gain >= _ENOUGH_GAIN_TOKENS):
                    return _Taken(None, used, parting)
                cache = self._give(candidate)
                if cache is not None:
                    return _Taken(cache, used, parting, _cost(candidate, on_disk))
                self._tally.problem("trim_failed")
                self._resident.remove(candidate.held)
                self._spill([candidate.held])
            return _Taken(None, 0, self._resident.parting(owner, packed))

    def _candidate(self, owner: Owner, packed: bytes, limit: int) -> Candidate | None:
        """The best cache in memory that is as it was inserted; the caller holds the lock."""
        while True:
            candidate = self._resident.search(owner, packed, limit)
            if candidate is None or self._is_unchanged(candidate.held):
                return candidate

    def _is_unchanged(self, held: Held) -> bool:
        """Whether a cache is as it was inserted; lets go of one that is not.

        Its caller may have decoded on, or trimmed it and computed other tokens.
        """
        counted = self._codec.num_tokens(held.cache)
        has_length = counted is None or counted == held.num_tokens
        if has_length and (held.witness is None or held.witness.fits(held.cache)):
            return True
        held.wanted = False
        self._resident.remove(held)
        self._tally.problem("changed_after_insert")
        return False

    def _give(self, candidate: Candidate) -> Any | None:
        """Give a cache away, or a copy of it; the caller holds the lock.

        A cache that is on disk is lent: decoding on a copy would copy all of it at the first
        token. Prompts that many conversations share stay, and are copied.

        Returns:
            The cache, cut to the candidate's length; None if that cannot be done.
        """
        held, used = candidate.held, candidate.num_tokens
        if held.saved and used == held.num_tokens and held.tier != Tier.SYSTEM.label:
            self._resident.remove(held)
            held.witness = None  # with its references, the next token would copy all of it
            return held.cache
        self._resident.touch(held)
        cache = self._codec.copy_cache(held.cache)
        surplus = held.num_tokens - used
        if surplus and self._codec.trim(cache, surplus) != surplus:
            return None
        return cache

    def _account(self, num_tokens: int, packed: bytes | None, fetch: Fetch) -> None:
        self._tally.fetched(num_tokens, packed, fetch)
        if self._store is not None and not self._closed:
            if fetch.source == "miss":
                self._tell_of_kin(fetch.reason)
                self._store.count(f"misses:{kind_of_reason(fetch.reason)}")
            elif fetch.reason:
                self._store.count(f"partial:{kind_of_reason(fetch.reason)}")
            self._store.count("misses" if fetch.source == "miss" else f"hits_{fetch.source}")
            self._store.count("tokens_saved", fetch.num_tokens)
            # Counted since later than that one, and together: of these there is a ratio.
            self._store.count("tokens_reused", fetch.num_tokens)
            self._store.count("tokens_asked", num_tokens)

    def _tell_of_kin(self, reason: str) -> None:
        """Say once in the log that what is stored for a model cannot be used as it is now."""
        if reason.startswith(STORED_OTHERWISE) and reason not in self._told:
            self._told.add(reason)
            log.warning("prompts of this model are on disk, but %s", reason)

    @property
    def _uses_disk(self) -> bool:
        return self._store is not None and not self._closed

    @property
    def _wants_disk(self) -> bool:
        """Whether there is a disk, or may be later: what is kept now is to be found there then."""
        return (self._store is not None or self._late is not None) and not self._closed

    def _owner(self, model: Hashable) -> Owner:
        """Whose KV a model computes now; what others left under its key goes."""
        owner = self._owners.of(model, may_read=self._wants_disk)
        if self._uses_disk:
            self._memory_only = "" if owner.fingerprint is not None else _only_in_memory(owner)
        with self._lock:
            former = self._current.get(model, owner)
            if former != owner and owner.is_older(former):
                return owner  # this thread was overtaken by a load
            self._current[model] = owner
            if former != owner:
                self._let_go_of_former()
        return owner

    def _let_go_of_former(self) -> None:
        """Let go of what other weights computed under a model key that is used now.

        What is to be on disk goes there, under the identity it was computed with; while the queue
        of saves is full it stays, found by nobody.
        """
        with self._lock:
            for held in self._resident.held():
                current = self._current.get(held.owner.model, held.owner)
                if held.owner != current and (not held.wanted or self._save_later(held)):
                    self._resident.remove(held)

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
        owner = self._owner(model)
        ends = tier == Tier.ASSISTANT
        if self._owners.is_of_another(owner, packed, cache, ends=ends):
            # Begun before the model was loaded again, it is neither's.
            self._tally.problem("computed_before_reload")
            log.warning("a prompt is not kept: its model was loaded again while it was computed")
            return
        surplus = num_tokens - self._kept_tokens(owner, packed, num_tokens)
        seen = packed[: num_tokens * TOKEN_BYTES]
        prefill_s = prefill_s or self._prefills.ended(model, seen, tier)
        if surplus:
            if not self._codec.can_trim(cache) or self._codec.trim(cache, surplus) != surplus:
                return
            prefill_s *= 1 - surplus / num_tokens
            num_tokens -= surplus
        packed = packed[: num_tokens * TOKEN_BYTES]
        nbytes = self._codec.nbytes(cache)
        held = Held(owner, packed, cache, nbytes, tier.label, prefill_s)
        witness = getattr(self._codec, "witness", None)
        held.witness = None if witness is None else witness(cache)
        self._try_late_store_soon()
        with self._lock:
            held.wanted = self._is_for_disk(held)
            if self._current.get(model, owner) != owner:
                # Another thread has seen a later load meanwhile.
                self._spill([held])
                return
            at_once = held.wanted and tier != Tier.ASSISTANT
            if at_once:
                self._save_later(held)
            if nbytes > self._resident.max_bytes:
                # Keeping it would flush everything else, and then itself.
                self._tally.problem("too_large_for_memory")
                self._spill([held])
                return
            self._spill(self._resident.add(held))

    def _is_for_disk(self, held: Held) -> bool:
        """Whether a cache that is not on disk is to be saved; the caller holds the lock."""
        return (
            self._uses_disk
            and self._writer is not None
            and held.tier in self._persist
            and held.num_tokens > 0
            and held.owner.fingerprint is not None
        )

    def _kept_tokens(self, owner: Owner, packed: bytes, num_tokens: int) -> int:
        """How much of a cache is to be kept: all of it, or as `cut_answer` said."""
        with self._lock:
            for cut in self._cuts:
                wanted, prompt, kept = cut
                if wanted is not None and not wanted.is_same_load(owner):
                    continue
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
        if self._late is not None and self._store is None and self._late.claim():
            self._try_late_store()
        self._recover_store()
        waiting = self._waiting()
        for held in waiting:
            self._save_later(held)
        self._let_go_of_former()
        if self._store is not None and self._disk_error is not None and not waiting:
            # With nothing to save, only a commit of its own can tell whether the disk is back.
            self._store.count("disk_retries")
        self._flush_uses()
        self._merge_runs()

    def _try_late_store_soon(self) -> None:
        """Have the writer thread try it if it is time: a busy process is never idle."""
        late, writer = self._late, self._writer
        if late is not None and self._store is None and writer is not None and late.claim():
            writer.submit(self._try_late_store, rank=Tier.SYSTEM, nbytes=0)

    def _try_late_store(self) -> None:
        """Use the store that could not be opened before, if it can be; on the writer thread."""
        late = self._late
        if late is None or self._store is not None or self._closed:
            return
        store = late.attempt()
        if store is None:
            self._memory_only = late.reason
            return
        self._say_on_disk()
        with self._lock:
            if not self._closed:
                # Nobody has seen it before, and it stays from now on.
                self._store, self._owns_store, self._memory_only = store, True, ""
                for held in self._resident.held():
                    held.wanted = self._is_for_disk(held)
        if self._store is None:
            store.close()
            return
        log.warning("the store at %s is used from now on", store.root)

    def _say_on_disk(self) -> None:
        try:
            self.on_disk()
        except Exception:
            log.exception("what follows the store could not be done")

    def _recover_store(self) -> None:
        """Begin anew when the store's folder was removed; runs on the writer thread."""
        if self._store is None or not self._store.is_lost:
            return
        if not self._why_lost:
            self._disk_failed(_removed(self._store))
        try:
            self._store.reopen()
        except StoreError as error:
            self._why_lost = str(error)
            log.debug("the store could not be begun anew: %s", error)
            return
        self._why_lost = ""
        self._say_on_disk()
        self._disk_error = None
        log.warning("the store at %s was begun anew", self._store.root)
        with self._lock:
            for held in self._resident.held():
                if held.saved:
                    held.saved, held.wanted = False, True

    def _flush_uses(self, patience_s: float | None = None) -> None:
        if self._store is None:
            return
        try:
            with self._store.patient(patience_s):
                if self._store.flush():
                    self._disk_error = None
        except StoreError as error:
            if patience_s is not None and isinstance(error, StoreBusyError):
                return  # the caller's time is over, which says nothing of the disk
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
            if not held.wanted or not self._is_unchanged(held):
                return True
            try:
                # Only the job holds it: a cache that is lent after it must have no other reader.
                sources = [self._codec.source(held.cache, held.num_tokens)]
            except UnsupportedCacheError as error:
                held.wanted = False
                self._tally.problem(f"unsupported:{error.class_name}")
                log.warning("a prompt stays in memory: %s", error)
                return True
            if not self._is_unchanged(held):
                return True  # changed while its bytes were taken
            rank = Tier.parse(held.tier)
            accepted = self._writer.submit(
                lambda: self._save(held, sources), rank=rank, nbytes=held.nbytes
            )
            if accepted:
                held.wanted = False
            return accepted

    def _save(self, held: Held, sources: list[Source]) -> None:
        """Write one cache; runs on the writer thread, and touches bytes only."""
        fingerprint = held.owner.fingerprint
        if fingerprint is None or self._store is None:
            return
        self._recover_store()
        # Whoever kept the one before waiting keeps them all waiting.
        patience_s = 1.0 if isinstance(self._disk_error, StoreBusyError) else None
        try:
            with self._store.patient(patience_s):
                result = self._store.put(
                    fingerprint,
                    held.packed,
                    sources.pop(),
                    tier=held.tier,
                    prefill_s=held.prefill_s,
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
            return _removed(self._store, self._why_lost)
        if self._store is not None and (why := self._store.waits_for):
            return StoreBusyError(why)
        return self._disk_error


def _only_in_memory(owner: Owner) -> str:
    return f"this model is kept in memory only: {owner.reason}"


def _cost(candidate: Candidate, match: Match) -> float:
    """Seconds that computing what memory serves took; 0 when nobody measured."""
    used, held = candidate.num_tokens, candidate.held
    if match.num_tokens == used and match.saved_s:
        return match.saved_s  # the disk knows each entry on the way
    return held.prefill_s * used / held.num_tokens if used else 0.0


class _Deadline:
    """Seconds that are left of a time limit, whenever it is asked; None for no limit."""

    def __init__(self, timeout_s: float | None) -> None:
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    def __call__(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def _removed(store: Store, why_not_again: str = "") -> StoreAccessError:
    said = f"The folder {store.root} was removed."
    if why_not_again:
        said = f"{said[:-1]}, and cannot be made again: {why_not_again}"
    return StoreAccessError(said)
