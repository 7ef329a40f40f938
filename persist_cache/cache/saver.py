"""What of the caches in memory goes to disk, and when; `PromptCache` tells it what comes and goes.

`system` and `user` are saved at once, `assistant` when it leaves memory, when the process is idle,
at `flush` and at `close`. The store may come late, and may be lost: then it is opened again, and
what is in memory is saved into it. Nothing here raises into a generation thread. It is one module,
because all of it changes the same few facts: which store there is, and which caches it lacks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence

from persist_cache.cache.late_store import LateStore
from persist_cache.cache.live_caches import Held, Resident
from persist_cache.cache.owners import Owner
from persist_cache.cache.promised import Promised
from persist_cache.cache.stats import Tally
from persist_cache.cache.write_behind import WriteBehind
from persist_cache.codec import Codec, Source
from persist_cache.entry import PARTIAL_LABEL, MissReason, Tier
from persist_cache.errors import (
    StoreAccessError,
    StoreBusyError,
    StoreError,
    UnsupportedCacheError,
)
from persist_cache.store.reasons import sentence
from persist_cache.store.store import Store

log = logging.getLogger(__name__)


class Saver:
    """The way from memory to disk: a store, the thread that writes to it, and its troubles.

    Thread safety: may be shared between threads. `lock` is the `PromptCache`'s, and guards what is
    known of each cache in memory; it is not held while a disk is read or written. Methods that
    say so run on the writer thread.
    """

    def __init__(
        self,
        codec: Codec,
        resident: Resident,
        lock: threading.RLock,
        tally: Tally,
        *,
        store: Store | str | os.PathLike[str] | None,
        open_store: Callable[[], Store] | None,
        disk_off: str,
        persist: Collection[str],
        idle_s: float,
        queue_bytes: int,
        is_busy: Callable[[], bool],
        on_disk: Callable[[], None],
    ) -> None:
        """Open the store, if it is a folder, and start the writer thread, if there is one to write.

        Args:
            codec: How caches become bytes.
            resident: The caches in memory.
            lock: Guards them.
            tally: Counts what is saved, and what goes wrong.
            store: An open store, which stays its opener's to close; or a folder, opened here.
            open_store: Opens the store that there is none of yet.
            disk_off: Why there is none.
            persist: Labels of the tiers that go to disk.
            idle_s: Seconds without requests after which `assistant` caches are saved.
            queue_bytes: Cache memory that waiting saves may keep alive.
            is_busy: Asked before files are merged: whether an answer is being computed.
            on_disk: Called on the writer thread when the store's folder is there again, or at last.

        Raises:
            StoreError: The folder `store` cannot be opened.
        """
        self._codec = codec
        self._resident = resident
        self._lock = lock
        self._tally = tally
        self.promised = Promised()
        self._persist = frozenset(persist)
        self._is_busy = is_busy
        self._on_disk = on_disk
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
        self._why_lost = ""
        """Why a store whose folder was removed could not be begun again."""
        self._closed = False
        self._pid = os.getpid()
        self._writer: WriteBehind | None = None
        if self._late is not None or (self._store is not None and not self._store.read_only):
            self._writer = WriteBehind(
                max_bytes=queue_bytes, idle_s=idle_s, on_idle=self._save_when_idle
            )

    # ---- the disk, and what is the trouble with it -------------------------------------------

    @property
    def store(self) -> Store | None:
        """The store behind it, or None where there is none, or not yet."""
        return self._store

    @property
    def disk(self) -> Store | None:
        """The store as long as it is used: None also after `close`."""
        return None if self._closed else self._store

    @property
    def wants_disk(self) -> bool:
        """Whether there is a disk, or may be later: what is kept now is to be found there then."""
        return (self._store is not None or self._late is not None) and not self._closed

    @property
    def memory_only(self) -> str:
        """Why nothing is to be kept on disk, though no disk failed; "" when it is to be."""
        return self._memory_only

    @property
    def disk_off(self) -> str:
        """Why nothing is kept on disk at present; "" when it is."""
        error = self.trouble()
        return self._memory_only if error is None else str(error)

    @property
    def is_known_off(self) -> bool:
        """Whether nothing is kept on disk, as far as is known without asking the system.

        A thread that lets go of the interpreter's lock gets it back after 5 ms when others compute.
        """
        waits = self._store is not None and self._store.waits_for
        return bool(self._memory_only or self._disk_error or waits)

    def trouble(self) -> StoreError | None:
        """What keeps the disk from being used, as of the last attempt."""
        if self._store is not None and self._store.is_lost:
            return _removed(self._store, self._why_lost)
        if self._store is not None and (why := self._store.waits_for):
            return StoreBusyError(why)
        return self._disk_error

    def failed(self, error: StoreError) -> None:
        """Note that the disk could not be used; after `close` it is used no more."""
        if self._closed:
            return
        self._tally.problem(f"disk:{type(error).__name__}")
        if str(error) != str(self._disk_error):
            log.warning("the disk is not used: %s", error)
        self._disk_error = error

    def serves(self, owner: Owner) -> None:
        """Note whose KV is computed now: without a fingerprint, it stays in memory."""
        if self.disk is not None:
            unknown = owner.fingerprint is None
            why = MissReason.UNIDENTIFIED_MODEL if unknown else None
            self._memory_only = sentence(why, owner.reason)

    # ---- what `PromptCache` tells it ----------------------------------------------------------

    def poke(self) -> None:
        """Say that the process is busy: idle work waits."""
        if self._writer is not None:
            self._writer.poke()

    def queue(self) -> tuple[int, int]:
        """Saves that wait or are under way, and the cache memory that they keep alive."""
        return self._writer.waiting() if self._writer is not None else (0, 0)

    def is_for_disk(self, held: Held) -> bool:
        """Whether a cache that is not on disk is to be saved; the caller holds the lock."""
        return (
            self.disk is not None
            and self._writer is not None
            and held.tier in self._persist
            and held.num_tokens > 0
            and not held.memory_only
            and held.owner.fingerprint is not None
        )

    def spill(self, gone: Sequence[Held]) -> None:
        """Save what leaves memory unsaved."""
        for held in gone:
            if held.wanted and not self.save_later(held):
                self._tally.problem("dropped_queue_full")
                log.warning("a prompt left memory unsaved: the queue of saves is full")

    def save_later(self, held: Held) -> bool:
        """Queue a save; False when the queue is full and the cache has to wait."""
        if self._writer is None:
            return False
        with self._lock:
            if not held.wanted or not self._resident.is_unchanged(held):
                return True
            try:
                # Only the job holds it: a cache that is lent after it must have no other reader.
                sources = [self._codec.source(held.cache, held.num_tokens)]
            except UnsupportedCacheError as error:
                held.wanted = False
                self._tally.problem(f"unsupported:{error.class_name}")
                log.warning("a prompt stays in memory: %s", error)
                return True
            if not self._resident.is_unchanged(held):
                return True  # changed while its bytes were taken
            rank = Tier.parse(held.tier)
            if rank != Tier.ASSISTANT:
                self.promised.add(held.owner, held.packed)
            accepted = self._writer.submit(
                lambda: self._save(held, sources), rank=rank, nbytes=held.nbytes
            )
            if accepted:
                held.wanted = False
            else:
                self.promised.ended(held.owner, held.packed, saved=False)
            return accepted

    def let_go_of_former(self) -> None:
        """Let go of what other weights computed under a model key that is used now.

        What is to be on disk goes there, under the identity it was computed with; while the queue
        of saves is full it stays, found by nobody.
        """
        with self._lock:
            for held in self._resident.of_former_owners():
                if not held.wanted or self.save_later(held):
                    self._resident.remove(held)

    def try_late_store_soon(self) -> None:
        """Have the writer thread try it if it is time: a busy process is never idle."""
        late, writer = self._late, self._writer
        if late is not None and self._store is None and writer is not None and late.claim():
            writer.submit(self._try_late_store, rank=Tier.SYSTEM, nbytes=0)

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
                self.save_later(held)
            done = self._writer.drain(left()) and not all(held.wanted for held in waiting)
        self.let_go_of_former()
        self._flush_uses(left())
        return done

    def unload(self) -> int:
        """Let go of what memory need not keep; returns how many caches wait for the disk."""
        is_late = self._late is not None and self._store is None and not self._closed
        with self._lock:
            if self.queue()[0]:
                return len(self._resident)  # a save may fail, and has to be tried again
            for held in self._resident.held():
                if not (held.wanted or (is_late and held.tier in self._persist)):
                    self._resident.remove(held)
            return len(self._resident)

    def close(self, timeout_s: float | None = None) -> None:
        """Save what is not on disk yet, and end the writer thread. Further calls do nothing.

        In a forked child all of that is the parent's, and nothing is saved.

        Args:
            timeout_s: After so long, what is not saved yet is given up. None: no limit of its own.
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

    # ---- on the writer thread ----------------------------------------------------------------

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
            self.save_later(held)
        self.let_go_of_former()
        if self._store is not None and self._disk_error is not None and not waiting:
            # With nothing to save, only a commit of its own can tell whether the disk is back.
            self._store.count("disk_retries")
        self._flush_uses()
        self._tidy()
        self._merge_runs()

    def _save(self, held: Held, sources: list[Source]) -> None:
        """Write one cache; touches bytes only."""
        fingerprint = held.owner.fingerprint
        if fingerprint is None or self._store is None or held.passed:
            self.promised.ended(held.owner, held.packed, saved=False)
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
                    keep_s=held.keep_s,
                    group=held.group,
                    label=PARTIAL_LABEL if held.partial else "",
                )
        except StoreError as error:
            self.failed(error)
            self.promised.ended(held.owner, held.packed, saved=False)
            with self._lock:
                held.wanted = True  # tried again when idle, or when it leaves memory
            return
        self.promised.ended(held.owner, held.packed, saved=True)
        with self._lock:
            held.saved = True
            self._disk_error = None
        self._tally.saved(result.nbytes)

    def _try_late_store(self) -> None:
        """Use the store that could not be opened before, if it can be."""
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
                    held.wanted = self.is_for_disk(held)
        if self._store is None:
            store.close()
            return
        log.warning("the store at %s is used from now on", store.root)

    def _recover_store(self) -> None:
        """Begin again when the store's folder was removed."""
        if self._store is None or not self._store.is_lost:
            return
        if not self._why_lost:
            self.failed(_removed(self._store))
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

    def _say_on_disk(self) -> None:
        try:
            self._on_disk()
        except Exception:
            log.exception("what follows the store could not be done")

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
            self.failed(error)

    def _tidy(self) -> None:
        """Remove what has expired, and what exceeds a quota."""
        if self._store is None or self._disk_error is not None:
            return
        try:
            self._store.tidy()
            lives = self._store.lifetimes()
        except StoreError as error:
            log.warning("what has expired could not be removed: %s", error)
            return
        if lives is None:
            return
        now = time.monotonic()
        with self._lock:
            for held in self._resident.held():
                seconds = lives(Tier.parse(held.tier), held.owner.fingerprint)
                if seconds is not None and now - held.since >= seconds:
                    held.wanted = False
                    self._resident.remove(held)

    def _merge_runs(self) -> None:
        """Make the next restart's first answer of a long conversation faster, while idle."""
        store, writer = self._store, self._writer
        if store is None or writer is None or self._disk_error is not None:
            return
        try:
            store.merge_runs(lambda: writer.is_idle() and not self._is_busy())
        except StoreError as error:
            log.warning("the runs of a conversation could not be merged: %s", error)


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
