"""Which entries a command means: filters, orders, and what an eviction down to a size takes."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from msgspec import Struct

from persist_cache.entry import Tier
from persist_cache.queries.models import Model
from persist_cache.queries.totals import Survey


class Filters(Struct, frozen=True):
    """What an entry must be to be chosen; None, or nothing, asks for nothing.

    Attributes:
        ids: Full ids.
        tiers: Role classes, any of them.
        models: Parts of the model's name or path, or beginnings of its fingerprint; any of them.
        label: Shell pattern for the label.
        unused_s: Not used for that many seconds.
        larger_than: More bytes of its own.
        pinned: Pinned, or not.
        group: That they belong to.
    """

    ids: frozenset[str] | None = None
    tiers: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    label: str | None = None
    unused_s: float | None = None
    larger_than: int | None = None
    pinned: bool | None = None
    group: str | None = None

    def rows(self, survey: Survey, now: float) -> list[int]:
        """Places in `survey.entries` of those that pass."""
        table = survey.catalog.table
        rows = list(range(survey.num_entries))
        if self.ids is not None:
            numbers = {int(one, 16) for one in self.ids}
            rows = [row for row in rows if table.numbers[row] in numbers]
        if self.tiers:
            tiers = {int(Tier.parse(tier)) for tier in self.tiers}
            rows = [row for row in rows if table.tiers[row] in tiers]
        if self.models:
            wanted = [model.lower() for model in self.models]
            named = {
                model.fingerprint
                for model in survey.models.values()
                if any(_is_named(model, text) for text in wanted)
            }
            namespaces = {number for number, key in survey.fingerprints.items() if key in named}
            rows = [row for row in rows if table.namespaces[row] in namespaces]
        if self.label is not None:
            rows = [row for row in rows if fnmatch.fnmatchcase(table.labels[row], self.label)]
        if self.unused_s is not None:
            latest = (now - self.unused_s) * 1e6
            rows = [row for row in rows if table.last_uses_us[row] < latest]
        if self.larger_than is not None:
            own = survey.columns(rows, ["own_bytes"])["own_bytes"]
            rows = [row for row, nbytes in zip(rows, own, strict=True) if nbytes > self.larger_than]
        if self.pinned is not None:
            rows = [row for row in rows if bool(table.pinned[row]) == self.pinned]
        if self.group is not None:
            groups = survey.catalog.groups
            rows = [row for row in rows if self.group in groups.get(table.numbers[row], ())]
        return rows


def split_shared(survey: Survey, rows: Sequence[int], group: str) -> tuple[list[int], list[int]]:
    """Those of these rows that only requests of a group use, and those that others use, too."""
    table, groups = survey.catalog.table, survey.catalog.groups
    alone = {row for row in rows if groups.get(table.numbers[row]) == (group,)}
    return [row for row in rows if row in alone], [row for row in rows if row not in alone]


def _is_named(model: Model, text: str) -> bool:
    return (
        text in model.name.lower()
        or text in model.path.lower()
        or model.fingerprint.startswith(text)
    )


SORT_KEYS = (
    "used",
    "created",
    "tokens",
    "size",
    "shared",
    "hits",
    "saved",
    "tier",
    "model",
    "label",
)


def order(
    survey: Survey, rows: Sequence[int], key: str, names: Mapping[str, str] | None = None
) -> list[int]:
    """Sort: what is most or latest first, names from A to Z.

    Args:
        survey: The store.
        rows: Places in `survey.entries` of what to sort.
        key: One of `SORT_KEYS`.
        names: Per fingerprint the name to sort by, for `model`.

    Raises:
        ValueError: There is no such key.
    """
    table = survey.catalog.table
    match key:
        case "model":
            shown = {
                number: (names or {}).get(fingerprint, "")
                for number, fingerprint in survey.fingerprints.items()
            }
            return sorted(rows, key=lambda row: (shown[table.namespaces[row]], row))
        case "label":
            return sorted(rows, key=lambda row: (not table.labels[row], table.labels[row], row))
        case "tier":
            return sorted(rows, key=lambda row: (-table.tiers[row], -table.last_uses_us[row]))
        case "size" | "shared":
            (nbytes,) = survey.columns(rows, [f"{'own' if key == 'size' else key}_bytes"]).values()
            return sorted(rows, key=dict(zip(rows, nbytes, strict=True)).__getitem__, reverse=True)
    columns: dict[str, Sequence[float]] = {
        "used": table.last_uses_us,
        "created": table.created_us,
        "tokens": table.num_tokens,
        "hits": table.hits,
        "saved": table.saved_s,
    }
    if key not in columns:
        raise ValueError(f"unknown order {key!r}: use one of {', '.join(SORT_KEYS)}")
    return sorted(rows, key=columns[key].__getitem__, reverse=True)
