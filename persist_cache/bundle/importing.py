"""From a bundle into a store, through the store's own put: all of its entries, or none.

So what is there already is shared and never overwritten, and the budget holds. Entries that an
import made stay out of eviction's reach until all of them are there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from persist_cache.entry import NO_GROUP, Tier
from persist_cache.errors import StoreError
from persist_cache.fingerprint.value import FieldChange, Fingerprint
from persist_cache.fingerprint.versions import installed_version
from persist_cache.index.transaction import Reader
from persist_cache.portable.entries import PortableEntry
from persist_cache.portable.needs import Need, need_of
from persist_cache.store.catalog import identity_of
from persist_cache.store.evict import UNDONE
from persist_cache.store.store import Store

Progress = Callable[[int, int], None]
"""Called with tokens done and tokens in total."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of one entry.

    Attributes:
        id: Of the entry.
        tier: Role class.
        label: The user's name for it.
        num_tokens: Its length.
        new_tokens: Tokens whose rows were not stored before.
        nbytes: Bytes written.
        was_there: The store has it already; nothing of it was changed.
    """

    id: str
    tier: Tier
    label: str
    num_tokens: int
    new_tokens: int
    nbytes: int
    was_there: bool


@dataclass(frozen=True, slots=True)
class Usability:
    """Whether a model here can use what a bundle holds.

    Attributes:
        usable: None when that cannot be told without being given a model.
        message: The answer in one sentence.
        changes: Fields of the identity that differ: from the bundle's to those here.
    """

    usable: bool | None
    message: str
    changes: list[FieldChange] = field(default_factory=list)


def usability(
    fingerprint: Fingerprint, here: Fingerprint | None = None, store: Store | None = None
) -> Usability:
    """Say whether entries of `fingerprint` can be used.

    Args:
        fingerprint: Identity of a model in the bundle.
        here: Identity of a model on this machine, if one was given.
        store: Knows where the models were whose entries were computed here.
    """
    if here is not None:
        if here.digest == fingerprint.digest:
            return Usability(True, "The model given can use it.")
        changes = here.diff(fingerprint.fields)
        names = ", ".join(change.name for change in changes)
        return Usability(False, f"The model given cannot use it; what differs: {names}.", changes)
    computed, installed = fingerprint.fields.get("mlx_lm", ""), installed_version("mlx-lm")
    if computed and installed and computed != installed:
        return Usability(
            False,
            f"Nothing here can use it: mlx-lm {computed} computed it, {installed} is installed.",
            [FieldChange("mlx_lm", computed, installed)],
        )
    folder = "" if store is None else _folder_of(store, fingerprint)
    if folder:
        return Usability(True, f"The model in {folder} computed entries of the same fingerprint.")
    return Usability(
        None, "Whether a model here can use it can be told when it is given with --model."
    )


def _folder_of(store: Store, fingerprint: Fingerprint) -> str:
    """Where the model is that computed entries here; "" if none did, or it is gone."""
    with store.read() as txn:
        namespaces = [record for _, record in txn.namespaces(fingerprint.digest)]
    for record in namespaces:
        folder = identity_of(record).info.get("path", "")
        if folder and Path(folder).is_dir():
            return folder
    return ""


def preview(store: Store | None, entries: Sequence[PortableEntry]) -> list[Imported]:
    """What `load` would do, with the bytes of KV alone; changes nothing.

    Args:
        store: Open for change, because evicting is tried and undone; None for an empty one.
        entries: Of an open bundle.

    Raises:
        StoreError: It would be refused.
    """
    if store is None:
        needs = [Need(False, 0, frozenset()) for _ in entries]
    else:
        needs = _needs(store, entries)
        _refuse_without_room(store, entries, needs)
    seen: set[tuple[object, int]] = set()
    found = []
    for entry, need in zip(entries, needs, strict=True):
        new = _new_rows(entry, need, seen)
        num_tokens = sum(rows for rows, _ in new)
        nbytes = int(sum(rows * per_row for rows, per_row in new)) + _state_bytes(entry, need)
        found.append(_imported(entry, entry.id, num_tokens, nbytes, was_there=need.is_there))
    return found


def load(
    store: Store,
    entries: Sequence[PortableEntry],
    *,
    here: Fingerprint | None = None,
    group: str = NO_GROUP,
    progress: Progress | None = None,
) -> list[Imported]:
    """Put entries of a bundle into a store.

    Tier, label and date come along; pins, groups, expiry and uses belong to the store they were in.

    Args:
        store: An open store.
        entries: Of a bundle that stays open, in its order.
        here: Identity of a model on this machine; if it is the bundle's, its names and paths are
            recorded instead of those in the bundle.
        group: That all of them belong to from now on, those that are there already, too.
        progress: Called after each entry.

    Raises:
        StoreFullError: There is no room within the budget; no entry was added.
        StoreError: The disk failed, or the bundle's file was changed meanwhile; no entry was
            added.
    """
    _refuse_without_room(store, entries, _needs(store, entries))
    total = sum(entry.num_tokens for entry in entries)
    done = 0
    added: list[str] = []
    found = []
    with contextlib.ExitStack() as stack:
        try:
            for entry in entries:
                one = _load_one(store, entry, here, group, added)
                found.append(one)
                stack.enter_context(store.serving([one.id]))
                done += entry.num_tokens
                if progress is not None:
                    progress(done, total)
        except BaseException:
            for one_id in added:
                with contextlib.suppress(StoreError, KeyError):
                    store.evict([one_id], reason=UNDONE)
            raise
    return found


def _load_one(
    store: Store, entry: PortableEntry, here: Fingerprint | None, group: str, added: list[str]
) -> Imported:
    """Put one entry; its id joins `added` before that, since a put may fail behind its commit."""
    with store.read() as txn:
        is_there = _need(txn, entry).is_there
    if is_there:
        if group != NO_GROUP:
            store.set_group(entry.id, group)
        return _imported(entry, entry.id, 0, 0, was_there=True)
    added.append(entry.id)
    known_here = here is not None and here.digest == entry.fingerprint.digest
    done = store.put(
        here if here is not None and known_here else entry.fingerprint,
        entry.packed,
        entry,
        tier=entry.tier,
        prefill_s=entry.prefill_s,
        label=entry.label,
        group=group,
    )
    assert done.entry is not None, "an entry of a bundle has tokens"
    store.date_back(done.entry, entry.created)
    return _imported(entry, done.entry, done.new_tokens, done.nbytes, was_there=False)


def _imported(
    entry: PortableEntry, one_id: str, new_tokens: int, nbytes: int, *, was_there: bool
) -> Imported:
    return Imported(
        id=one_id,
        tier=entry.tier,
        label=entry.label,
        num_tokens=entry.num_tokens,
        new_tokens=new_tokens,
        nbytes=nbytes,
        was_there=was_there,
    )


def _needs(store: Store, entries: Sequence[PortableEntry]) -> list[Need]:
    with store.read() as txn:
        return [_need(txn, entry) for entry in entries]


def _need(txn: Reader, entry: PortableEntry) -> Need:
    has_state, what = entry.state is not None, f"Entry {entry.id}"
    return need_of(txn, entry.namespace, entry.packed, has_state=has_state, what=what)


def _new_rows(
    entry: PortableEntry, need: Need, seen: set[tuple[object, int]]
) -> list[tuple[int, float]]:
    """Rows to be written, and bytes per row, for each run; `seen` are those counted before."""
    if need.is_there:
        return []
    new = []
    for part in entry.stretches:
        header = part.reader.header
        nbytes = sum(info.nbytes for info in header.tensors.values())
        # Several entries may use a run up to different positions.
        start = max([part.start, need.common, *(end for run, end in seen if run is part.reader)])
        if part.end > start:
            new.append((part.end - start, nbytes / (header.end - header.start)))
            seen.add((part.reader, part.end))
    return new


def _state_bytes(entry: PortableEntry, need: Need) -> int:
    """Bytes of the checkpoint to be written; none is needed where rows suffice."""
    if entry.state is None or need.is_there or entry.complete:
        return 0
    return entry.state.nbytes


def _refuse_without_room(
    store: Store, entries: Sequence[PortableEntry], needs: Sequence[Need]
) -> None:
    """Refuse entries that would not fit, before anything is evicted for some of them.

    Raises:
        StoreFullError: There is not enough that may go.
    """
    seen: set[tuple[object, int]] = set()
    nbytes = num_tokens = 0
    for entry, need in zip(entries, needs, strict=True):
        for rows, per_row in _new_rows(entry, need, seen):
            nbytes += int(rows * per_row)
            num_tokens += rows
        nbytes += _state_bytes(entry, need)
    if not num_tokens and not nbytes:
        return
    protected = frozenset[int]().union(*(need.nodes for need in needs))
    store.refuse_without_room(nbytes, num_tokens, protected, f"the bundle's {nbytes} bytes")
