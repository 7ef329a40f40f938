"""Which files are worth writing anew: those of mostly dead rows, and long chains of short ones.

An eviction frees a file only when nothing uses it any more. What shares its first rows keeps all
of it on disk, the evicted prompt's rows too. And a conversation leaves a file or two at each turn,
each with a header to be opened and parsed before the next answer after a restart can begin.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise

from persist_cache.blobs.header import ALIGNMENT
from persist_cache.entry import Tier
from persist_cache.errors import CorruptBlobError, StoreFormatError, StoreFullError
from persist_cache.index import tree
from persist_cache.index.records import (
    NO_ENTRY,
    BlobKind,
    BlobRecord,
    Edge,
    EntryRecord,
    edge_parent,
)
from persist_cache.index.transaction import Reader
from persist_cache.store.evict import Evictor
from persist_cache.store.quarantine import quarantine
from persist_cache.store.rewrite import LivingRun, NotRewrittenError, living_run, rewrite
from persist_cache.store.session import Disk

log = logging.getLogger(__name__)

LONG_CHAIN = 48
"""Entries or runs on a way from which on it is merged: more than twenty turns of a conversation
leave behind, so that those are written once."""
FURTHER_RUNS = 8
"""Short runs behind the merged ones that are merged in their turn."""
_SHORT_BYTES = 16 << 20
"""A file beyond this takes longer to read than to open."""
_MERGED_BYTES = 128 << 20
"""Largest merged file, about: a request that comes meanwhile waits for no more than that."""
_MERGED_RUNS = 64
"""Files open at the same time; macOS allows a process 256."""
_MOST_BESIDE = 3
"""Replies beside the one that a conversation went on with, at one turn."""
_Edges = list[tuple[bytes, Edge]]


def compact(disk: Disk, evictor: Evictor, *, any_dead: bool = False) -> tuple[int, int]:
    """Write blobs anew of which more than half is dead, the shortest copies first.

    Nothing is evicted for that. A blob that turns out to be damaged goes to quarantine.

    Args:
        disk: The store.
        evictor: Its evictor.
        any_dead: Also those of which less is.

    Returns:
        How many were written anew, and how many stay because there is no room for a copy.

    Raises:
        StoreError: The disk failed.
    """
    with disk.index.read() as txn:
        jobs = sorted(_mostly_dead(txn, any_dead), key=lambda run: run.num_tokens)
    blobs = without_room = 0
    for run in jobs:
        try:
            blobs += _try_rewrite(disk, evictor, [run])
        except StoreFullError:
            without_room += 1
    return blobs, without_room


def merge_chains(
    disk: Disk,
    evictor: Evictor,
    entry: int,
    run_tokens: int,
    keep_on: Callable[[], bool] = lambda: True,
) -> int:
    """Make one file of many where the way to an entry is a long chain of short runs.

    Rows are written again each time their chain has become three times as long, not at every turn:
    a run that is longer than half of what follows it stays. Nothing is evicted for a copy, and no
    file gets rows of two entries between which somebody drew a line: a branch whose both sides go
    on, a pin, a date, a system prompt. Else evicting what is below the line would free nothing.

    Args:
        disk: The store.
        evictor: Its evictor.
        entry: Number of the entry; one that others continue, or go on beside, is passed over.
        run_tokens: Longest run in one blob.
        keep_on: Asked before each file; False ends the work.

    Returns:
        How many files others took the place of.

    Raises:
        StoreError: The disk failed.
    """
    with disk.index.read() as txn:
        jobs = _long_chains(txn, entry, run_tokens)
    merged = 0
    for runs in jobs:
        if not keep_on():
            break
        try:
            merged += len(runs) * _try_rewrite(disk, evictor, runs)
        except StoreFullError:
            log.debug("there is no room to merge %d runs", len(runs))
    return merged


def _try_rewrite(disk: Disk, evictor: Evictor, runs: Sequence[LivingRun]) -> bool:
    """Write `runs` anew as one; returns whether that came true."""
    try:
        rewrite(disk, evictor, runs)
        return True
    except NotRewrittenError as error:
        log.debug("blob %s is left as it is: %s", runs[-1].record.name.hex(), error)
    except StoreFormatError as error:
        log.warning("blob %s is left as it is: %s", runs[-1].record.name.hex(), error)
    except CorruptBlobError as error:
        quarantine(disk, error.path.stem, error.reason, is_unreadable=error.is_unreadable)
    finally:
        evictor.empty_trash()
    return False


def is_mostly_dead(record: BlobRecord, living: int) -> bool:
    """Whether more than half of a run's file are rows behind its first `living` ones."""
    dead = record.num_tokens - living
    return 2 * dead * (record.nbytes - ALIGNMENT) > record.num_tokens * record.nbytes


def _mostly_dead(txn: Reader, any_dead: bool) -> Iterator[LivingRun]:
    living: Counter[int] = Counter()
    first: dict[int, bytes] = {}
    for key, edge in txn.edges():
        living[edge.blob] += edge.rows
        if edge.first_row == 0:
            first[edge.blob] = key
    for number, record in txn.blobs():
        if record.kind != BlobKind.RUN:
            continue
        dead = living[number] < record.num_tokens
        if dead and (any_dead or is_mostly_dead(record, living[number])):
            yield living_run(txn, first[number])


