"""How long entries live by default, after they were stored: by tier, model and salt.

The shortest that is said of an entry counts, from when it was stored, however often it is used
since. A date of its own that somebody gave it takes its place, and what is pinned stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from persist_cache.entry import Tier
from persist_cache.index.columns import EntryColumns
from persist_cache.index.transaction import Reader
from persist_cache.store.quotas import Rules, Whose

if TYPE_CHECKING:
    from persist_cache.fingerprint.value import Fingerprint

TTL = "ttl:"
"""Prefix of the lifetimes in `meta`, in seconds."""


def lifetimes(rules: Rules, identities: Mapping[int, str]) -> Callable[[int, int], int | None]:
    """What says how long an entry of a tier and a namespace lives, in seconds.

    Args:
        rules: By tier's label, or as those of quotas.
        identities: JSON of the identity of each namespace, by its number.
    """
    of_space = {number: Whose.of(one).rules(rules) for number, one in identities.items()}
    of_tier = {int(tier): rules.get(tier.label) for tier in Tier}
    known: dict[tuple[int, int], int | None] = {}

    def lives(tier: int, namespace: int) -> int | None:
        key = (tier, namespace)
        if key not in known:
            said = [*of_space.get(namespace, ()), of_tier.get(tier)]
            known[key] = min((one for one in said if one is not None), default=None)
        return known[key]

    return lives


def by_fingerprint(rules: Rules) -> Callable[[Tier, Fingerprint | None], int | None] | None:
    """What says how long a cache of a tier and a model lives in memory; None without rules."""
    if not rules:
        return None
    known: dict[bytes, list[int]] = {b"": []}

    def lives(tier: Tier, fingerprint: Fingerprint | None) -> int | None:
        key = b"" if fingerprint is None else fingerprint.digest
        if fingerprint is not None and key not in known:
            known[key] = Whose.of(fingerprint.to_json().decode()).rules(rules)
        said = [*known[key], rules.get(tier.label)]
        return min((one for one in said if one is not None), default=None)

    return lives


def of_store(txn: Reader) -> Callable[[int, int], int | None] | None:
    """The same of a store; None where nothing is said of any."""
    rules = txn.numbers(TTL)
    if not rules:
        return None
    return lifetimes(rules, {one.number: one.identity for _, one in txn.namespaces()})


def ends(table: EntryColumns, lives: Callable[[int, int], int | None] | None) -> Sequence[float]:
    """When each entry expires, in UTC seconds; 0 for never."""
    if lives is None:
        return table.expires
    found = []
    for given, tier, space, created_us in zip(
        table.expires, table.tiers, table.namespaces, table.created_us, strict=True
    ):
        seconds = None if given else lives(tier, space)
        found.append(given if seconds is None else created_us / 1e6 + seconds)
    return found


def due(txn: Reader, now: float) -> list[int]:
    """Entries whose default lifetime is over."""
    lives = of_store(txn)
    if lives is None:
        return []
    table = txn.entry_columns()
    return [
        number
        for number, when, pinned in zip(
            table.numbers, ends(table, lives), table.pinned, strict=True
        )
        if when and when <= now and not pinned
    ]
