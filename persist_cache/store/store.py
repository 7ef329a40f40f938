"""The store's face: index and blobs kept consistent, within a budget, for any number of processes.

It knows tokens, tiers and bytes, never models. A record never names a file that is missing or
torn, because a file is durable before its record is committed, and its record is gone before it
is unlinked. The work is done elsewhere: `opening`, `lookup`, `put`, `evict`, `check`, `upkeep`,
`catalog`. Here is what callers have to know of it, which is why this module is long.

Thread safety: a `Store` may be shared between threads. The index serialises writers; no lock is
held while a file is read or written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from persist_cache.blobs.reader import BlobReader
from persist_cache.codec import Blob, Source
from persist_cache.entry import NO_GROUP, Entry, Match, Tier, check_group
from persist_cache.errors import (
    StoreError,
    StoreReadOnlyError,
)
from persist_cache.index.records import (
    END_OF_TIME_S,
    EntryRecord,
)
from persist_cache.index.semaphores import Semaphores
from persist_cache.index.transaction import TEXT, UNFINISHED, Reader, Writer
from persist_cache.store import catalog, opening
from persist_cache.store.budget import Limits
from persist_cache.store.catalog import Catalog, StoreStats
from persist_cache.store.erase import Erased, erase, overwriting
from persist_cache.store.evict import REQUESTED, Evictor
from persist_cache.store.lifetimes import TTL, by_fingerprint
from persist_cache.store.lookup import Lookup
from persist_cache.store.put import Insertion, PutResult
from persist_cache.store.quotas import QUOTA, check_rules, is_counted, recount
from persist_cache.store.rebuild import rebuild
from persist_cache.store.scratch import Scratch, scratch
from persist_cache.store.session import Disk
from persist_cache.store.trail import Trail
from persist_cache.store.upkeep import Collected, Upkeep
from persist_cache.tokens import TOKEN_BYTES, pack_tokens

if TYPE_CHECKING:
    from persist_cache.fingerprint.value import Fingerprint
    from persist_cache.store.check import Problem

log = logging.getLogger(__name__)
T = TypeVar("T")

_ID = re.compile("[0-9a-f]{16}")
DEFAULT_RUN_TOKENS = 4096
"""Longest run written into one blob: large and sequential, yet a tail can be freed."""


def default_store_path() -> Path:
    """`$PERSIST_CACHE_HOME`, else a folder in the platform's place for caches."""
    home = os.environ.get("PERSIST_CACHE_HOME")
    if home:
        return Path(home).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("persist-cache")) / "store"


