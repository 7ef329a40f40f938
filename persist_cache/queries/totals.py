"""What people ask of a store: its models, what an entry is made of, what an eviction would free.

Reads the index only: no file is opened and no model is needed, so it works beside a running
server, and on a store that may not be changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import cached_property
from itertools import compress, count, islice
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import Struct

from persist_cache.entry import Entry, Tier
from persist_cache.fingerprint.versions import installed_version
from persist_cache.index import tree
from persist_cache.index.environment import Reader, Writer
from persist_cache.index.records import (
    NO_BLOB,
    NO_ENTRY,
    BlobRecord,
    NamespaceRecord,
    entry_id,
    unpack_number,
)
from persist_cache.store.catalog import (
    Catalog,
    known_blob,
    load_entry,
    namespace_of,
)
from persist_cache.store.store import Store
from persist_cache.tokens import unpack_tokens

if TYPE_CHECKING:
    from persist_cache.fingerprint.value import Identifier

SHORT_ID_DIGITS = 6
"""Short ids have at least as many digits."""
_OPTION_FIELDS = frozenset(
    {"kv_bits", "kv_group_size", "quantized_kv_start", "max_kv_size", "salt", "layout"}
)
"""What a request chooses, not a model: such fields never make a model unknown."""
_ID_DIGITS = 16
K = TypeVar("K", bound=Hashable)


class Model(Struct, frozen=True):
    """An identity that entries belong to.

    Attributes:
        fingerprint: Hex digest.
        fields: What is in the key, readable.
        info: Recorded next to it: names, paths, versions that do not matter.
    """

    fingerprint: str
    fields: Mapping[str, str] = {}
    info: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        """The model as its user named it, with its adapter; else what kind it is."""
        name = self.info.get("name") or self.fields.get("model_type") or "unnamed"
        adapter = self.info.get("adapter")
        return f"{name} + {Path(adapter).name}" if adapter else name

    @property
    def path(self) -> str:
        """Folder that it was loaded from, or ""."""
        return self.info.get("path", "")


class RunDetails(Struct, frozen=True):
    """One blob on the path of an entry.

    Attributes:
        blob: Its name.
        path: Its file.
        start: Position of its first token.
        num_tokens: Tokens of it that the entry uses.
        blob_tokens: Tokens that it has.
        nbytes: Length of the file.
        entries: Entries that use it.
        created: UTC seconds.
    """

    blob: str
    path: str
    start: int
    num_tokens: int
    blob_tokens: int
    nbytes: int
    entries: int
    created: float


class Details(Struct, frozen=True):
    """Everything about one entry.

    Attributes:
        entry: The entry.
        model: Whose it is.
        layout: JSON of the cache classes and their geometry.
        runs: The blobs with its rows, in order.
        checkpoint: The blob with the state at its end, or None when rows suffice.
        children: Ids of the entries that go on right after it.
    """

    entry: Entry
    model: Model
    layout: str
    runs: tuple[RunDetails, ...]
    checkpoint: RunDetails | None
    children: tuple[str, ...]


class Removal(Struct, frozen=True):
    """What an eviction would do.

    Attributes:
        freed_bytes: Bytes of files that would go.
        kept_bytes: Bytes of the evicted entries' rows that others need too.
        kept_for: Number of those others.
        dead_bytes: Bytes of rows that nothing would need any more, in files that stay for others.
    """

    freed_bytes: int
    kept_bytes: int
    kept_for: int
    dead_bytes: int


def left_in_trash(store: Store, missing_bytes: int) -> int:
    """How much of what an eviction did not free is still there, because unlinking it failed.

    Args:
        store: After the eviction.
        missing_bytes: What was to be freed and was not; other processes may have freed it.
    """
    with store._disk.index.read() as txn:
        trash = sum(record.nbytes for record in txn.sized(b"trash").values())
    return max(0, min(missing_bytes, trash))


class Amount(Struct, frozen=True):
    """How much there is of something.

    Attributes:
        entries: Number of entries.
        nbytes: Bytes of the files behind them; none is counted twice.
        hits: Requests that they served, from disk or out of memory.
        saved_s: Seconds of prefill that saved, less what reading took.
    """

    entries: int = 0
    nbytes: int = 0
    hits: int = 0
    saved_s: float = 0.0


class Quarantined(Struct, frozen=True):
    """A damaged blob that was taken out of service; `since` in UTC seconds."""

    blob: str
    nbytes: int
    since: float
    reason: str


class Departed(Struct, frozen=True):
    """An entry that is no longer there, and why; `since` in UTC seconds."""

    id: str
    since: float
    reason: str


class LeftBehind(Struct, frozen=True):
    """Entries that no model can find any more, because of the versions installed here.

    Attributes:
        reason: Why.
        entries: Number of entries.
        nbytes: Bytes of the files behind them.
        pinned: Of the entries, those that only go when they are named.
    """

    reason: str
    entries: int
    nbytes: int
    pinned: int


class Survey:
    """A view of all entries of a store as of one moment.

    Attributes:
        entries: All entries, in the order of their ids.
        ids: Theirs, sorted.
        models: By fingerprint; also those that have no entries left.
        fingerprints: By the number of a namespace, of which a model has one for each layout.
    """

    def __init__(self, store: Store) -> None:
        """Load the index of `store`.

        Raises:
            StoreError: The index contradicts itself.
        """
        self._store = store
        with store._disk.index.read(copies=True) as txn:
            self._catalog = Catalog(txn)
        self.models = {
            key[:32].hex(): _model(key, record) for key, record in self._catalog.namespaces.values()
        }

    @cached_property
    def entries(self) -> list[Entry]:
        return self._catalog.entries()

    @property
    def ids(self) -> list[str]:
        return self._catalog.ids

    @property
    def fingerprints(self) -> dict[int, str]:
        return self._catalog.fingerprints

    @property
    def num_entries(self) -> int:
        return len(self._catalog.rows)

    def entries_at(self, rows: Sequence[int]) -> list[Entry]:
        """The entries at these places of `entries`, in the order of `rows`."""
        return self._catalog.entries(rows)

    def columns(self, rows: Sequence[int], fields: Sequence[str]) -> dict[str, Sequence[Any]]:
        """Like `entries_at`, but each field of all: for thousands, in a fraction of the time."""
        return self._catalog.columns(rows, fields)

    def model_of(self, entry: Entry) -> Model:
        return self.models.get(entry.fingerprint) or Model(entry.fingerprint)

    def added_bytes(self, entry: Entry) -> int:
        """Bytes that `entry` has beyond the one it continues, whoever else needs them."""
        catalog = self._catalog
        row = catalog.rows[int(entry.id, 16)]
        checkpoint = catalog.table.checkpoints[row]
        total = 0 if checkpoint == NO_BLOB else catalog.disk_bytes[checkpoint]
        place = catalog.places[catalog.table.nodes[row]]
        while True:
            total += catalog.shares[place]
            place = catalog.above[place]
            if place < catalog.first or catalog.ends[place] != NO_ENTRY:
                return total

    def removal(self, ids: Collection[str]) -> Removal:
        """What evicting the entries `ids` would free, and what stays because others need it."""
        catalog = self._catalog
        doomed = {int(one, 16) for one in ids}
        left = catalog.count_users(doomed)
        living: set[int] = set()
        dying = {catalog.table.checkpoints[catalog.rows[one]] for one in doomed}
        kept_bytes = kept_for = 0
        dying_rows: list[tuple[int, int]] = []
        for place in range(catalog.first, len(left)):
            stay = left[place]
            (living if stay else dying).add(catalog.blobs[place])
            if not stay:
                dying_rows.append((catalog.blobs[place], catalog.shares[place]))
            if stay and stay < catalog.users[place]:
                kept_bytes += catalog.shares[place]
                if catalog.above[place] < catalog.first:
                    kept_for += stay
        return Removal(
            freed_bytes=sum(catalog.disk_bytes[blob] for blob in dying - living - {NO_BLOB}),
            kept_bytes=kept_bytes,
            kept_for=kept_for,
            dead_bytes=sum(nbytes for blob, nbytes in dying_rows if blob in living),
        )

    @cached_property
    def by_tier(self) -> dict[Tier, Amount]:
        """Per tier; rows that several share count for the highest tier among them."""
        catalog = self._catalog
        tier_of = dict(zip(catalog.table.numbers, catalog.table.tiers, strict=True))
        tier_of[NO_ENTRY] = min(Tier)
        highest = list(map(tier_of.__getitem__, catalog.ends))
        nbytes = dict.fromkeys(map(int, Tier), 0)
        above = catalog.above
        for place in range(len(highest) - 1, catalog.first - 1, -1):
            tier = highest[place]
            nbytes[tier] += catalog.shares[place]
            if highest[above[place]] < tier:
                highest[above[place]] = tier
        amounts = self._amounts(nbytes, catalog.table.tiers)
        return {tier: amounts[tier] for tier in Tier}

    @cached_property
    def by_model(self) -> dict[str, Amount]:
        """Per fingerprint, those without entries left out."""
        catalog = self._catalog
        key_of = catalog.fingerprints
        # The roots come first, in the order of the namespaces.
        models = list(key_of.values())
        nbytes: Counter[str] = Counter()
        for place in range(catalog.first, len(catalog.above)):
            model = models[catalog.above[place]]
            models.append(model)
            nbytes[model] += catalog.shares[place]
        return self._amounts(nbytes, [key_of[one] for one in catalog.table.namespaces])

    @cached_property
    def left_behind(self) -> list[LeftBehind]:
        """What an upgrade left behind, by reason, the most bytes first; no model is looked at."""
        reasons = {key: outdated_reason(self.models[key]) for key in self.by_model}
        table = self._catalog.table
        pinned = Counter(
            self.fingerprints[namespace] for namespace in compress(table.namespaces, table.pinned)
        )
        found: dict[str, LeftBehind] = {}
        for key, reason in reasons.items():
            if reason:
                before = found.get(reason, LeftBehind(reason, 0, 0, 0))
                amount = self.by_model[key]
                found[reason] = LeftBehind(
                    reason,
                    before.entries + amount.entries,
                    before.nbytes + amount.nbytes,
                    before.pinned + pinned[key],
                )
        return sorted(found.values(), key=lambda one: -one.nbytes)

    @cached_property
    def saved_s(self) -> float:
        """Seconds of prefill that the hits of all entries saved."""
        return sum(self._catalog.table.saved_s)

    def _amounts(self, nbytes: Mapping[K, int], keys: Sequence[K]) -> dict[K, Amount]:
        """Totals of the entries with the same key; `nbytes` are those of their rows."""
        table = self._catalog.table
        numbers = {key: [0, amount, 0] for key, amount in nbytes.items()}
        seconds = dict.fromkeys(nbytes, 0.0)
        for key, checkpoint, hits, saved_s in zip(
            keys,
            self._catalog.checkpoint_bytes(table.checkpoints),
            table.hits,
            table.saved_s,
            strict=True,
        ):
            sums = numbers[key]
            sums[0] += 1
            sums[1] += checkpoint
            sums[2] += hits
            seconds[key] += saved_s
        return {
            key: Amount(entries, amount, hits, seconds[key])
            for key, (entries, amount, hits) in numbers.items()
        }


def details_of(store: Store, entry: str) -> Details | None:
    """What an entry is made of, or None when it is not stored.

    Reads what is above and below the entry, not the whole index.

    Raises:
        StoreError: The index contradicts itself.
    """
    number = int(entry, 16)
    with store._disk.index.read() as txn:
        found = load_entry(txn, number)
        record = txn.entry(number)
        if found is None or record is None:
            return None
        key, namespace = namespace_of(txn, record)
        checkpoint = None
        if record.checkpoint != NO_BLOB:
            checkpoint = _run(store, known_blob(txn, record.checkpoint), 0, 1)
        return Details(
            entry=found,
            model=_model(key, namespace),
            layout=namespace.layout,
            runs=_runs(store, txn, record.node),
            checkpoint=checkpoint,
            children=tuple(sorted(map(entry_id, tree.entries_behind(txn, record.node)))),
        )


def _runs(store: Store, txn: Reader, node: int) -> tuple[RunDetails, ...]:
    """The blobs on the way to `node`, each with the number of entries that use it."""
    runs: list[RunDetails] = []
    users = 0
    lower = None
    for _, edge in reversed(tree.path_of(txn, node)):
        users += edge.entry != NO_ENTRY
        for _, beside in txn.children(edge.node):
            if beside.node != lower:
                users += (beside.entry != NO_ENTRY) + sum(
                    one.entry != NO_ENTRY for one in tree.edges_below(txn, beside.node)
                )
        blob = known_blob(txn, edge.blob)
        rows = edge.rows
        if runs and runs[-1].blob == blob.name.hex():
            rows += runs.pop().num_tokens
        runs.append(_run(store, blob, rows, users))
        lower = edge.node
    return tuple(reversed(runs))


def _run(store: Store, blob: BlobRecord, rows: int, users: int) -> RunDetails:
    name = blob.name.hex()
    path = str(store._disk.folder.path(name))
    return RunDetails(
        name, path, blob.start, rows, blob.num_tokens, blob.nbytes, users, blob.created
    )


def _model(key: bytes, record: NamespaceRecord) -> Model:
    try:
        # Not by `Fingerprint.from_json`: loading hashlib would take longer than all models do.
        said = msgspec.json.decode(record.identity, type=dict[str, dict[str, str]])
        return Model(key[:32].hex(), said["fields"], said.get("info", {}))
    except (msgspec.MsgspecError, KeyError):
        return Model(key[:32].hex())


def short_id(store: Store, entry: str) -> str:
    """The shortest prefix of one id that no other one has, as `short_ids` gives it."""
    length = SHORT_ID_DIGITS
    while length < len(entry) and len(find_ids(store, entry[:length], limit=2)) > 1:
        length += 1
    return entry[:length]


def short_ids(ids: Sequence[str], at_least: int = SHORT_ID_DIGITS) -> dict[str, str]:
    """The shortest prefix of each id that no other one has.

    Args:
        ids: Ids of all entries, sorted.
        at_least: Digits that are shown even if fewer would do.
    """
    least = [one[:at_least] for one in ids]
    short = dict(zip(ids, least, strict=True))
    # Ids with the same beginning lie side by side.
    alike = compress(count(), map(eq, least, islice(least, 1, None)))
    for place in sorted({near for at in alike for near in (at, at + 1)}):
        one, length = ids[place], at_least
        beside = [*ids[max(place - 1, 0) : place], *ids[place + 1 : place + 2]]
        while length < len(one) and any(one[:length] == other[:length] for other in beside):
            length += 1
        short[one] = one[:length]
    return short


def find_ids(store: Store, prefix: str, limit: int = 8) -> list[str]:
    """Ids that begin with `prefix`, in order, at most `limit` of them."""
    found: list[str] = []
    with store._disk.index.read() as txn:
        for number in txn.entries_from(int(prefix.ljust(_ID_DIGITS, "0"), 16)):
            if len(found) == limit or not entry_id(number).startswith(prefix):
                break
            found.append(entry_id(number))
    return found


def find_departed(store: Store, prefix: str) -> Departed | None:
    """The entry whose id began with `prefix` and that went last, if that is remembered."""
    with store._disk.index.read() as txn:
        departed = [
            Departed(entry_id(unpack_number(key)), record.since, record.note)
            for key, record in txn.sized(b"departed").items()
            if entry_id(unpack_number(key)).startswith(prefix)
        ]
    return max(departed, key=lambda one: one.since, default=None)


def quarantined(store: Store) -> list[Quarantined]:
    """Damaged blobs that are kept aside."""
    with store._disk.index.read() as txn:
        return [
            Quarantined(name.hex(), record.nbytes, record.since, record.note)
            for name, record in txn.sized(b"quarantine").items()
        ]


def tokens_of(store: Store, entry: str) -> list[int]:
    """The token ids of an entry.

    Raises:
        KeyError: It is not stored.
    """
    with store._disk.index.read() as txn:
        record = txn.entry(int(entry, 16))
        if record is None:
            raise KeyError(entry)
        return unpack_tokens(tree.tokens_of(txn, record.node))


class _UndoError(Exception):
    """Ends a transaction without a commit."""


def victims_until(store: Store, max_bytes: int, candidates: Collection[str]) -> list[str]:
    """Entries that would have to go for the store to take at most `max_bytes`.

    They are found by evicting in a transaction that is not committed, so the answer is what an
    eviction would do.

    Args:
        store: Open for change.
        max_bytes: Bytes that the store may take on disk.
        candidates: Ids of the entries that may go; a pinned one never does.

    Returns:
        Ids in the order of eviction; all that may go if even that is not enough.
    """
    disk = store._disk
    numbers = {int(one, 16) for one in candidates}
    chosen: list[str] = []

    def try_it(txn: Writer) -> None:
        chosen.clear()
        protected = {record.node for number, record in txn.entries() if number not in numbers}
        start = txn.counter(tree.BLOB_BYTES)
        usage = disk.budget.usage(txn)
        excess = usage.total - max_bytes
        if usage.without_entries > max_bytes:
            excess -= usage.ballast  # it goes as well
        if excess > 0:
            for number in tree.victims(txn, protected):
                tree.drop_entry(txn, number, "", disk.clock())
                chosen.append(entry_id(number))
                if start - txn.counter(tree.BLOB_BYTES) >= excess:
                    break
        raise _UndoError

    try:
        disk.index.update(try_it)
    except _UndoError:
        return chosen
    raise AssertionError("unreachable")


def stale_reason(model: Model, identifier: Identifier) -> str:
    """Why nothing installed here can use this model's entries any more; "" if something may.

    Args:
        model: A model of the store.
        identifier: Looks at the files; its own KV options do not matter.
    """
    from persist_cache.fingerprint.value import Unidentified

    if outdated := outdated_reason(model):
        return outdated
    name, adapter = model.info.get("name", ""), model.info.get("adapter")
    draft = model.info.get("draft.path") or model.info.get("draft.name")
    changed = ""
    for key in dict.fromkeys(one for one in (model.path, name) if one):
        found = identifier.look_up((key, adapter, draft))
        if isinstance(found, Unidentified):
            continue
        differing = [
            change.name for change in found.diff(model.fields) if change.name not in _OPTION_FIELDS
        ]
        if not differing:
            return ""
        changed = f"the model's files have changed ({', '.join(differing)})"
    if changed:
        return changed
    gone = [
        path
        for path in (model.path, adapter, model.info.get("draft.path"))
        # A relative path says nothing, because it may have been meant from another folder.
        if path and Path(path).is_absolute() and not Path(path).exists()
    ]
    return f"{gone[0]} is gone" if gone else ""


def outdated_reason(model: Model) -> str:
    """Why the versions installed here rule out this model's entries; "" if they do not."""
    from persist_cache.fingerprint.value import LAYOUT_VERSION

    wrote = model.fields.get("mlx_lm", "")
    installed = installed_version("mlx-lm") if wrote else ""
    if installed and wrote != installed:
        return f"computed by mlx-lm {wrote}, and {installed} is installed"
    layout = model.fields.get("layout", "")
    if layout and layout != str(LAYOUT_VERSION):
        return f"written with layout {layout}, and persist-cache has {LAYOUT_VERSION} now"
    return ""


def as_json_object(text: str) -> object:
    """Decode JSON that the store keeps as text; the text itself when it is none."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
