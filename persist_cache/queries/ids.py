"""Ids as people write them: cut as far as they stay distinct, and found by their beginning."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import compress, count, islice
from operator import eq

from msgspec import Struct

from persist_cache.entry import PARTIAL_LABEL
from persist_cache.index.records import entry_id, unpack_number
from persist_cache.index.transaction import Reader
from persist_cache.queries.models import Model
from persist_cache.queries.totals import Survey
from persist_cache.store.store import Store

SHORT_ID_DIGITS = 6
"""Short ids have at least as many digits."""
_ID_DIGITS = 16


class Departed(Struct, frozen=True):
    """An entry that is no longer there, and why; `since` in UTC seconds."""

    id: str
    since: float
    reason: str


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


def is_id(text: str) -> bool:
    """Whether an id may begin with `text`."""
    return re.fullmatch("[0-9A-Fa-f]{1,16}", text) is not None


def find_labelled(store: Store, labels: Collection[str]) -> dict[str, list[str]]:
    """Ids of the entries that have each of these labels, in order."""
    found: dict[str, list[str]] = {label: [] for label in labels}
    survey = Survey(store)
    for one, label in zip(survey.ids, _labels(survey), strict=True):
        if label in found:
            found[label].append(one)
    return found


def labels_from(store: Store, prefix: str, limit: int) -> list[str]:
    """Labels that begin with `prefix`, sorted, at most `limit` of them."""
    found = {label for label in _labels(Survey(store)) if label.startswith(prefix)}
    return sorted(found - {"", PARTIAL_LABEL})[:limit]


def _labels(survey: Survey) -> Sequence[str]:
    return survey.columns(range(survey.num_entries), ["label"])["label"]


def find_ids(store: Store, prefix: str, limit: int = 8) -> list[str]:
    """Ids that begin with `prefix`, in order, at most `limit` of them."""
    return find_each(store, [prefix], limit)[0]


def find_each(store: Store, prefixes: Sequence[str], limit: int = 8) -> list[list[str]]:
    """For each of `prefixes` what `find_ids` gives, all as of one moment."""
    with store.read() as txn:
        return [_beginning_with(txn, prefix, limit) for prefix in prefixes]


def _beginning_with(txn: Reader, prefix: str, limit: int) -> list[str]:
    found: list[str] = []
    for number in txn.entries_from(int(prefix.ljust(_ID_DIGITS, "0"), 16)):
        if len(found) == limit or not entry_id(number).startswith(prefix):
            break
        found.append(entry_id(number))
    return found


def find_departed(store: Store, prefix: str) -> Departed | None:
    """The entry whose id began with `prefix` and that went last, if that is remembered."""
    with store.read() as txn:
        departed = [
            Departed(entry_id(unpack_number(key)), record.since, record.note)
            for key, record in txn.sized(b"departed").items()
            if entry_id(unpack_number(key)).startswith(prefix)
        ]
    return max(departed, key=lambda one: one.since, default=None)


def short_model_names(models: Mapping[str, Model]) -> dict[str, str]:
    """Per fingerprint the last part of the model's name; told apart where two are the same."""
    names = {key: model.name.rstrip("/").rsplit("/", 1)[-1] for key, model in models.items()}
    times = Counter(names.values())
    return {key: name if times[name] == 1 else f"{name}@{key[:4]}" for key, name in names.items()}


def short_entry_ids(survey: Survey) -> dict[str, str]:
    """Per id of the store the shortest that is clear."""
    return short_ids(survey.ids)
