"""The store: index and blobs kept consistent, within a budget, for any number of processes.

It knows tokens, tiers and bytes, never models. A record never names a file that is missing or
torn, because a file is durable before its record is committed, and its record is gone before it
is unlinked. This module opens a store and finds and reads in it; `insert`, `evict`, `health` and
`catalog` do the rest of its work.

Thread safety: a `Store` may be shared between threads. The index serialises writers; no lock is
held while a file is read or written.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from msgspec import Struct

from persist_cache import fs
from persist_cache.blobs.folder import BlobFolder
from persist_cache.blobs.reader import BlobReader
from persist_cache.entry import Entry, Match, Run, Tier
from persist_cache.errors import (
    CorruptBlobError,
    DamagedIndexError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
)
from persist_cache.index import tree
from persist_cache.index.environment import Reader, Writer
from persist_cache.index.records import (
    END_OF_TIME_S,
    NO_BLOB,
    BlobRecord,
    EntryRecord,
    NamespaceRecord,
    entry_id,
)
from persist_cache.index.semaphores import Semaphores
from persist_cache.store import catalog, check, opening, reasons
from persist_cache.store.budget import Limits
from persist_cache.store.catalog import Catalog, StoreStats
from persist_cache.store.check import Problem
from persist_cache.store.compact import compact, merge_chains
from persist_cache.store.evict import REQUESTED, Evictor
from persist_cache.store.kin import NOTHING_STORED, Kin
from persist_cache.store.put import Insertion, PutResult, Source
from persist_cache.store.rebuild import rebuild
from persist_cache.store.session import Disk
from persist_cache.tokens import TOKEN_BYTES, pack_tokens

if TYPE_CHECKING:
    from persist_cache.fingerprint.value import Fingerprint

log = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_RUN_TOKENS = 4096
"""Longest run written into one blob: large and sequential, yet a tail can be freed."""
_MAX_ATTEMPTS = 4
_MAX_OPEN_FILES = 200
_MAX_GROWN = 4096
_NAMESPACE_MEMORY_S = 30 * 86400.0


def default_store_path() -> Path:
    """`$PERSIST_CACHE_HOME`, else a folder in the platform's place for caches."""
    home = os.environ.get("PERSIST_CACHE_HOME")
    if home:
        return Path(home).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("persist-cache")) / "store"


class Collected(Struct, frozen=True):
    """What `Store.gc` did.

    Attributes:
        freed_bytes: By which the store takes less of the disk.
        merged: Blobs that were merged with those before or behind them.
        compacted: Blobs of mostly dead rows that were written anew.
        without_room: Such blobs that stay, because a copy would exceed the budget.
    """

    freed_bytes: int
    merged: int
    compacted: int
    without_room: int


