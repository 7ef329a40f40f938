"""Reserving room for files before they are written, and giving it back.

A reservation is a record in `pending` for each file, which counts against the budget at once. It
ends with the commit that records the blob, or with `release`; the reservations of a writer that
died are found by their files, which nobody holds locked any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

from persist_cache.blobs.folder import try_remove_orphan
from persist_cache.blobs.writer import BlobWriter
from persist_cache.errors import StoreError, StoreFullError
from persist_cache.index.records import SizedRecord
from persist_cache.index.transaction import Writer
from persist_cache.store.evict import Evictor
from persist_cache.store.session import Disk
from persist_cache.store.unreturned import WHY, Rounds

_FUTILE_ROUNDS = 1


class _Feasible(Exception):
    """All that a put needs could be evicted: a part of it may be, to see whether that helps."""


def reserve(
    disk: Disk,
    evictor: Evictor,
    names: Sequence[bytes],
    nbytes: int,
    num_tokens: int,
    protected: frozenset[int] | None,
    *,
    identity: str = "",
) -> None:
    """Make room for files called `names`, and note in the index that the room is taken.

    Args:
        disk: The store.
        evictor: Frees the room.
        names: Blob names, 16 bytes each; their temporary files exist and are locked.
        nbytes: Upper estimate of what they will take together.
        num_tokens: New tokens, for the growth of the index.
        protected: Nodes whose entries must stay: the path that is being extended. None:
            nothing is to be evicted for it.
        identity: JSON of the model's identity, by whose quotas they are bounded as well.

    Raises:
        StoreFullError: There is not enough that may go; nothing was evicted.
    """
    disk.flush()
    evictor.empty_trash()
    budget = disk.budget
    swept = False
    share = nbytes // len(names) + 1
    now = disk.clock()
    note = disk.quotas.note(identity)
    budget.settle(nbytes, num_tokens)

    rounds = Rounds(disk.unreturned, budget, disk.index)
    unlinked = 0

    def attempt(txn: Writer) -> bool:
        nonlocal unlinked
        unlinked = 0
        budget.refuse_impossible(txn, nbytes, num_tokens)
        if disk.quotas.lacks(txn, identity, nbytes, evictor, protected, is_swept=swept):
            return True
        over, missing = budget.lacks(txn, nbytes, num_tokens)
        excess = max(over, missing)
        if excess <= 0:
            for name in names:
                txn.put_sized(b"pending", name, SizedRecord(share, now, note))
            return False
        if not swept:
            return True
        usage = budget.usage(txn)
        hopeless = excess > usage.blobs + usage.quarantine
        for_floor = missing > max(over, 0)
        if for_floor and rounds.is_feasible:
            # More than the budget asks for only as far as that is seen to help.
            part = max(over, rounds.begin(missing))
            unlinked = evictor.free(txn, part, protected or frozenset())
            return True
        if protected is None or hopeless or evictor.make_room(txn, excess, protected) < 0:
            # Raising undoes the evictions: they would have been for nothing.
            raise StoreFullError(
                "There is no room left: what may go is too little, the rest is pinned or in "
                "use. Unpin or evict something, free some disk space, or raise the budget "
                f"(now {disk.limits.max_bytes} bytes)."
            )
        if for_floor:
            disk.unreturned.refuse_during_pause(txn)
            raise _Feasible
        return True

    while True:
        try:
            if not disk.index.update(attempt):
                return
        except _Feasible:
            rounds.is_feasible = True
            continue
        if not swept:
            # Nothing useful goes for what a dead writer reserved and will not write.
            release_abandoned(disk)
            swept = True
        elif not evictor.empty_trash():
            # Files that stay would have us evict everything, one round after the other.
            raise StoreFullError(
                "There is no room left: evicted files cannot be removed from the store's "
                "folder; look at its permissions."
            )
        else:
            # Else what is useful would go for room that is there, but told late.
            budget.settle(nbytes, num_tokens, after_removals=True)
        rounds.judge(unlinked)


def free_files(disk: Disk, evictor: Evictor, wanted: int, protected: frozenset[int]) -> None:
    """Evict until the file system has room for `wanted` files, whatever their bytes.

    Raises:
        StoreFullError: There is not enough that may go; nothing was evicted.
    """
    release_abandoned(disk)
    evictor.empty_trash()
    before, futile = -1, 0
    while True:
        free = disk.budget.free_files()
        if free is None or free >= wanted:
            return
        futile = futile + 1 if free <= before else 0
        if futile > _FUTILE_ROUNDS:
            raise StoreFullError(
                "The disk has no room for another file (its number of files is limited, "
                f"df -i), and evicting gave nothing back, because {WHY}."
            )
        before, missing = free, wanted - free

        def drop(txn: Writer, missing: int = missing) -> None:
            start = len(txn.sized(b"trash"))
            left = evictor.drop_until(
                txn,
                lambda freed, dropped: len(txn.sized(b"trash")) - start - missing,
                protected,
            )
            if left < 0:
                raise StoreFullError(
                    "The disk has no room for another file (its number of files is limited, "
                    "df -i), and what may go is too little. Unpin or evict something, or "
                    "remove files there; nothing was changed."
                )

        evictor.update(drop)
        if not evictor.empty_trash():
            raise StoreFullError(
                "The disk has no room for another file, and evicted files cannot be removed "
                "from the store's folder; look at its permissions."
            )
        disk.folder.remove_empty()


def release(disk: Disk, names: Sequence[bytes]) -> None:
    """Give a reservation back."""

    def forget(txn: Writer) -> None:
        for name in names:
            txn.delete_sized(b"pending", name)

    disk.index.update(forget)


def release_abandoned(disk: Disk) -> None:
    """Give back what dead writers reserved, and remove the files that they left."""
    with disk.index.read() as txn:
        pending = list(txn.sized(b"pending"))
    dead = [name for name in pending if _is_abandoned(disk, name)]
    if dead:
        release(disk, dead)


def _is_abandoned(disk: Disk, name: bytes) -> bool:
    """Whether nothing is left of a reserved file, its writer being dead; removes what is."""
    folder = disk.folder
    # A writer renames from the first place to the second, so in this order none is missed.
    places = (folder.temporary_path(name.hex()), folder.path(name.hex()))
    is_recorded = partial(disk.is_recorded, name)
    return all(
        try_remove_orphan(path, is_recorded, overwrites=disk.overwrites)
        for path in places
        if path.exists()
    )


@contextlib.contextmanager
def undone(disk: Disk, writers: Sequence[BlobWriter]) -> Iterator[None]:
    """If the block fails, remove the files and give the room back that is reserved for them."""
    try:
        yield
    except BaseException:
        # If this fails, the next sweep finds files and reservation without a living writer.
        with contextlib.suppress(StoreError):
            _undo(disk, writers)
        raise


def _undo(disk: Disk, writers: Sequence[BlobWriter]) -> None:
    names = [bytes.fromhex(writer.name) for writer in writers]
    with disk.index.read() as txn:
        committed = [txn.blob_number(name) is not None for name in names]
    if any(committed):  # after all
        for writer in writers:
            writer.keep()
        return
    # Files first: one without a reservation would be found by a full scan only.
    for writer in writers:
        writer.discard()
    release(disk, [name for name, w in zip(names, writers, strict=True) if w.is_gone])