class Store:
    """A folder of blobs with its index; made by `Store.open`."""

    def __init__(self, disk: Disk, run_tokens: int, asked: opening.AskedLimits) -> None:
        self.root = disk.root
        self.limits = disk.limits
        self.read_only = disk.index.read_only
        self._disk = disk
        self._asked = asked
        self._evictor = Evictor(disk)
        self._run_tokens = run_tokens
        self._lookup = Lookup(disk, self._evictor)
        self._upkeep = Upkeep(disk, self._evictor, run_tokens)
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
        quotas: Mapping[str, int] | None = None,
        ttl: Mapping[str, int] | None = None,
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
            quotas: Bytes of files that each `model` or `salt` may have, or one of them: by
                `model:NAME`, and by `salt:` and what `fingerprint.value.salt_digest` made of it.
                None: as last set.
            ttl: Seconds after which entries expire that have no date of their own: by the label of
                a tier, or as those of `quotas`. The shortest counts. None: as last set.
            clock: UTC seconds; for tests.

        Raises:
            StoreAccessError: The folder is missing, not ours, or not writable.
            StoreInUseError: This process has it open already.
            StoreFormatError: It was written by an unknown version.
            StoreError: The index is damaged and may not be rebuilt, since `read_only`.
            ValueError: A limit is negative, or a rule is about nothing that there is.
        """
        Limits(max_bytes or 0, min_free_bytes or 0, daily_write_bytes)
        if run_tokens < 1:
            raise ValueError(f"run_tokens must be at least 1, got {run_tokens}")
        root = Path(path) if path is not None else default_store_path()
        asked = (max_bytes, min_free_bytes, daily_write_bytes)
        for rules in (quotas, ttl):
            check_rules(rules or {}, tiers=rules is ttl)
        disk = opening.open_disk(root, asked, read_only=read_only, clock=clock)
        store = cls(disk, run_tokens, asked)
        try:
            if not read_only and store.is_erasing:
                log.warning(
                    "an erasure at %s did not come to its end; run `persist-cache gc --erase`", root
                )
            store.set_rules(quotas=quotas, ttl=ttl)
        except BaseException:
            store.close()
            raise
        return store

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

    def set_rules(
        self, *, quotas: Mapping[str, int] | None = None, ttl: Mapping[str, int] | None = None
    ) -> None:
        """Set quotas or default lifetimes, for all processes, and apply them.

        Args:
            quotas: As `open`.
            ttl: As `open`.

        Raises:
            ValueError: A rule is about nothing that there is.
            StoreError: The disk failed.
        """
        for prefix, rules in ((QUOTA, quotas), (TTL, ttl)):
            check_rules(rules or {}, tiers=prefix == TTL)
            if rules is not None and not self.read_only:
                self._remember(prefix, rules)

    def _remember(self, prefix: str, rules: Mapping[str, int]) -> None:
        with self.read() as txn:
            if txn.numbers(prefix) == rules:
                return

        def remember(txn: Writer) -> None:
            txn.set_numbers(prefix, rules)
            if prefix == QUOTA and rules and not is_counted(txn):
                recount(txn)

        self._disk.index.update(remember)
        self._evictor.apply_quotas()
        self._evictor.expire()

    @property
    def quotas(self) -> dict[str, int]:
        """The quotas, as `open` was given them last."""
        with self.read() as txn:
            return txn.numbers(QUOTA)

    @property
    def ttl(self) -> dict[str, int]:
        """The default lifetimes in seconds, as `open` was given them last."""
        with self.read() as txn:
            return txn.numbers(TTL)

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

        A store that is found there keeps its own limits, except for those that `open` was given.

        Other threads get a `StoreError` in the meantime, which the serving side counts as a miss.

        Raises:
            StoreError: The place cannot be used; the store is closed then, and may be reopened
                later.
        """
        self._disk.index.close()
        self._disk = opening.open_disk(
            self.root,
            self._asked,
            read_only=self.read_only,
            clock=self._disk.clock,
            before=self.limits,
        )
        self.limits = self._disk.limits
        self._evictor = Evictor(self._disk)
        self._lookup = Lookup(self._disk, self._evictor)
        self._upkeep = Upkeep(self._disk, self._evictor, self._run_tokens)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- for what builds on the store ----------------------------------------------------------

    def remembered(self, name: str) -> bytes | None:
        """What `remember` was given last under this name, by any process; None for nothing."""
        with self.read() as txn:
            return txn.meta(TEXT + name) or None

    def remember(self, name: str, value: bytes | None) -> None:
        """Keep a small text of whatever builds on the store; None forgets it.

        Raises:
            StoreReadOnlyError: The store is open read-only.
            StoreError: The disk failed.
        """
        if self.read_only:
            raise StoreReadOnlyError("The store is open read-only; nothing was changed.")
        self._disk.index.update(lambda txn: txn.set_meta(TEXT + name, value or b""))

    def tally(self, name: str, amount: int) -> int:
        """Add to a number that `stats` does not show, at once, and return its new value.

        Raises:
            StoreError: The disk failed.
        """
        return self._disk.index.update(lambda txn: txn.add(name, amount))

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
        return self._lookup.open_blob(name)

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

    def scratch(
        self, nbytes: int, protected: frozenset[int] = frozenset()
    ) -> contextlib.AbstractContextManager[Scratch]:
        """Room for `nbytes` within the budget, for the block: a file that is gone after it.

        Args:
            nbytes: How many; entries are evicted for them where that is needed.
            protected: Nodes whose entries must stay.

        Raises:
            StoreFullError: There is no room; nothing was evicted.
            StoreReadOnlyError: The store is open read-only.
            StoreError: The disk failed, also within the block.
        """
        if self.read_only:
            raise StoreReadOnlyError("The store is open read-only; nothing was stored.")
        return scratch(self._disk, self._evictor, nbytes, protected)

    def date_back(self, entry: str, created: float) -> None:
        """Say that an entry was computed at `created` (UTC seconds), if that is earlier."""
        with contextlib.suppress(KeyError):  # it was evicted meanwhile
            self._change(
                entry,
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
        trail: Trail | None = None,
    ) -> Match:
        """Find the longest stored prefix of `tokens` that can be resumed. Reads only.

        Args:
            fingerprint: Identity of the model.
            tokens: Prompt token ids, in order, or what `pack_tokens` made of them.
            limit: Use at most this many tokens; the whole prompt when None.
            trail: Of the request, for which the index is walked once and not at each look.

        Returns:
            A Match; `num_tokens` is 0 on a miss, and `reason` says why it is no longer.
        """
        return self._lookup.match(
            fingerprint, _packed(tokens), limit, Trail() if trail is None else trail
        )

    def prompt_tokens(
        self, fingerprint: Fingerprint, tokens: Sequence[int] | bytes, *, trail: Trail | None = None
    ) -> int:
        """Leading tokens of a prompt of which an entry that is no reply has rows.

        Args:
            fingerprint: Identity of the model.
            tokens: Prompt token ids, in order, or what `pack_tokens` made of them.
            trail: As for `match`.
        """
        return self._lookup.prompt_tokens(
            fingerprint, _packed(tokens), Trail() if trail is None else trail
        )

    def fetch(
        self,
        fingerprint: Fingerprint,
        tokens: Sequence[int] | bytes,
        restore: Callable[[Sequence[tuple[Blob, int]], Blob | None, int], T],
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
        restore: Callable[[Sequence[tuple[Blob, int]], Blob | None, int], T],
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
        return self._lookup.load(
            fingerprint, _packed(tokens), match, restore, limit=limit, min_tokens=min_tokens
        )

    def read_ahead(self, match: Match) -> int:
        """Have the system read what `match` needs, so that a `fetch` soon after waits for less.

        Only advice: nothing is verified, kept or changed, and what is gone is passed over.

        Returns:
            Bytes of the files.
        """
        return self._lookup.read_ahead(match)

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
        keep_s: Mapping[Tier, int] = MappingProxyType({}),
        group: str = NO_GROUP,
    ) -> PutResult:
        """Store a prompt prefix durably: only the run that is not there yet, within the budget.

        An entry that exists already keeps the higher of both tiers, its pin and its uses. Those on
        the way to it that are labelled `(partial)` go, unless they are pinned or dated.

        Args:
            fingerprint: Identity of the model.
            tokens: The prefix, or packed; `source` has the KV of exactly these.
            source: Rows and state; not used after the call.
            tier: Role class.
            prefill_s: Seconds that computing the whole prefix took, if known.
            label: The user's name for it.
            pinned: Exempt from eviction.
            expires: UTC seconds after which it goes first.
            keep_s: By tier, for how many seconds behind each use the entry, or a system part that
                it begins with, goes after others of that tier. It is never less than before, and
                no room is refused for it.
            group: That the entry, and those on the way to it, belong to from now on, besides
                others that they belong to already.

        Returns:
            The entry's id and what was written.

        Raises:
            StoreFullError: No room within the budget, or the disk is full; nothing was changed.
            StoreReadOnlyError: The store is open read-only.
            StoreError: The disk failed; nothing was changed.
            ValueError: That can be no name of a group.
        """
        check_group(group)
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
        insertion = Insertion(
            self._disk,
            self._evictor,
            fingerprint,
            packed,
            source,
            wanted,
            self._run_tokens,
            keep_s,
            group,
        )
        done = insertion.run()
        self._evictor.retire(insertion.partial)
        if done.entry is not None and done.nbytes:
            self._upkeep.note(int(done.entry, 16))
        with contextlib.suppress(StoreError):  # it is stored
            self._upkeep.tidy(only_rules=True)
        return done

    def touch(
        self,
        match: Match,
        *,
        num_tokens: int | None = None,
        spent_s: float = 0.0,
        group: str = NO_GROUP,
    ) -> None:
        """Note that `match` was served. Buffered: `flush` or the next put writes it.

        Its last entry is credited with the hit, and with what that saved: the prefill of the
        tokens that were used and are on disk, less the time that serving them took.

        Args:
            match: What `match` or `fetch` gave.
            num_tokens: Tokens that were used, if it was memory that served them.
            spent_s: Seconds that serving them took.
            group: That those of its entries belong to from now on that are used as a whole.
        """
        check_group(group)
        used = match.num_tokens if num_tokens is None else min(num_tokens, match.num_tokens)
        saved_s = match.saved_s * used / match.num_tokens if match.num_tokens else 0.0
        numbers = [int(one, 16) for one in match.entries]
        self._disk.touch(numbers, max(0.0, saved_s - spent_s), group, used)

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

    def get(self, entry: str) -> Entry:
        """The entry whose id is `entry`; `queries.ids` completes shortened ones.

        Raises:
            KeyError: No entry has this id.
        """
        with self._disk.index.read() as txn:
            found = catalog.load_entry(txn, _number(entry))
        if found is None:
            raise KeyError(f"no entry has the id {entry}")
        return found

    def pin(self, entry: str, pinned: bool = True) -> None:
        """Exempt the entry whose id is `entry` from eviction, or no longer.

        Raises:
            KeyError: No entry has this id.
        """
        self._change(entry, lambda record: record._replace(pinned=pinned))

    def expire_at(self, entry: str, when: float | None) -> None:
        """Let the entry whose id is `entry` expire at `when` (UTC seconds), or never.

        Raises:
            KeyError: No entry has this id.
        """
        expires = _checked_date(when)
        self._change(entry, lambda record: record._replace(expires=expires))

    def set_label(self, entry: str, label: str) -> None:
        """Name the entry whose id is `entry`.

        Raises:
            KeyError: No entry has this id.
        """
        self._change(entry, lambda record: record._replace(label=_text(label)))

    def set_group(self, entry: str, group: str) -> None:
        """Have the entry whose id is `entry` belong to a group, besides others.

        Raises:
            KeyError: No entry has this id.
            ValueError: That can be no name of a group.
        """
        check_group(group)

        def join(txn: Writer, number: int, record: EntryRecord) -> None:
            txn.join_group(number, group)

        self._apply(entry, join)

    def leave_group(self, entry: str, group: str) -> None:
        """Have the entry whose id is `entry` belong to a group no longer.

        Raises:
            KeyError: No entry has this id.
        """
        self._apply(entry, lambda txn, number, record: txn.leave_group(number, group))

    def evict(
        self,
        ids: Iterable[str],
        *,
        reason: str = REQUESTED,
        to_bytes: int | None = None,
        missing_ok: bool = False,
    ) -> int:
        """Remove entries, and every file that nothing else needs; returns the bytes freed.

        All of them go in one commit. Rows shared with other entries stay for those, and rows that
        nothing needs stay as long as their file does. A file that cannot be unlinked is tried again
        later, and not counted.

        Args:
            ids: Whole ids.
            reason: What `explain` is to say of them.
            to_bytes: What the store is to take afterwards, if that is what it is for: where only
                the room that is kept back for a full disk is in the way, that goes as well.
            missing_ok: Pass over entries that are not there, such as those that went meanwhile.

        Raises:
            KeyError: An id is unknown; nothing was removed.
        """
        numbers = list(dict.fromkeys(map(_number, ids)))
        return self._evictor.evict(numbers, reason, to_bytes=to_bytes, missing_ok=missing_ok)

    def erase(self, ids: Iterable[str] = ()) -> Erased:
        """Remove entries, and all that is left in the folder of what was ever removed.

        Rows in files that others need, damaged files, and tokens in free pages of the index. Files
        are overwritten before they are unlinked. What the entries that stay need stays. When it
        does not come to its end, the next call ends it. Processes of earlier versions that have the
        store open may write pages again that they wrote before.

        Args:
            ids: Whole ids; those that are not there are passed over.

        Returns:
            What was done, and whether something is left.

        Raises:
            StoreError: The disk failed; what was done until then stays done.
        """
        numbers = list(dict.fromkeys(map(_number, ids)))
        if numbers:
            with overwriting(self._disk):
                self._evictor.evict(numbers, REQUESTED, missing_ok=True, mark=UNFINISHED)
        return erase(self._disk, self._evictor)

    @property
    def is_erasing(self) -> bool:
        """Whether an erasure was begun and did not come to its end."""
        with self.read() as txn:
            return txn.counter(UNFINISHED) != 0

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
        from persist_cache.store import check  # takes long to import, and few commands check

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
        return self._upkeep.merge_runs(keep_on)

    def lifetimes(self) -> Callable[[Tier, Fingerprint | None], int | None] | None:
        """What says how many seconds something of a tier and a model lives by default.

        None where nothing is said of anything.
        """
        return by_fingerprint(self.ttl)

    def tidy(self) -> None:
        """Remove what has expired, and what exceeds a quota; for when nothing else is to be done.

        Does nothing when that was done less than some seconds ago.

        Raises:
            StoreError: The disk failed; what was done until then stays done.
        """
        if not self.read_only:
            self._upkeep.tidy()

    def gc(self, *, overwrites: bool = False) -> Collected:
        """Finish dead writers' work, apply expiry and budget, merge and compact blobs.

        Args:
            overwrites: Put zeros in the place of the bytes of files that go.

        Raises:
            StoreError: The disk failed; what was done until then stays done.
        """
        with overwriting(self._disk) if overwrites else contextlib.nullcontext():
            return self._upkeep.gc()

    def _change(self, entry: str, change: Callable[[EntryRecord], EntryRecord]) -> None:
        self._apply(entry, lambda txn, number, record: txn.put_entry(number, change(record)))

    def _apply(self, entry: str, change: Callable[[Writer, int, EntryRecord], None]) -> None:
        number = _number(entry)

        def apply(txn: Writer) -> None:
            record = txn.entry(number)
            if record is None:
                raise KeyError(f"no entry has the id {entry}")
            change(txn, number, record)

        self._disk.index.update(apply)


def _number(entry: str) -> int:
    """The number of the entry whose id is `entry`."""
    if not _ID.fullmatch(entry):
        raise KeyError(f"{entry!r} is not an entry id: one has 16 hex digits")
    return int(entry, 16)


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