class Store:
    """A folder of blobs with its index; made by `Store.open`."""

    def __init__(self, disk: Disk, run_tokens: int) -> None:
        self.root = disk.root
        self.limits = disk.limits
        self.read_only = disk.index.read_only
        self._disk = disk
        self._evictor = Evictor(disk)
        self._run_tokens = run_tokens
        self._grown: dict[int, None] = {}
        """Entries stored since runs were merged last, in their order."""
        self._kin = Kin()
        self._closed = False

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        max_bytes: int | None = None,
        min_free_bytes: int | None = None,
        daily_write_bytes: int | None = None,
        read_only: bool = False,
        run_tokens: int = DEFAULT_RUN_TOKENS,
        clock: Callable[[], float] = time.time,
    ) -> Store:
        """Open the store at `path`, creating it unless `read_only`.

        What dead writers left is removed. A damaged index is put aside and rebuilt from the blobs.

        Args:
            path: Its folder; `default_store_path()` when None.
            max_bytes: Budget for everything it takes on disk. None: as last set, else 32 GiB.
            min_free_bytes: Bytes to leave free on the file system. None: as last set, else 2 GiB.
            daily_write_bytes: Bytes that may be written per UTC day; None for no limit.
            read_only: Change nothing, not even recency; the store must exist.
            run_tokens: Longest run in one blob, in tokens.
            clock: UTC seconds; for tests.

        Raises:
            StoreAccessError: The folder is missing, not ours, or not writable.
            StoreInUseError: This process has it open already.
            StoreFormatError: It was written by an unknown version.
            StoreError: The index is damaged and may not be rebuilt, since `read_only`.
            ValueError: A limit is negative.
        """
        Limits(max_bytes or 0, min_free_bytes or 0, daily_write_bytes)
        if run_tokens < 1:
            raise ValueError(f"run_tokens must be at least 1, got {run_tokens}")
        root = Path(path) if path is not None else default_store_path()
        asked = (max_bytes, min_free_bytes, daily_write_bytes)
        return cls(_open_disk(root, asked, read_only=read_only, clock=clock), run_tokens)

    def close(self, timeout_s: float | None = None) -> bool:
        """Write buffered uses and close the index. Further calls do nothing.

        Args:
            timeout_s: How long that may take. None: as long as others may use the index, and
                no longer than any change waits for other processes.

        Returns:
            Whether it is closed; if not, another thread of this process is still at work.
        """
        if self._closed:
            return True
        self._closed = True
        if not self._disk.index.is_ours:
            return True  # a forked child: all of it is its parent's
        started = time.monotonic()
        if not self.read_only:
            try:
                self._disk.flush(timeout_s)
            except StoreError as error:
                log.warning("recent uses could not be saved: %s", error)
        left = None if timeout_s is None else timeout_s - (time.monotonic() - started)
        return self._disk.index.close(left)

    @property
    def waits_for(self) -> str:
        """What keeps a change waiting at this moment, in a sentence; "" if nothing does."""
        return "" if self._closed else self._disk.index.waits_for()

    @property
    def eviction_paused(self) -> str:
        """Why nothing is evicted for the free-space floor at present; "" when it may be."""
        with self._disk.index.read() as txn:
            return self._disk.unreturned.said(txn)

    @property
    def is_lost(self) -> bool:
        """Whether the folder was removed or replaced while the store was open."""
        return not self._closed and self._disk.index.is_lost()

    def reopen(self) -> None:
        """Begin anew in the same place, after the folder was lost.

        Other threads get a `StoreError` in the meantime, which the serving side counts as a miss.

        Raises:
            StoreError: The place cannot be used; the store is closed then, and may be reopened
                later.
        """
        self._disk.index.close()
        limits = self.limits
        self._disk = _open_disk(
            self.root,
            (limits.max_bytes, limits.min_free_bytes, limits.daily_write_bytes),
            read_only=self.read_only,
            clock=self._disk.clock,
        )
        self._evictor = Evictor(self._disk)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- for what builds on the store ----------------------------------------------------------

    def read(self, *, copies: bool = False) -> contextlib.AbstractContextManager[Reader]:
        """A consistent view of the index, for the block; see `Index.read`."""
        return self._disk.index.read(copies=copies)

    def dry_run(self, attempt: Callable[[Writer], T]) -> T:
        """What `attempt` returns in a change of the index that is undone; see `Index.dry_run`."""
        return self._disk.index.dry_run(attempt)

    def clock(self) -> float:
        """UTC seconds, by the clock that the store was opened with."""
        return self._disk.clock()

    def commit_id(self) -> int:
        """Number of the last commit, by any process; whatever was read before may have changed."""
        with self.read() as txn:
            return txn.commit_id

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of the index: what the machine has that it was made on."""
        return self._disk.index.page_bytes

    @property
    def semaphores(self) -> Semaphores | None:
        """The semaphores that LMDB locks with, where it has some; for `selftest`."""
        return self._disk.index.semaphores

    def catalog(self) -> Catalog:
        """All entries with their sizes, as of now."""
        with self.read(copies=True) as txn:
            return Catalog(txn)

    def blob_path(self, name: str) -> Path:
        """Where the blob of this name is, if it is there."""
        return self._disk.folder.path(name)

    def open_blob(self, name: str) -> BlobReader:
        """Open a recorded blob.

        Raises:
            FileNotFoundError: It was evicted.
            CorruptBlobError: It is not what was written.
        """
        with self.read() as txn:
            record = _blob_record(txn, name)
        return self._open_blob(name, record)

    def serving(self, ids: Iterable[str]) -> contextlib.AbstractContextManager[None]:
        """Keep eviction in this process away from these entries, for the block."""
        return self._disk.serving(int(one, 16) for one in ids)

    def victims_until(self, max_bytes: int, candidates: Collection[str]) -> list[str]:
        """What eviction would take until the store takes no more than `max_bytes`.

        Args:
            max_bytes: Bytes that the store may take on disk.
            candidates: Ids of the entries that may go; a pinned one never does.

        Returns:
            Ids in the order of eviction; all that may go if even that is not enough.
        """
        return self._evictor.victims_until(max_bytes, {int(one, 16) for one in candidates})

    def refuse_without_room(
        self, nbytes: int, num_tokens: int, protected: frozenset[int], what: str
    ) -> None:
        """Make sure that eviction could make room; nothing is evicted.

        Args:
            nbytes: Bytes of blobs to come.
            num_tokens: Their tokens.
            protected: Nodes whose entries must stay.
            what: That which needs the room, for the sentence.

        Raises:
            StoreFullError: There would be no room.
        """
        self._evictor.refuse_without_room(nbytes, num_tokens, protected, what)

    def date_back(self, prefix: str, created: float) -> None:
        """Say that an entry was computed at `created` (UTC seconds), if that is earlier."""
        with contextlib.suppress(KeyError):  # it was evicted meanwhile
            self._change(
                prefix,
                lambda record: record._replace(
                    created_us=min(int(created * 1e6), record.created_us)
                ),
            )

    def rebuild_index(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Make the index anew from the blobs, keeping what can still be read of the old one.

        Args:
            progress: Called with files done and files in total.

        Returns:
            Number of blobs that found their place.
        """
        return rebuild(self._disk.index, self._disk.folder, progress)

    # ---- find and read -----------------------------------------------------------------------

    def match(
        self,
        fingerprint: Fingerprint,
        tokens: Sequence[int] | bytes,
        *,
        limit: int | None = None,
    ) -> Match:
        """Find the longest stored prefix of `tokens` that can be resumed. Reads only.

        Args:
            fingerprint: Identity of the model.
            tokens: Prompt token ids, in order, or what `pack_tokens` made of them.
            limit: Use at most this many tokens; the whole prompt when None.

        Returns:
            A Match; `num_tokens` is 0 on a miss, and `reason` says why it is no longer.
        """
        packed = _packed(tokens)
        length = len(packed) // TOKEN_BYTES
        limit = length if limit is None else max(0, min(limit, length))
        best: Match | None = None
        with self._disk.index.read() as txn:
            for _, namespace in txn.namespaces(fingerprint.digest):
                found = _match_in(txn, namespace, packed, limit)
                if found.reason != NOTHING_STORED and (
                    best is None
                    or (found.num_tokens, found.common_tokens)
                    >= (best.num_tokens, best.common_tokens)
                ):
                    best = found
            if best is None:
                return Match(0, reason=self._kin.why_nothing(txn, fingerprint))
        return best

    def fetch(
        self,
        fingerprint: Fingerprint,
        tokens: Sequence[int] | bytes,
        restore: Callable[[Sequence[tuple[BlobReader, int]], BlobReader | None, int], T],
        *,
        limit: int | None = None,
        min_tokens: int = 1,
    ) -> tuple[T, Match] | None:
        """Find, read and verify the longest stored prefix.

        No transaction is open while files are read. A blob that fails verification is put into
        quarantine together with everything that hangs on it, and the look-up starts again without.

        Args:
            fingerprint: Identity of the model.
            tokens: Prompt token ids, or packed.
            restore: Builds the value from open readers (each with the number of tokens to use of
                it), the checkpoint's reader or None, and the tokens in total. Raises
                `CorruptBlobError` for anything that is not as it was written.
            limit: Use at most this many tokens.
            min_tokens: A shorter prefix counts as a miss.

        Returns:
            The value and its match, or None on a miss.
        """
        packed = _packed(tokens)
        match = self.match(fingerprint, packed, limit=limit)
        return self.load(fingerprint, packed, match, restore, limit=limit, min_tokens=min_tokens)

    def load(
        self,
        fingerprint: Fingerprint,
        tokens: Sequence[int] | bytes,
        match: Match,
        restore: Callable[[Sequence[tuple[BlobReader, int]], BlobReader | None, int], T],
        *,
        limit: int | None = None,
        min_tokens: int = 1,
    ) -> tuple[T, Match] | None:
        """Read and verify what `match` found; the second half of `fetch`.

        The index is asked again only when a blob of the match is gone or bad.

        Args:
            fingerprint: What `match` was asked for, as are `tokens` and `limit`.
            tokens: The prompt.
            match: What `match` found of it.
            restore: As for `fetch`.
            limit: Use at most this many tokens.
            min_tokens: A shorter prefix counts as a miss.

        Returns:
            The value and the match that it was read by, or None on a miss.
        """
        packed = _packed(tokens)
        for attempt in range(_MAX_ATTEMPTS):
            try:
                if attempt:
                    match = self.match(fingerprint, packed, limit=limit)
                if match.num_tokens < max(1, min_tokens):
                    return None
                numbers = [int(entry, 16) for entry in match.entries]
                with self._disk.serving(numbers), self._readers(match) as (runs, checkpoint):
                    # Checksums prove that a file is whole, not that it is the right one.
                    for run, (reader, used) in zip(match.runs, runs, strict=True):
                        reader.check_place(fingerprint.hex, packed, run.start, used)
                    if checkpoint is not None:
                        checkpoint.check_place(fingerprint.hex, packed, match.num_tokens, 0)
                    return restore(runs, checkpoint, match.num_tokens), match
            except FileNotFoundError as error:
                # Evicted meanwhile, unless its record is still there.
                self._quarantine(Path(str(error.filename)).stem, "its file is missing")
            except CorruptBlobError as error:
                self._quarantine(error.path.stem, error.reason, error.is_unreadable)
            except (OSError, StoreError) as error:
                self.count("read_errors")
                log.warning("a stored prompt could not be read: %s", error)
                return None
        return None

    def read_ahead(self, match: Match) -> int:
        """Have the system read what `match` needs, so that a `fetch` soon after waits for less.

        Only advice: nothing is verified, kept or changed, and what is gone is passed over.

        Returns:
            Bytes of the files.
        """
        nbytes = 0
        for name in (*(run.blob for run in match.runs), match.checkpoint):
            if name is not None:
                with contextlib.suppress(OSError):
                    nbytes += fs.read_ahead(self._disk.folder.path(name))
        return nbytes

    @contextlib.contextmanager
    def _readers(
        self, match: Match
    ) -> Iterator[tuple[list[tuple[BlobReader, int]], BlobReader | None]]:
        names = [run.blob for run in match.runs]
        if match.checkpoint is not None:
            names.append(match.checkpoint)
        with contextlib.ExitStack() as stack:
            readers: list[BlobReader] = []
            with self._disk.index.read() as txn:
                records = [_blob_record(txn, name) for name in names]
            for name, record in zip(names, records, strict=True):
                reader = self._open_blob(name, record)
                stack.callback(reader.close)
                if len(readers) >= _MAX_OPEN_FILES:
                    reader.release()
                readers.append(reader)
            checkpoint = None if match.checkpoint is None else readers.pop()
            used = (run.num_tokens for run in match.runs)
            yield list(zip(readers, used, strict=True)), checkpoint

    def _open_blob(self, name: str, record: BlobRecord | None) -> BlobReader:
        path = self._disk.folder.path(name)
        if record is None:
            raise FileNotFoundError(errno.ENOENT, "the blob was evicted", str(path))
        return BlobReader(path, nbytes=record.nbytes, digest=record.digest)

    def _quarantine(self, name: str, reason: str, is_unreadable: bool = False) -> None:
        """Take a bad blob out of service, if the store may be changed; never fails."""
        if self.read_only:
            self.count("bad_reads")
            log.warning("blob %s is bad: %s", name, reason)
            return
        try:
            if check.quarantine(self._disk, name, reason, is_unreadable=is_unreadable):
                self.count("bad_reads")
            self._evictor.empty_trash()
        except StoreError as error:
            log.warning("blob %s is bad (%s) and could not be removed: %s", name, reason, error)

    # ---- write -------------------------------------------------------------------------------

    def put(
        self,
        fingerprint: Fingerprint,
        tokens: Sequence[int] | bytes,
        source: Source,
        *,
        tier: Tier | str = Tier.ASSISTANT,
        prefill_s: float = 0.0,
        label: str = "",
        pinned: bool = False,
        expires: float | None = None,
    ) -> PutResult:
        """Store a prompt prefix durably: only the run that is not there yet, within the budget.

        An entry that exists already keeps the higher of both tiers, its pin and its uses.

        Args:
            fingerprint: Identity of the model.
            tokens: The prefix, or packed; `source` has the KV of exactly these.
            source: Rows and state; not used after the call.
            tier: Role class.
            prefill_s: Seconds that computing the whole prefix took, if known.
            label: The user's name for it.
            pinned: Exempt from eviction.
            expires: UTC seconds after which it goes first.

        Returns:
            The entry's id and what was written.

        Raises:
            StoreFullError: No room within the budget, or the disk is full; nothing was changed.
            StoreReadOnlyError: The store is open read-only.
            StoreError: The disk failed; nothing was changed.
        """
        if self.read_only:
            raise StoreReadOnlyError("The store is open read-only; nothing was stored.")
        packed = _packed(tokens)
        if not packed:
            return PutResult(None, 0, 0)
        wanted = EntryRecord.fresh(
            Tier.parse(tier), len(packed) // TOKEN_BYTES, self._disk.clock()
        )._replace(
            prefill_s=prefill_s, label=_text(label), pinned=pinned, expires=_checked_date(expires)
        )
        done = Insertion(
            self._disk, self._evictor, fingerprint, packed, source, wanted, self._run_tokens
        ).run()
        if done.entry is not None and done.nbytes and len(self._grown) < _MAX_GROWN:
            self._grown[int(done.entry, 16)] = None
        return done

    def touch(self, match: Match, *, num_tokens: int | None = None, spent_s: float = 0.0) -> None:
        """Note that `match` was served. Buffered: `flush` or the next put writes it.

        Its last entry is credited with the hit, and with what that saved: the prefill of the
        tokens that were used and are on disk, less the time that serving them took.

        Args:
            match: What `match` or `fetch` gave.
            num_tokens: Tokens that were used, if it was memory that served them.
            spent_s: Seconds that serving them took.
        """
        used = match.num_tokens if num_tokens is None else min(num_tokens, match.num_tokens)
        saved_s = match.saved_s * used / match.num_tokens if match.num_tokens else 0.0
        self._disk.touch([int(one, 16) for one in match.entries], max(0.0, saved_s - spent_s))

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter that `stats` shows. Buffered like `touch`."""
        self._disk.count(name, amount)

    def patient(self, patience_s: float | None) -> contextlib.AbstractContextManager[None]:
        """Let changes of this thread in the block wait no longer for other processes; None: 10 s.

        Then they raise `StoreBusyError`.
        """
        return self._disk.index.terms(patience_s=patience_s)

    def flush(self) -> bool:
        """Commit buffered uses and counts; returns whether there were any.

        Raises:
            StoreError: The index cannot be written; they stay buffered.
        """
        if self.read_only:
            return False
        done = self._disk.flush()
        self._disk.regain_ballast()
        return done

    # ---- look after --------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All entries, in the order of their ids."""
        with self._disk.index.read(copies=True) as txn:
            return Catalog(txn).entries()

    def get(self, prefix: str) -> Entry:
        """The entry whose id begins with `prefix`.

        Raises:
            KeyError: No entry, or more than one, has such an id.
        """
        number = self._number(prefix)
        with self._disk.index.read() as txn:
            entry = catalog.load_entry(txn, number)
        if entry is None:
            raise KeyError(prefix)
        return entry

    def pin(self, prefix: str, pinned: bool = True) -> None:
        """Exempt an entry from eviction, or no longer.

        Raises:
            KeyError: No entry, or more than one, has such an id.
        """
        self._change(prefix, lambda record: record._replace(pinned=pinned))

    def expire_at(self, prefix: str, when: float | None) -> None:
        """Let an entry expire at `when` (UTC seconds), or never.

        Raises:
            KeyError: No entry, or more than one, has such an id.
        """
        expires = _checked_date(when)
        self._change(prefix, lambda record: record._replace(expires=expires))

    def set_label(self, prefix: str, label: str) -> None:
        """Name an entry.

        Raises:
            KeyError: No entry, or more than one, has such an id.
        """
        self._change(prefix, lambda record: record._replace(label=_text(label)))

    def evict(
        self,
        prefixes: Sequence[str],
        *,
        reason: str = REQUESTED,
        to_bytes: int | None = None,
    ) -> int:
        """Remove entries, and every file that nothing else needs; returns the bytes freed.

        Rows shared with other entries stay for those, and rows that nothing needs stay as long as
        their file does. A file that cannot be unlinked is tried again later, and not counted.

        Args:
            prefixes: Ids, or beginnings of ids that are unique.
            reason: What `explain` is to say of them.
            to_bytes: What the store is to take afterwards, if that is what it is for: where only
                the room that is kept back for a full disk is in the way, that goes as well.

        Raises:
            KeyError: An id is unknown or ambiguous; nothing was removed.
        """
        numbers = list(dict.fromkeys(self._number(prefix) for prefix in prefixes))
        return self._evictor.evict(numbers, reason, to_bytes)

    def evict_to(self, max_bytes: int) -> int:
        """Evict in order until the store takes at most `max_bytes`, or the rest is pinned.

        Returns:
            Bytes on disk afterwards.
        """
        return self._evictor.evict_to(max_bytes)

    def purge_quarantine(self) -> int:
        """Remove the damaged files that were put aside; returns their bytes.

        They hold prompts, so whoever evicts everything wants them gone as well.
        """
        return self._evictor.purge_quarantine()

    def stats(self) -> StoreStats:
        """Totals, budget and counters."""
        return catalog.store_stats(self._disk)

    def check(
        self,
        *,
        read_data: bool = False,
        repair: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Problem]:
        """Compare index and files both ways.

        Args:
            read_data: Also read every byte and verify its checksum.
            repair: Quarantine what is damaged, drop records of missing files, remove orphans.
            progress: Called with bytes done and bytes in total while data is read.

        Returns:
            What was wrong before any repair; empty for a sound store.
        """
        problems = check.check(self._disk, read_data=read_data, progress=progress)
        if repair and problems:
            check.repair(self._disk, self._evictor, problems)
            if any(problem.kind == "index" for problem in problems):
                # With a sound index there is more to be seen.
                more = check.check(self._disk, read_data=read_data, progress=progress)
                if more:
                    check.repair(self._disk, self._evictor, more)
        return problems

    def merge_runs(self, keep_on: Callable[[], bool] = lambda: True) -> int:
        """Make few files of the many that a long conversation left, as far as puts told of it.

        For when nothing else is to be done. Nothing is evicted for it, and what is found stays
        the same; see `merge_chains`. Does nothing where the bytes of a day are limited: they are
        for what is new.

        Args:
            keep_on: Asked before each file; False ends the work.

        Returns:
            How many files others took the place of.

        Raises:
            StoreError: The disk failed; what was done until then stays done.
        """
        grown, self._grown = self._grown, {}
        if self.limits.daily_write_bytes is not None:
            return 0
        merged = 0
        try:
            while grown and keep_on():
                number = next(iter(grown))
                del grown[number]
                merged += merge_chains(self._disk, self._evictor, number, self._run_tokens, keep_on)
                if not keep_on():
                    grown[number] = None
        finally:
            self._grown = grown | self._grown
        return merged

    def gc(self) -> Collected:
        """Finish dead writers' work, apply expiry and budget, merge and compact blobs.

        Raises:
            StoreError: The disk failed; what was done until then stays done.
        """
        disk = self._disk
        with disk.index.read() as txn:
            before = disk.budget.usage(txn).total
        check.sweep(disk, self._evictor)
        check.remove_orphans(disk)
        self._evictor.expire()
        check.forget_empty_namespaces(disk, _NAMESPACE_MEMORY_S)
        self._evictor.evict_to(self.limits.max_bytes)
        with disk.index.read() as txn:
            entries = [number for number, _ in txn.entries()]
        merged = sum(
            merge_chains(disk, self._evictor, entry, self._run_tokens) for entry in entries
        )
        blobs, without_room = compact(disk, self._evictor)
        with disk.index.read() as txn:
            freed = before - disk.budget.usage(txn).total
        return Collected(max(0, freed), merged, blobs, without_room)

    def _number(self, prefix: str) -> int:
        """The number of the one entry whose id begins with `prefix`."""
        if not prefix or len(prefix) > 16 or any(c not in "0123456789abcdef" for c in prefix):
            raise KeyError(f"{prefix!r} is not an entry id: use hex digits as `list` shows them")
        low = int(prefix.ljust(16, "0"), 16)
        with self._disk.index.read() as txn:
            found: list[str] = []
            for number in txn.entries_from(low):
                if not entry_id(number).startswith(prefix) or len(found) == 2:
                    break
                found.append(entry_id(number))
        if not found:
            raise KeyError(f"no entry has an id that begins with {prefix!r}")
        if len(found) > 1:
            raise KeyError(f"several entries have an id that begins with {prefix!r}")
        return int(found[0], 16)

    def _change(self, prefix: str, change: Callable[[EntryRecord], EntryRecord]) -> None:
        number = self._number(prefix)

        def apply(txn: Writer) -> None:
            record = txn.entry(number)
            if record is None:
                raise KeyError(f"no entry has an id that begins with {prefix!r}")
            txn.put_entry(number, change(record))

        self._disk.index.update(apply)


