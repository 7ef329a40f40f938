"""What single models and salts may take of a store, besides what all of it may.

A quota bounds the files of entries, those on their way and those in the trash included. Room is
made among what it bounds, and nothing else is evicted for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from persist_cache.entry import TIER_LABELS
from persist_cache.errors import StoreFullError
from persist_cache.fingerprint.value import CACHE_SALT
from persist_cache.index import tree
from persist_cache.index.transaction import Reader, Writer

if TYPE_CHECKING:
    from persist_cache.store.evict import Evictor

MODEL, SALT = "model", "salt"
QUOTA = "quota:"
"""Prefix of the quotas in `meta`."""
NEAR = 0.9
"""Share of a quota from which on it is nearly used up."""
_MOST_NAME = 200
Rules = Mapping[str, int]
"""By `model` or `salt` for each of them, or by `model:NAME` or `salt:DIGEST` for one."""


class Whose(Struct, frozen=True):
    """What rules know of an identity.

    Attributes:
        model: The model as people name it.
        salt: Digest of the salt of its requests, or "".
    """

    model: str
    salt: str

    @classmethod
    def of(cls, identity: str) -> Whose:
        """Of the JSON of an identity; a damaged one has no name."""
        try:
            said = msgspec.json.decode(identity, type=dict[str, dict[str, str]])
        except msgspec.MsgspecError:
            return cls("", "")
        fields, info = said.get("fields", {}), said.get("info", {})
        name = info.get("name") or fields.get("model_type") or "unnamed"
        return cls(name[:_MOST_NAME], fields.get(CACHE_SALT, ""))

    def is_meant(self, kind: str, name: str) -> bool:
        """Whether a rule of this kind is about it; "" is all of them."""
        if kind == SALT:
            return bool(self.salt) and name in ("", self.salt)
        wanted, mine = name.casefold(), self.model.casefold()
        return not name or wanted in (mine, mine.rpartition("/")[2])

    def rules(self, rules: Rules) -> list[int]:
        """The values of all rules that are about it."""
        found = []
        for rule, value in rules.items():
            kind, _, name = rule.partition(":")
            if kind in (MODEL, SALT) and self.is_meant(kind, name):
                found.append(value)
        return found


def check_rules(rules: Rules, *, tiers: bool) -> None:
    """Check quotas or lifetimes.

    Args:
        rules: By what they are about.
        tiers: The labels of tiers are among that.

    Raises:
        ValueError: One is about nothing that there is, or is negative.
    """
    labels = TIER_LABELS if tiers else ()
    for rule, value in rules.items():
        kind, colon, name = rule.partition(":")
        is_one = kind in (MODEL, SALT) and (bool(name) or not colon) and len(name) <= _MOST_NAME
        if not is_one and rule not in labels:
            known = ", ".join((*labels, "model", "model:NAME", "salt", "salt:DIGEST"))
            raise ValueError(f"{rule!r} is not one of {known}")
        if not 0 < value < 1 << 62:
            raise ValueError(f"{rule}={value}: it must be more than 0")


class Used(Struct, frozen=True):
    """How much of a quota is used.

    Attributes:
        kind: `model` or `salt`.
        name: Of the model; of a salt its digest.
        nbytes: What its files take.
        max_bytes: What they may take.
    """

    kind: str
    name: str
    nbytes: int
    max_bytes: int

    @property
    def is_near(self) -> bool:
        """Whether it is nearly used up."""
        return self.nbytes >= NEAR * self.max_bytes


class Quotas:
    """The quotas of a store. Thread safety: may be shared between threads; nothing is kept."""

    def note(self, identity: str) -> str:
        """What a reservation says of whose it is."""
        if not identity:
            return ""
        whose = Whose.of(identity)
        return msgspec.json.encode([whose.model, whose.salt]).decode()

    def lacks(
        self,
        txn: Writer,
        identity: str,
        nbytes: int,
        evictor: Evictor,
        protected: frozenset[int] | None,
        *,
        is_swept: bool,
    ) -> bool:
        """Make room for bytes within the quotas of an identity.

        Nothing is evicted before what dead writers reserved is given back.

        Returns:
            Whether something is to be unlinked before there is room.

        Raises:
            StoreFullError: What may go is too little; the transaction is to be undone.
        """
        rules = txn.numbers(QUOTA)
        if not rules or not identity:
            return False
        if not is_counted(txn):
            recount(txn)
        whose = Whose.of(identity)
        lacks = False
        for kind, name, limit in _bounds(whose, rules):
            if nbytes > limit:
                raise StoreFullError(
                    f"An entry of {nbytes} bytes is larger than the quota of {_said(kind, name)} "
                    f"({limit} bytes)."
                )
            used, trash = _usage(txn, kind, name)
            excess = used + nbytes - limit
            if excess + trash <= 0:
                continue
            lacks = True
            if excess <= 0 or not is_swept:
                continue
            if protected is None or _evict(txn, evictor, kind, name, excess, protected) < excess:
                raise StoreFullError(
                    f"There is no room left within the quota of {_said(kind, name)} ({limit} "
                    "bytes): what may go is too little, the rest is pinned or in use. Unpin or "
                    "evict something, or raise the quota."
                )
        return lacks

    def apply(self, txn: Writer, evictor: Evictor) -> int:
        """Evict what exceeds a quota, as far as it may go; returns the bytes."""
        freed = 0
        for one in self.used(txn):
            excess = one.nbytes - one.max_bytes
            if excess > 0:
                freed += _evict(txn, evictor, one.kind, one.name, excess, frozenset())
        return freed

    def is_exceeded(self, txn: Reader) -> bool:
        """Whether any quota is, as after it was made smaller."""
        return any(one.nbytes > one.max_bytes for one in self.used(txn))

    def used(self, txn: Reader) -> list[Used]:
        """How much of each quota is used, the fullest first."""
        rules = txn.numbers(QUOTA)
        if not rules:
            return []
        found: dict[tuple[str, str], int] = {}
        totals: dict[tuple[str, str], int] = {}
        spaces = txn.space_bytes()
        for _, record in txn.namespaces():
            whose = Whose.of(record.identity)
            for kind, name, limit in _bounds(whose, rules):
                found[kind, name] = limit
                totals[kind, name] = totals.get((kind, name), 0) + spaces.get(record.number, 0)
        all_used = [Used(*key, totals[key], limit) for key, limit in found.items()]
        return sorted(all_used, key=lambda one: one.nbytes / (one.max_bytes or 1), reverse=True)


def _bounds(whose: Whose, rules: Rules) -> Iterator[tuple[str, str, int]]:
    """What bounds an identity: its model, and its salt if it has one."""
    for kind, name in ((MODEL, whose.model), (SALT, whose.salt)):
        limits = [
            limit
            for rule, limit in rules.items()
            if rule.partition(":")[0] == kind and whose.is_meant(kind, rule.partition(":")[2])
        ]
        if limits:
            yield kind, name, min(limits)


def _said(kind: str, name: str) -> str:
    return f"the model {name}" if kind == MODEL else f"the salt {name[:8]}…"


def _usage(txn: Reader, kind: str, name: str) -> tuple[int, int]:
    """Bytes of a model's or a salt's files, those on their way included; and in the trash."""
    numbers = _namespaces(txn, kind, name)
    spaces = txn.space_bytes()
    live = sum(spaces.get(number, 0) for number in numbers)
    leaving = {str(number) for number in numbers}
    trash = sum(one.nbytes for one in txn.sized(b"trash").values() if one.note in leaving)
    for one in txn.sized(b"pending").values():
        try:
            model, salt = msgspec.json.decode(one.note or "null", type=list[str] | None) or ("", "")
        except (msgspec.MsgspecError, ValueError):
            continue
        if name == (model if kind == MODEL else salt):
            live += one.nbytes
    return live, trash


def _namespaces(txn: Reader, kind: str, name: str) -> set[int]:
    """Numbers of the namespaces of a model, or of a salt."""
    found = set()
    for _, record in txn.namespaces():
        whose = Whose.of(record.identity)
        if name == (whose.model if kind == MODEL else whose.salt):
            found.add(record.number)
    return found


def _evict(
    txn: Writer, evictor: Evictor, kind: str, name: str, excess: int, protected: frozenset[int]
) -> int:
    """Drop entries of a model or a salt alone, in order; returns the bytes freed."""
    numbers = _namespaces(txn, kind, name)
    others = frozenset(
        record.node for _, record in txn.entries() if record.namespace not in numbers
    )
    return evictor.free_among(txn, excess, protected | others)


def recount(txn: Writer) -> None:
    """Find out of which namespace each blob is: earlier versions did not note it."""
    txn.forget_spaces()
    owner: dict[int, int] = {}
    for _, record in txn.namespaces():
        owner |= dict.fromkeys(
            (edge.blob for edge in tree.edges_below(txn, record.root)), record.number
        )
    for _, entry in txn.entries():
        if entry.checkpoint:
            owner[entry.checkpoint] = entry.namespace
    for blob, namespace in owner.items():
        found = txn.blob(blob)
        if found is not None:
            txn.own(blob, namespace, found.disk_bytes)


def is_counted(txn: Reader) -> bool:
    """Whether it is known of which namespace all blobs are."""
    return sum(txn.space_bytes().values()) == txn.counter(tree.BLOB_BYTES)
