"""Look-ups: what of a prompt is stored, and reading and verifying it.

Matching reads the index alone, in one transaction. Loading opens the blobs of a match while no
transaction is open, so a blob may be gone or bad by then: a bad one goes into quarantine, and the
look-up starts again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from persist_cache import fs
from persist_cache.blobs.reader import BlobReader
from persist_cache.codec import Blob
from persist_cache.entry import Match, MissReason, Run
from persist_cache.errors import CorruptBlobError, StoreError
from persist_cache.index import tree
from persist_cache.index.records import NO_BLOB, BlobRecord, NamespaceRecord, entry_id
from persist_cache.index.transaction import Reader
from persist_cache.store import reasons
from persist_cache.store.evict import Evictor
from persist_cache.store.kin import Kin
from persist_cache.store.quarantine import quarantine
from persist_cache.store.session import Disk
from persist_cache.store.trail import Trail
from persist_cache.tokens import TOKEN_BYTES

if TYPE_CHECKING:
    from persist_cache.fingerprint.value import Fingerprint

log = logging.getLogger(__name__)
T = TypeVar("T")

_MAX_ATTEMPTS = 4
_MAX_OPEN_FILES = 200


class Lookup:
    """Looks up prompts in one store. Thread safety: as `Disk`."""

    def __init__(self, disk: Disk, evictor: Evictor) -> None:
        self._disk = disk
        self._evictor = evictor
        self._kin = Kin()

    def match(
        self, fingerprint: Fingerprint, packed: bytes, limit: int | None, trail: Trail
    ) -> Match:
        """Find the longest stored prefix of packed tokens; see `Store.match`."""
        length = len(packed) // TOKEN_BYTES
        limit = length if limit is None else max(0, min(limit, length))
        best: Match | None = None
        disk = self._disk
        with disk.index.read() as txn:
            for namespace, path in trail.ways(txn, disk, fingerprint.digest, packed):
                found = match_along(txn, namespace, path, length, limit)
                if found.why is not MissReason.NOTHING_STORED and (
                    best is None
                    or (found.num_tokens, found.common_tokens)
                    >= (best.num_tokens, best.common_tokens)
                ):
                    best = found
            if best is None:
                return self._kin.nothing(txn, fingerprint)
        return best

    def prompt_tokens(self, fingerprint: Fingerprint, packed: bytes, trail: Trail) -> int:
        """Leading tokens whose rows are a prompt's; see `Store.prompt_tokens`."""
        disk = self._disk
        with disk.index.read() as txn:
            ways = trail.ways(txn, disk, fingerprint.digest, packed)
            return max((tree.prompt_rows(txn, path) for _, path in ways), default=0)

    def load(
        self,
        fingerprint: Fingerprint,
        packed: bytes,
        match: Match,
        restore: Callable[[Sequence[tuple[Blob, int]], Blob | None, int], T],
        *,
        limit: int | None,
        min_tokens: int,
    ) -> tuple[T, Match] | None:
        """Read and verify what `match` found; see `Store.load`."""
        for attempt in range(_MAX_ATTEMPTS):
            try:
                if attempt:
                    match = self.match(fingerprint, packed, limit, Trail())
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
                self._disk.count("read_errors")
                log.warning("a stored prompt could not be read: %s", error)
                return None
        return None

    def read_ahead(self, match: Match) -> int:
        """Have the system read what `match` needs; see `Store.read_ahead`."""
        nbytes = 0
        for name in (*(run.blob for run in match.runs), match.checkpoint):
            if name is not None:
                with contextlib.suppress(OSError):
                    nbytes += fs.read_ahead(self._disk.folder.path(name))
        return nbytes

    def open_blob(self, name: str) -> BlobReader:
        """Open a recorded blob; see `Store.open_blob`."""
        with self._disk.index.read() as txn:
            record = _blob_record(txn, name)
        return self._opened(name, record)

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
                reader = self._opened(name, record)
                stack.callback(reader.close)
                if len(readers) >= _MAX_OPEN_FILES:
                    reader.release()
                readers.append(reader)
            checkpoint = None if match.checkpoint is None else readers.pop()
            used = (run.num_tokens for run in match.runs)
            yield list(zip(readers, used, strict=True)), checkpoint

    def _opened(self, name: str, record: BlobRecord | None) -> BlobReader:
        path = self._disk.folder.path(name)
        if record is None:
            raise FileNotFoundError(errno.ENOENT, "the blob was evicted", str(path))
        return BlobReader(path, nbytes=record.nbytes, digest=record.digest)

    def _quarantine(self, name: str, reason: str, is_unreadable: bool = False) -> None:
        """Take a bad blob out of service, if the store may be changed; never fails."""
        if self._disk.index.read_only:
            self._disk.count("bad_reads")
            log.warning("blob %s is bad: %s", name, reason)
            return
        try:
            if quarantine(self._disk, name, reason, is_unreadable=is_unreadable):
                self._disk.count("bad_reads")
            self._evictor.empty_trash()
        except StoreError as error:
            log.warning("blob %s is bad (%s) and could not be removed: %s", name, reason, error)


def match_along(
    txn: Reader, namespace: NamespaceRecord, path: tree.Walk, length: int, limit: int
) -> Match:
    """What can be resumed on the way of a prompt of `length` tokens, at most `limit` of them."""
    position, checkpoint = tree.resumable(txn, path, limit)
    why: MissReason | None = None
    if path.common == 0:
        stored = txn.children(namespace.root, limit=1)
        why = MissReason.OTHER_PROMPT if stored else MissReason.NOTHING_STORED
    elif position < min(path.common, limit):
        why = MissReason.NO_CHECKPOINT
    elif position == path.common < length:
        goes_on = path.node is None or txn.children(path.node, limit=1)
        why = MissReason.DIVERGES if goes_on else MissReason.ENDS
    if position == 0:
        return Match(0, common_tokens=path.common, reason=reasons.sentence(why), why=why)
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
        reason=reasons.sentence(why),
        why=why,
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


def _blob_record(txn: Reader, name: str) -> BlobRecord | None:
    number = txn.blob_number(bytes.fromhex(name))
    return None if number is None else txn.blob(number)