def _open_disk(
    root: Path,
    limits: tuple[int | None, int | None, int | None],
    *,
    read_only: bool,
    clock: Callable[[], float],
) -> Disk:
    """Open a store's parts, finish what dead processes left, and rebuild a damaged index.

    Args:
        root: Its folder.
        limits: Budget, bytes to leave free, bytes a day; None for what was last set.
        read_only: Change nothing.
        clock: UTC seconds.
    """
    folder = BlobFolder(root)
    opening.prepare_folder(root, folder, read_only)
    may_rebuild = not read_only
    while True:
        index = opening.open_index(root, folder, read_only)
        try:
            settled = opening.settle_limits(index, *limits)
            disk = Disk(root, index, folder, settled, clock)
            if not read_only:
                # A full disk must not keep anybody from reading, or from evicting.
                with contextlib.suppress(StoreFullError):
                    check.sweep(disk, Evictor(disk))
                disk.regain_ballast()
            return disk
        except DamagedIndexError:
            index.close()
            if not may_rebuild:
                raise
            # LMDB notices some damage only when it comes to the page.
            may_rebuild = False
            check.distrust(root)
        except BaseException:
            index.close()
            raise


def _blob_record(txn: Reader, name: str) -> BlobRecord | None:
    number = txn.blob_number(bytes.fromhex(name))
    return None if number is None else txn.blob(number)


