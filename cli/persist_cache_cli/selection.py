"""Entries as the commands choose and show them: filters, names of models, JSON."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persist_cache.entry import Entry, Tier
from persist_cache.survey import Model, Survey, short_ids
from persist_cache_cli.output import format_age


@dataclass(frozen=True, slots=True)
class Filters:
    """What an entry must be to be chosen; None asks for nothing.

    Attributes:
        ids: Full ids.
        tier: Role class.
        model: Part of the model's name or path, or the beginning of its fingerprint.
        label: Shell pattern for the label.
        unused_s: Not used for that many seconds.
        larger_than: More bytes of its own.
    """

    ids: frozenset[str] | None = None
    tier: str | None = None
    model: str | None = None
    label: str | None = None
    unused_s: float | None = None
    larger_than: int | None = None

    def choose(self, survey: Survey, now: float) -> list[Entry]:
        """Entries that pass, in the order of their ids."""
        models = self._models(survey.models.values())
        return [entry for entry in survey.entries if self._passes(entry, models, now)]

    def _models(self, models: Iterable[Model]) -> frozenset[str] | None:
        if self.model is None:
            return None
        wanted = self.model.lower()
        return frozenset(
            model.fingerprint
            for model in models
            if wanted in model.name.lower()
            or wanted in model.path.lower()
            or model.fingerprint.startswith(wanted)
        )

    def _passes(self, entry: Entry, models: frozenset[str] | None, now: float) -> bool:
        return (
            (self.ids is None or entry.id in self.ids)
            and (self.tier is None or entry.tier == Tier.parse(self.tier))
            and (models is None or entry.fingerprint in models)
            and (self.label is None or fnmatch.fnmatchcase(entry.label, self.label))
            and (self.unused_s is None or now - entry.last_use > self.unused_s)
            and (self.larger_than is None or entry.own_bytes > self.larger_than)
        )


def short_model_names(models: Mapping[str, Model]) -> dict[str, str]:
    """Per fingerprint the last part of the model's name; told apart where two are the same."""
    names = {key: model.name.rstrip("/").rsplit("/", 1)[-1] for key, model in models.items()}
    times = Counter(names.values())
    return {key: name if times[name] == 1 else f"{name}@{key[:4]}" for key, name in names.items()}


def short_entry_ids(survey: Survey) -> dict[str, str]:
    return short_ids([entry.id for entry in survey.entries])


def entry_json(survey: Survey, entry: Entry, short: Mapping[str, str]) -> dict[str, Any]:
    """An entry as every command prints it; `docs/cli.md` explains the fields."""
    return {
        "id": entry.id,
        "short_id": short[entry.id],
        "fingerprint": entry.fingerprint,
        "model": survey.model_of(entry).name,
        "tier": entry.tier.label,
        "num_tokens": entry.num_tokens,
        "own_bytes": entry.own_bytes,
        "shared_bytes": entry.shared_bytes,
        "created": entry.created,
        "last_use": entry.last_use,
        "hits": entry.hits,
        "saved_s": entry.saved_s,
        "prefill_s": entry.prefill_s,
        "pinned": entry.pinned,
        "expires": entry.expires,
        "label": entry.label,
        "parent": entry.parent,
    }


def keeping(entry: Entry, now: float) -> str:
    """Whether it is pinned, and how long it has until it expires."""
    words = ["pinned"] if entry.pinned else []
    if entry.expires is not None:
        left = entry.expires - now
        words.append(format_age(left) if left > 0 else "expired")
    return ", ".join(words)


def order(
    survey: Survey, entries: Sequence[Entry], key: str, names: Mapping[str, str]
) -> list[Entry]:
    """Sort: what is most or latest first, names from A to Z."""
    match key:
        case "model":
            return sorted(entries, key=lambda one: (names.get(one.fingerprint, ""), one.id))
        case "label":
            return sorted(entries, key=lambda one: (not one.label, one.label, one.id))
        case "tier":
            return sorted(entries, key=lambda one: (-one.tier, -one.last_use))
    numbers = {
        "used": lambda one: one.last_use,
        "created": lambda one: one.created,
        "tokens": lambda one: one.num_tokens,
        "size": lambda one: one.own_bytes,
        "shared": lambda one: one.shared_bytes,
        "hits": lambda one: one.hits,
        "saved": lambda one: one.saved_s,
    }
    return sorted(entries, key=numbers[key], reverse=True)


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
