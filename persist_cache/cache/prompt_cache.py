"""PromptCache: live caches in memory over a store on disk; replaces mlx-lm's `LRUPromptCache`.

This is what a server calls. `lookup` finds the longer of memory and disk, `keeper` takes caches
over, `saver` has them on disk behind the answer. Nothing here raises into a generation thread.
More than half of the lines say what a call does, for those who use the library.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from threading import RLock
from typing import Any, NamedTuple

from persist_cache.cache.ahead import Ahead
from persist_cache.cache.keeper import Keeper
from persist_cache.cache.live_caches import Resident
from persist_cache.cache.lookup import Lookup
from persist_cache.cache.origin import Origin
from persist_cache.cache.owners import Owner, Owners
from persist_cache.cache.saver import Saver
from persist_cache.cache.stats import Fetch, FromRemote, PromptCacheStats, RecentFetch, Tally
from persist_cache.codec import Codec
from persist_cache.entry import TIER_LABELS, Match, MissReason, Tier
from persist_cache.errors import StoreError
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.fingerprint.loads import Unidentified
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.prefill.clock import Prefills
from persist_cache.store.reasons import kind_of_reason, sentence
from persist_cache.store.store import Store
from persist_cache.store.trail import Trail
from persist_cache.tokens import TOKEN_BYTES, pack_tokens

log = logging.getLogger(__name__)

_LONGEST_ANSWER_S = 600.0


def _rest(tokens: Sequence[int], num_tokens: int) -> Sequence[int]:
    """What follows the leading tokens, also of a sequence that has no slices, such as a deque."""
    if not num_tokens:
        return tokens
    try:
        return tokens[num_tokens:]
    except (TypeError, KeyError):
        return list(tokens)[num_tokens:]


class KnownPrompt(NamedTuple):
    """What is known of a prompt, for a caller that may have more of it.

    Attributes:
        fingerprint: Of the model.
        packed: The prompt.
        num_tokens: Of it, that need not be computed.
        limit: That a look-up would use at most.
    """

    fingerprint: Fingerprint
    packed: bytes
    num_tokens: int
    limit: int


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
        persist = frozenset(Tier.parse(label).label for label in persist)
        if codec is None:
            from persist_cache import tensors

            codec = tensors
        self._leave_tokens = leave_tokens
        self._lock = RLock()
        self._tally = Tally()
        self._resident = Resident(codec, max_size, max_bytes, self._tally)
        self._prefills = Prefills(prefill_clock)
        self._owners = Owners(identify or Identifier())
        self._told: set[str] = set()
        self._computing_until = 0.0
        self.is_busy: Callable[[], bool] = lambda: time.monotonic() < self._computing_until
        """Asked before files are merged: whether an answer is being computed. A server knows;
        else it is so from a look-up to the insert of the reply, for ten minutes at most."""
        self.on_disk: Callable[[], None] = lambda: None
        """Called on the writer thread whenever the store's folder is there again, or at last."""
        self.on_use: Callable[[Sequence[str]], None] = lambda entries: None
        """Called on the thread that looks up with the ids of the entries that a request used,
        shallowest first; not for one with a salt, or that keeps nothing. It must not wait."""
        self._saver = Saver(
            codec,
            self._resident,
            self._lock,
            self._tally,
            store=store,
            open_store=open_store,
            disk_off=disk_off,
            persist=persist,
            idle_s=idle_s,
            queue_bytes=queue_bytes,
            is_busy=lambda: self.is_busy(),
            on_disk=lambda: self.on_disk(),
        )
        self._lookup = Lookup(
            codec, self._resident, self._lock, self._saver, self._tally, self._used
        )
        self._keeper = Keeper(
            codec,
            self._resident,
            self._lock,
            self._owners,
            self._saver,
            self._prefills,
            self._tally,
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
        return self._saver.store

    @property
    def disk_off(self) -> str:
        """Why nothing is kept on disk at present; "" when it is."""
        return self._saver.disk_off

    @property
    def eviction_paused(self) -> str:
        """Why nothing is evicted for the free-space floor at present; "" when it may be."""
        store = self._saver.disk
        if store is None:
            return ""
        try:
            return store.eviction_paused
        except StoreError:
            return ""  # which `disk_off` says

    def count_repairs(self, names: Iterable[str]) -> None:
        """Count a request that was changed before it was rendered, by the names of the repairs."""
        self._tally.repaired(names)

    def count_shared(self, num_tokens: int) -> None:
        """Count a request that waited until another one had computed so many of its tokens."""
        self._tally.shared(num_tokens)

    def prefill_s(self, model: Hashable, num_tokens: int) -> float:
        """What computing so many tokens takes, by earlier prefills; 0 when too few were timed."""
        return self._prefills.value(model, num_tokens)

    @property
    def last_fetch(self) -> Fetch:
        """How the calling thread's most recent `fetch_nearest_cache` was answered.

        A thread that never called it sees the most recent of all threads.
        """
        return self._tally.last_fetch() or Fetch("miss", 0)

    @property
    def queued_jobs(self) -> int:
        """Saves that wait or are under way; the store is not asked."""
        return self._saver.queue()[0]

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
        self,
        model: Hashable,
        tokens: Sequence[int],
        *,
        counted: bool = True,
        trail: Trail | None = None,
        origin: Origin | None = None,
        leave_tokens: int = 0,
        to_copy: bool = False,
        ahead: Ahead | None = None,
        remote: FromRemote | None = None,
    ) -> tuple[Any | None, Sequence[int], Fetch]:
        """As `fetch_nearest_cache`, with its outcome.

        Args:
            model: mlx-lm's model key.
            tokens: The prompt.
            counted: Whether it is a client's request. Others are in no statistics.
            trail: Of the request, if it has other looks: the index is walked once for all.
            origin: Of the request, for the inserts that follow; filled in.
            leave_tokens: Tokens at the end of the prompt that are to be computed in any case, if
                more than the cache leaves by itself.
            to_copy: The caller copies the cache before it writes to it, as a batch does: it stays
                in memory, and so does one that is read from the disk.
            ahead: What `load_ahead` read for this request.
            remote: What a remote said of the prompt just before; if it gave more than was known,
                a hit that is longer than that counts as the remote's.

        Returns:
            Cache and rest, and how the request was answered.
        """
        started = time.monotonic()
        packed: bytes | None = None
        try:
            if not hasattr(tokens, "__getitem__"):
                tokens = list(tokens)  # what can be read only once
            packed = pack_tokens(tokens)
            leave = max(leave_tokens, self._leave_tokens)
            limit = max(0, len(packed) // TOKEN_BYTES - leave)
            cache, fetch = self._fetch(model, packed, limit, counted, trail, origin, to_copy, ahead)
            prefill = self._prefills.begun(
                model, packed, fetch.num_tokens, fetch.prefill_s, remember=origin is None
            )
            if origin is not None:
                origin.prefill = prefill
        except Exception as error:
            log.exception("a look-up failed; the prompt is computed anew")
            self._tally.problem(f"fetch_failed:{type(error).__name__}")
            why = MissReason.LOOK_UP_FAILED
            cache, fetch = None, Fetch("miss", 0, sentence(why), why=why)
        if remote is not None and remote.num_tokens and fetch.num_tokens > remote.known_tokens:
            fetch = replace(fetch, source="remote", seconds=fetch.seconds + remote.seconds)
        # What was read ahead took its time before.
        fetch = replace(fetch, seconds=fetch.seconds + time.monotonic() - started)
        if counted:
            try:
                if origin is not None and origin.keeps_nothing:
                    packed = None  # of its prompt nothing but numbers is remembered
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
        keep_tokens: int | None = None,
        origin: Origin | None = None,
        partial: bool = False,
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
            keep_tokens: How many leading tokens to keep at most; all when None. For a prompt that
                is run to have its beginning computed. What cannot be cut there is not kept.
            origin: What `look_up` was given for the request that computed it. Without one, it is
                searched among the latest look-ups. Where it `keeps_nothing`, so does this.
            partial: It is on the way to a longer prompt, which is being computed or was cut there.
                When one comes whose beginning it is, it goes, from the disk as well.
        """
        try:
            if not hasattr(tokens, "__getitem__"):
                tokens = list(tokens)  # what can be read only once
            tier = Tier.parse(cache_type)
            self._saver.poke()
            if tier == Tier.ASSISTANT:
                self._computing_until = 0.0
            self._keeper.insert(
                model,
                tokens,
                prompt_cache,
                tier,
                prefill_s=prefill_s,
                keep_tokens=keep_tokens,
                origin=origin,
                partial=partial,
            )
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
            self._saver.spill(self._resident.trim_to(n_sequences, n_bytes))

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
            self._keeper.owner(model)
        except Exception as error:
            # An `identify` of the caller's.
            log.exception("a model could not be identified")
            return Unidentified(f"it cannot be identified: {type(error).__name__}: {error}")
        return found

    def read_ahead(
        self,
        model: Hashable,
        tokens: Sequence[int],
        *,
        trail: Trail | None = None,
        salt: str = "",
    ) -> int:
        """Have the system read what a fetch of this prompt would, for a request that waits.

        Runs no MLX operation and identifies no model, so any thread may call it, and counts
        nothing.

        Args:
            model: mlx-lm's model key.
            tokens: The prompt.
            trail: Of the request; as for `look_up`.
            salt: Digest of the request's salt; see `Origin`.

        Returns:
            Bytes of the files; 0 when memory serves the prompt, or nothing was asked of the model
            yet.
        """
        with self._nothing_raised():
            if self.store is None:
                return 0
            owner = self._owners.of(model, may_read=False, salt=salt)
            return self._lookup.read_ahead(owner, pack_tokens(tokens), len(tokens), trail)
        return 0

    def load_ahead(
        self,
        model: Hashable,
        tokens: Sequence[int],
        *,
        trail: Trail | None = None,
        leave_tokens: int = 0,
        to_copy: bool = False,
        salt: str = "",
        in_passing: bool = False,
    ) -> Ahead | None:
        """Read from the disk what a fetch of this prompt would, for a request that waits.

        It identifies no model and counts no request. The bytes are read and verified on threads
        of the codec's, so any thread may call it. What was read counts as memory.

        Args:
            model: mlx-lm's model key.
            tokens: The prompt.
            trail: Of the request; as for `look_up`.
            leave_tokens: As for `look_up`.
            to_copy: As for `look_up`.
            salt: Digest of the request's salt; see `Origin`.
            in_passing: The request keeps nothing: what is read is its alone.

        Returns:
            What to give to `look_up`, or to `release`; None when there is nothing to read, or
            nothing was asked of the model yet.
        """
        with self._nothing_raised():
            if self.store is None:
                return None
            owner = self._owners.of(model, may_read=False, salt=salt)
            limit = max(0, len(tokens) - max(leave_tokens, self._leave_tokens))
            packed = pack_tokens(tokens)
            return self._lookup.load_ahead(
                owner, packed, limit, trail, to_copy=to_copy, in_passing=in_passing
            )
        return None

    def release(self, ahead: Ahead) -> None:
        """Let go of what was read ahead for a request that was given up."""
        self._lookup.release(ahead)

    def known_tokens(
        self,
        model: Hashable,
        tokens: Sequence[int],
        *,
        trail: Trail | None = None,
        salt: str = "",
    ) -> int:
        """Length of the longest prefix that a fetch would serve; looks only, counts nothing.

        Args:
            model: mlx-lm's model key.
            tokens: The prompt.
            trail: Of the request; as for `look_up`.
            salt: Digest of the request's salt; see `Origin`.
        """
        return self._known(model, tokens, trail, salt)[0]

    def outlook(self, model: Hashable, tokens: Sequence[int], *, salt: str = "") -> tuple[int, int]:
        """What a request with this prompt would get now; looks only, counts nothing.

        Args:
            model: mlx-lm's model key.
            tokens: The prompt.
            salt: Digest of the request's salt; see `Origin`.

        Returns:
            Tokens that would not be computed, and how many memory alone would serve. Nothing where
            the look-up would fail.
        """
        with self._nothing_raised():
            limit = max(0, len(tokens) - self._leave_tokens)
            owner = self._owners.of(model, may_read=self._saver.wants_disk, salt=salt)
            return self._lookup.outlook(owner, pack_tokens(tokens), limit)
        return 0, 0

    def known_of(
        self,
        model: Hashable,
        tokens: Sequence[int],
        *,
        trail: Trail | None = None,
        leave_tokens: int = 0,
    ) -> KnownPrompt | None:
        """What is known of a prompt, to be compared with what others have of it; only looks.

        Args:
            model: mlx-lm's model key.
            tokens: The prompt, of a request without a salt.
            trail: Of the request; as for `look_up`.
            leave_tokens: As for `look_up`.

        Returns:
            None where more could not be stored: the disk is off, or the model not identified yet.
        """
        with self._nothing_raised():
            owner = self._owners.of(model, may_read=False)
            if owner.fingerprint is None or self._saver.disk is None:
                return None
            packed = pack_tokens(tokens)
            limit = max(0, len(tokens) - max(leave_tokens, self._leave_tokens))
            found, _ = self._lookup.known(owner, packed, limit, trail)
            return KnownPrompt(owner.fingerprint, packed, found, limit)
        return None

    def branch_point(
        self,
        model: Hashable,
        tokens: Sequence[int],
        *,
        min_gain_tokens: int = 1,
        trail: Trail | None = None,
        salt: str = "",
    ) -> int:
        """Where a prompt leaves what is known, if it cannot be resumed there; else 0.

        A model whose cache cannot be trimmed needs a checkpoint at that point, for the next
        prompt that leaves there.

        Args:
            model: mlx-lm's model key.
            tokens: The prompt.
            min_gain_tokens: How far behind the last position that can be resumed it has to lie.
            trail: Of the request; as for `look_up`.
            salt: Digest of the request's salt; see `Origin`.
        """
        known, common = self._known(model, tokens, trail, salt)
        if common == 0:
            return 0
        common = min(common, len(tokens) - 1)
        return common if common - known >= min_gain_tokens else 0

    def _known(
        self, model: Hashable, tokens: Sequence[int], trail: Trail | None, salt: str
    ) -> tuple[int, int]:
        """Tokens that can be served, and tokens shared with anything that is known."""
        with self._nothing_raised():
            owner = self._owners.of(model, may_read=self._saver.wants_disk, salt=salt)
            return self._lookup.known(owner, pack_tokens(tokens), len(tokens), trail)
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
        return self._saver.flush(timeout_s)

    def unload(self) -> int:
        """Let go of all caches in memory but those that are to be on the disk and are not yet.

        Returns:
            How many are left.
        """
        return self._saver.unload()

    def close(self, timeout_s: float | None = None) -> None:
        """Save what is not on disk yet, and end the writer thread. Further calls do nothing.

        In a forked child all of that is the parent's, and nothing is saved.

        Args:
            timeout_s: After so long, what is not saved yet is given up. None: no longer than the
                disk takes, and than a change waits for other processes.
        """
        self._saver.close(timeout_s)

    def stats(self) -> PromptCacheStats:
        """What this cache did since it was made, and the totals of its store."""
        totals, trouble = None, self._saver.trouble()
        store = self._saver.store
        if store is not None:
            try:
                totals = store.stats()
            except StoreError as error:
                trouble = trouble or error
        return self._tally.stats(
            memory=self.stats_by_type(),
            queue=self._saver.queue(),
            disk_off=self._saver.memory_only if trouble is None else str(trouble),
            disk_error="" if trouble is None else type(trouble).__name__,
            store=totals,
        )

    # ---- look up -----------------------------------------------------------------------------

    def _fetch(
        self,
        model: Hashable,
        packed: bytes,
        limit: int,
        counted: bool,
        trail: Trail | None,
        origin: Origin | None,
        to_copy: bool,
        ahead: Ahead | None,
    ) -> tuple[Any | None, Fetch]:
        self._saver.poke()
        self._computing_until = time.monotonic() + _LONGEST_ANSWER_S
        owner = self._keeper.owner(model, "" if origin is None else origin.salt)
        if origin is None:
            self._owners.asked(owner, packed)
        else:
            origin.owner = owner
        cache, fetch = self._lookup.answer(
            owner, packed, limit, counted, trail, to_copy, ahead, origin
        )
        if cache is not None:
            self._owners.gave(owner, cache)
        return cache, fetch

    def _used(self, owner: Owner, match: Match) -> None:
        if not owner.salt:
            self.on_use(match.entries)

    def _account(self, num_tokens: int, packed: bytes | None, fetch: Fetch) -> None:
        self._tally.fetched(num_tokens, packed, fetch)
        store = self._saver.disk
        if store is None:
            return
        if fetch.source == "miss":
            self._tell_of_kin(fetch)
            store.count(f"misses:{kind_of_reason(fetch.reason)}")
        elif fetch.reason:
            store.count(f"partial:{kind_of_reason(fetch.reason)}")
        store.count("misses" if fetch.source == "miss" else f"hits_{fetch.source}")
        store.count("tokens_saved", fetch.num_tokens)
        # Counted since later than that one, and together: of these there is a ratio.
        store.count("tokens_reused", fetch.num_tokens)
        store.count("tokens_asked", num_tokens)

    def _tell_of_kin(self, fetch: Fetch) -> None:
        """Say once in the log that what is stored for a model cannot be used as it is now."""
        if fetch.why is MissReason.OTHER_IDENTITY and fetch.reason not in self._told:
            self._told.add(fetch.reason)
            log.warning("prompts of this model are on disk, but %s", fetch.reason)