def _packed(tokens: Sequence[int] | bytes) -> bytes:
    if not isinstance(tokens, bytes):
        return pack_tokens(tokens)
    if len(tokens) % TOKEN_BYTES:
        raise ValueError(f"packed tokens have {TOKEN_BYTES} bytes each, got {len(tokens)} bytes")
    return tokens


def _text(label: str) -> str:
    """A label as it can be recorded: halves of characters, as in odd file names, become `?`."""
    return label.encode("utf-8", "replace").decode()


def _checked_date(expires: float | None) -> float:
    """An expiry as it is recorded: 0 for never, else a date."""
    if expires is None:
        return 0.0
    if not 0 < expires < END_OF_TIME_S:
        raise ValueError(f"an expiry is a date in UTC seconds, got {expires}")
    return expires


def _match_in(txn: Reader, namespace: NamespaceRecord, packed: bytes, limit: int) -> Match:
    path = tree.walk(txn, namespace.root, packed)
    position, checkpoint = tree.resumable(txn, path, limit)
    reason = ""
    if path.common == 0:
        stored = txn.children(namespace.root, limit=1)
        reason = reasons.OTHER_PROMPT if stored else NOTHING_STORED
    elif position < min(path.common, limit):
        reason = reasons.NO_CHECKPOINT
    elif position == path.common < len(packed) // TOKEN_BYTES:
        goes_on = path.node is None or txn.children(path.node, limit=1)
        reason = reasons.DIVERGES if goes_on else reasons.ENDS
    if position == 0:
        return Match(0, common_tokens=path.common, reason=reason)
    runs: list[Run] = []
    nbytes = 0
    for step in path.steps:
        if step.start >= position:
            break
        record = _known(txn, step.edge.blob)
        used = min(step.used, position - step.start)
        name = record.name.hex()
        if runs and runs[-1].blob == name:
            runs[-1] = Run(name, runs[-1].start, runs[-1].num_tokens + used)
        else:
            runs.append(Run(name, step.start, used))
            nbytes += record.nbytes
    state = None if checkpoint == NO_BLOB else _known(txn, checkpoint)
    used_entries = tree.entries_used(txn, path, position)
    return Match(
        num_tokens=position,
        runs=tuple(runs),
        checkpoint=None if state is None else state.name.hex(),
        common_tokens=path.common,
        entries=tuple(entry_id(number) for number in used_entries),
        nbytes=nbytes + (0 if state is None else state.nbytes),
        saved_s=_saved_s(txn, used_entries, position),
        reason=reason,
    )


def _saved_s(txn: Reader, entries: Sequence[int], position: int) -> float:
    """Seconds that computing `position` tokens takes, by what was measured for `entries`.

    That is the cost of the last one measured there or above. The tokens behind it have their
    part of what the entry below, whose rows they are, costs beyond it. A dear tail says nothing
    of the prompt before it.
    """
    start, end, cost, cost_below = 0, 0, 0.0, 0.0
    for number in reversed(entries):
        record = txn.entry(number)
        if record is None or record.prefill_s <= 0:
            continue
        if record.num_tokens <= position:
            start, cost = record.num_tokens, record.prefill_s
            break
        end, cost_below = record.num_tokens, record.prefill_s
    if start == position or end == 0:
        return cost
    return cost + max(0.0, cost_below - cost) * (position - start) / (end - start)


def _known(txn: Reader, blob: int) -> BlobRecord:
    record = txn.blob(blob)
    if record is None:
        raise tree.damaged("the index names a blob without record")
    return record