def _long_chains(txn: Reader, number: int, run_tokens: int) -> Sequence[Sequence[LivingRun]]:
    """Runs on the way to a leaf that are to be merged, those of one file each."""
    groups: list[Sequence[LivingRun]] = []
    for chain in _chains(txn, _way_to_leaf(txn, number, run_tokens)):
        *full, last = _in_files(_without_long_head(chain), run_tokens)
        # What follows will never be in one file with a full one: it need not wait to be worth it.
        groups += [_without_long_head(group, share=1) for group in full]
        groups.append(_without_long_head(last))
    groups = [group for group in groups if len(group) > 1]
    # Files that are full, or as long as what follows them, do not make a way long.
    return groups if sum(map(len, groups)) >= FURTHER_RUNS else []


def _without_long_head(chain: Sequence[LivingRun], share: int = 2) -> Sequence[LivingRun]:
    """Leave out what is longer than half of what is behind: to copy that again would cost much."""
    while chain and share * chain[0].num_tokens > sum(run.num_tokens for run in chain[1:]):
        chain = chain[1:]
    return chain


def _way_to_leaf(txn: Reader, number: int, run_tokens: int) -> list[_Edges]:
    """The edges of each run on the way to a leaf, if it is long: many entries, or runs not full.

    None for a reply that hangs beside a way: that is looked at from its own leaf.
    """
    record = txn.entry(number)
    above = None if record is None else txn.parent_key(record.node)
    if record is None or above is None or txn.children(record.node, limit=1):
        return []
    beside = txn.children(edge_parent(above), limit=_MOST_BESIDE + 2)
    if any(key != above and not _is_dead_end(txn, edge) for key, edge in beside):
        return []
    way = tree.path_of(txn, record.node)
    runs = [list(edges) for _, edges in groupby(way, key=lambda step: step[1].blob)]
    if len(runs) <= FURTHER_RUNS:
        return []
    turns = sum(edge.entry != NO_ENTRY for _, edge in way)
    if turns <= LONG_CHAIN < len(runs):
        turns = sum(sum(edge.rows for _, edge in edges) < run_tokens for edges in runs)
    return runs if turns > LONG_CHAIN else []


def _chains(txn: Reader, way: Sequence[_Edges]) -> Iterator[list[LivingRun]]:
    """Stretches of short runs between which nobody drew a line.

    The last run is left out: it goes first when room is needed, or the next turn cuts it.
    """
    chain: list[LivingRun] = []
    complete = False
    for edges, below in pairwise(way):
        run = living_run(txn, edges[0][0])
        if _is_short(txn, run, edges):
            if chain and complete != edges[0][1].complete:
                yield chain
                chain = []
            chain.append(run)
            complete = edges[0][1].complete
            if _is_passed(txn, edges[-1][1], below[0][0]):
                continue
        if chain:
            yield chain
            chain = []
    if chain:
        yield chain


def _is_short(txn: Reader, run: LivingRun, edges: _Edges) -> bool:
    """Whether a run is short, lives on this way only, and has no line within."""
    return (
        run.record.nbytes < _SHORT_BYTES
        and sum(edge.rows for _, edge in edges) == run.num_tokens
        and all(_is_passed(txn, edge, below) for (_, edge), (below, _) in pairwise(edges))
    )


def _is_passed(txn: Reader, edge: Edge, below: bytes) -> bool:
    """Whether what is above the end of `edge` may go together with the edge under `below`."""
    entry = txn.entry(edge.entry) if edge.entry != NO_ENTRY else None
    if entry is not None and (_is_kept(entry) or entry.tier == Tier.SYSTEM):
        return False
    beside = txn.children(edge.node, limit=_MOST_BESIDE + 2)
    return len(beside) <= _MOST_BESIDE + 1 and all(
        key == below or _is_dead_end(txn, other) for key, other in beside
    )


def _is_dead_end(txn: Reader, edge: Edge) -> bool:
    """Whether below `edge` is one reply that nobody went on from: it is evicted before the way.

    Conversations have one at each turn if the next request says the reply in other tokens, as
    those do that leave the model's reasoning out.
    """
    entry = txn.entry(edge.entry) if edge.entry != NO_ENTRY else None
    if entry is None or _is_kept(entry) or entry.tier != Tier.ASSISTANT:
        return False
    return not txn.children(edge.node, limit=1)


def _is_kept(entry: EntryRecord) -> bool:
    """Whether somebody said how long an entry stays."""
    return entry.pinned or entry.expires != 0


def _in_files(chain: Sequence[LivingRun], run_tokens: int) -> Iterator[Sequence[LivingRun]]:
    """Cut a chain into what goes into one file each; the last of them may have room left."""
    group: list[LivingRun] = []
    for run in chain:
        num_tokens = sum(one.num_tokens for one in group) + run.num_tokens
        nbytes = sum(one.nbytes for one in group) + run.nbytes
        if num_tokens > run_tokens or nbytes > _MERGED_BYTES or len(group) == _MERGED_RUNS:
            yield group
            group = []
        group.append(run)
    yield group
