"""What the store knows, as JSON: the same objects from the command line and the admin API.

Pure functions: values in, plain dictionaries out. Times are UTC seconds, sizes bytes.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from persist_cache.catalog import StoreStats
from persist_cache.entry import Entry, Tier
from persist_cache.lookalike import common_text, difference, escaped, shown_apart
from persist_cache.survey import (
    Amount,
    Details,
    Model,
    Quarantined,
    Removal,
    RunDetails,
    Survey,
    as_json_object,
    short_ids,
)

if TYPE_CHECKING:
    from persist_cache.explain import Divergence, Explanation
    from persist_cache.tally import PromptCacheStats


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
    """

    ids: frozenset[str] | None = None
    tiers: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    label: str | None = None
    unused_s: float | None = None
    larger_than: int | None = None
    pinned: bool | None = None

    def rows(self, survey: Survey, now: float) -> list[int]:
        """Places in `survey.entries` of those that pass."""
        table = survey._catalog.table
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
        return rows


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
    table = survey._catalog.table
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


def short_model_names(models: Mapping[str, Model]) -> dict[str, str]:
    """Per fingerprint the last part of the model's name; told apart where two are the same."""
    names = {key: model.name.rstrip("/").rsplit("/", 1)[-1] for key, model in models.items()}
    times = Counter(names.values())
    return {key: name if times[name] == 1 else f"{name}@{key[:4]}" for key, name in names.items()}


def short_entry_ids(survey: Survey) -> dict[str, str]:
    """Per id of the store the shortest that is clear."""
    return short_ids(survey.ids)


def entry_json(entry: Entry, model: Model, short: str) -> dict[str, Any]:
    """One entry.

    Args:
        entry: The entry.
        model: Whose it is.
        short: Its short id.
    """
    return {
        "id": entry.id,
        "short_id": short,
        "fingerprint": entry.fingerprint,
        "model": model.name,
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


def details_json(details: Details, short: str) -> dict[str, Any]:
    """Everything about one entry; `short` is its short id."""
    model = details.model
    return {
        **entry_json(details.entry, model, short),
        "children": list(details.children),
        "runs": [_run_json(run) for run in details.runs],
        "checkpoint": None if details.checkpoint is None else _run_json(details.checkpoint),
        "identity": {"fields": dict(model.fields), "info": dict(model.info)},
        "layout": as_json_object(details.layout),
    }


def _run_json(run: RunDetails) -> dict[str, Any]:
    return {
        "blob": run.blob,
        "path": run.path,
        "start": run.start,
        "num_tokens": run.num_tokens,
        "blob_tokens": run.blob_tokens,
        "nbytes": run.nbytes,
        "entries": run.entries,
        "created": run.created,
    }


def mark_json(entry: str, short: str, **marks: Any) -> dict[str, Any]:
    """What a user said about an entry: `pinned`, `expires` or `label`."""
    return {"id": entry, "short_id": short, **marks}


def removal_json(
    survey: Survey,
    entries: Sequence[Entry],
    removal: Removal,
    *,
    dry_run: bool,
    freed_bytes: int,
    unremoved_bytes: int = 0,
    skipped: Sequence[Entry] = (),
    reasons: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """An eviction, done or only planned.

    Args:
        survey: The store before it.
        entries: What goes.
        removal: What that frees, and what stays for others.
        dry_run: Only planned.
        freed_bytes: Bytes that went, or would go.
        unremoved_bytes: Bytes of files that should have gone and could not be unlinked.
        skipped: Entries that were chosen but are pinned.
        reasons: Per fingerprint why its entries go, "" by default.
    """
    short = short_entry_ids(survey)
    return {
        "dry_run": dry_run,
        "entries": [
            {
                **entry_json(entry, survey.model_of(entry), short[entry.id]),
                "reason": (reasons or {}).get(entry.fingerprint, ""),
            }
            for entry in entries
        ],
        "freed_bytes": freed_bytes,
        "kept_bytes": removal.kept_bytes,
        "kept_for": removal.kept_for,
        "dead_bytes": removal.dead_bytes,
        "unremoved_bytes": 0 if dry_run else unremoved_bytes,
        "skipped_pinned": [entry.id for entry in skipped],
    }


def explanation_json(
    found: Explanation, decode: Callable[[list[int]], str], *, show_stored: bool = True
) -> dict[str, Any]:
    """An explanation.

    Args:
        found: What `explain` said.
        decode: Tokens as text.
        show_stored: Tell what the stored prompt says where it differs.
    """
    texts = None if found.divergence is None else divergence_texts(found.divergence, decode)
    return {
        "outcome": found.outcome,
        "message": explanation_message(found, texts),
        "num_tokens": found.num_tokens,
        "cached_tokens": found.cached_tokens,
        "common_tokens": found.common_tokens,
        "id": found.entry,
        "saved_s": found.saved_s,
        "divergence": None
        if found.divergence is None or texts is None
        else _divergence_json(found.divergence, texts, show_stored),
        "changes": [
            {"field": change.name, "stored": change.old, "now": change.new}
            for change in found.changes
        ],
        "now_tokens": found.now_tokens,
        "memory_tokens": found.memory_tokens,
    }


def _divergence_json(
    divergence: Divergence, texts: DivergenceTexts, show_stored: bool
) -> dict[str, Any]:
    return {
        "position": divergence.position,
        "before_text": texts.before,
        "stored_text": texts.stored if show_stored else None,
        "prompt_text": texts.prompt,
        "stored_tokens": divergence.stored if show_stored else None,
        "prompt_tokens": divergence.prompt,
        "difference": texts.difference,
    }


class DivergenceTexts(Struct, frozen=True):
    """Where a prompt parts from what is stored, as text, a line each.

    Attributes:
        before: Right before the parting, the same on both sides.
        stored: What is stored goes on so.
        prompt: The prompt goes on so.
        difference: What the two differ in where it cannot be seen: `normalization`,
            `white_space`, `invisible`, `look_alike` (several with `+` between them), or `tokens`,
            where the text is the same; else None.
        sentence: That in words, or "".
    """

    before: str
    stored: str
    prompt: str
    difference: str | None = None
    sentence: str = ""


def explanation_message(found: Explanation, texts: DivergenceTexts | None) -> str:
    """The answer in one line, with what cannot be seen in the texts."""
    return " ".join(filter(None, (found.message, "" if texts is None else texts.sentence)))


def divergence_texts(divergence: Divergence, decode: Callable[[list[int]], str]) -> DivergenceTexts:
    """Decode a parting of ways.

    Tokens may end within a character, so both sides are decoded together with what precedes them.
    """
    before = decode(divergence.before) if divergence.before else ""
    whole_stored, whole_prompt = (
        decode([*divergence.before, *tokens]) if tokens else before
        for tokens in (divergence.stored, divergence.prompt)
    )
    same = common_text(whole_stored, whole_prompt)
    stored, prompt = whole_stored[same:], whole_prompt[same:]
    left, right = shown_apart(stored, prompt)
    named = difference(stored, prompt) or difference(_uncut(stored), _uncut(prompt))
    code, sentence = None, ""
    if named is not None:
        code, sentence = named[0], f"The texts shown differ only in {named[1]}."
    elif before not in (whole_stored, whole_prompt) and not (stored and prompt):
        code, sentence = "tokens", "The text shown is the same, but its tokens are not."
        left, right = _first_tokens(divergence.stored), _first_tokens(divergence.prompt)
    ends = "(nothing: it ends here)"
    before = escaped(whole_prompt[:same].lstrip("\ufffd"))
    return DivergenceTexts(before, left or ends, right or ends, code, sentence)


def _uncut(text: str) -> str:
    """`text` without its last character, which may lack its marks or some of its bytes."""
    return text.rstrip("\ufffd")[:-1]


def _first_tokens(tokens: list[int]) -> str:
    return f"(tokens {', '.join(map(str, tokens[:4]))} …)"


def warm_json(
    *,
    entry: str | None,
    model: str,
    label: str,
    tier: str,
    num_tokens: int,
    found_tokens: int,
    missing_tokens: int,
    written_bytes: int,
    prefill_s: float,
) -> dict[str, Any]:
    """What warming a prompt did."""
    return {
        "id": entry,
        "model": model,
        "label": label,
        "tier": tier,
        "num_tokens": num_tokens,
        "found_tokens": found_tokens,
        "missing_tokens": missing_tokens,
        "written_bytes": written_bytes,
        "prefill_s": prefill_s,
    }


def store_json(
    stats: StoreStats,
    survey: Survey | None,
    damaged: Sequence[Quarantined] = (),
    *,
    disk_off: str = "",
    exists: bool = True,
) -> dict[str, Any]:
    """Totals of a store.

    Args:
        stats: Its totals.
        survey: Its entries, or None when there is no store.
        damaged: Blobs in quarantine.
        disk_off: Why nothing can be written, or "".
        exists: Whether there is a store at all.
    """
    usage = stats.usage
    by_tier = survey.by_tier if survey else {}
    by_model = survey.by_model if survey else {}
    models = survey.models if survey else {}
    return {
        "store": stats.path,
        "exists": exists,
        "entries": stats.entries,
        "blobs": stats.blobs,
        "bytes": {
            "blobs": usage.blobs,
            "index": usage.index,
            "pending": usage.pending,
            "trash": usage.trash,
            "quarantine": usage.quarantine,
            "folders": usage.folders,
            "ballast": usage.ballast,
            "total": usage.total,
        },
        "max_bytes": stats.max_bytes,
        "min_free_bytes": stats.min_free_bytes,
        "free_bytes": stats.free_bytes,
        "daily_write_bytes": stats.daily_write_bytes,
        "written_today_bytes": stats.written_today,
        "written_bytes": stats.written_bytes,
        "tiers": [
            {"tier": tier.label, **_amount_json(by_tier.get(tier, Amount()))}
            for tier in reversed(Tier)
        ],
        "models": [
            {
                "fingerprint": fingerprint,
                "model": models[fingerprint].name if fingerprint in models else "unnamed",
                **_amount_json(amount),
            }
            for fingerprint, amount in sorted(by_model.items(), key=lambda item: -item[1].nbytes)
        ],
        "hits": {source: stats.counters.get(f"hits_{source}", 0) for source in ("memory", "disk")},
        "misses": stats.counters.get("misses", 0),
        "miss_reasons": {
            name.removeprefix("misses:"): count
            for name, count in stats.counters.items()
            if name.startswith("misses:")
        },
        "partial_reasons": {
            name.removeprefix("partial:"): count
            for name, count in stats.counters.items()
            if name.startswith("partial:")
        },
        "tokens_saved": stats.counters.get("tokens_saved", 0),
        "tokens_reused": stats.counters.get("tokens_reused", 0),
        "tokens_asked": stats.counters.get("tokens_asked", 0),
        "saved_s": survey.saved_s if survey else 0.0,
        "left_behind": [
            {
                "reason": one.reason,
                "entries": one.entries,
                "bytes": one.nbytes,
                "pinned": one.pinned,
            }
            for one in (survey.left_behind if survey else [])
        ],
        "quarantine": quarantine_json(damaged),
        "disk_off": disk_off,
        "eviction_paused": stats.eviction_paused,
        "counters": dict(stats.counters),
    }


def quarantine_json(damaged: Sequence[Quarantined]) -> list[dict[str, Any]]:
    """Blobs in quarantine."""
    return [
        {"blob": one.blob, "bytes": one.nbytes, "since": one.since, "reason": one.reason}
        for one in damaged
    ]


def _amount_json(amount: Amount) -> dict[str, Any]:
    return {
        "entries": amount.entries,
        "bytes": amount.nbytes,
        "hits": amount.hits,
        "saved_s": amount.saved_s,
    }


def server_json(stats: PromptCacheStats, *, max_size: int, max_bytes: int) -> dict[str, Any]:
    """What a server's cache did since it was started.

    Args:
        stats: Its counters.
        max_size: Caches that memory may hold.
        max_bytes: Bytes that memory may hold.
    """
    return {
        "memory": {
            "tiers": [
                {
                    "tier": tier.label,
                    "entries": stats.memory.get(tier.label, {}).get("n_sequences", 0),
                    "bytes": stats.memory.get(tier.label, {}).get("n_bytes", 0),
                }
                for tier in reversed(Tier)
            ],
            "max_entries": max_size,
            # A limit nobody set is larger than any memory, and than what JavaScript can count.
            "max_bytes": max_bytes if max_bytes < 1 << 53 else None,
        },
        "hits": {source: stats.hits.get(source, 0) for source in ("memory", "disk")},
        "misses": sum(stats.misses.values()),
        "miss_reasons": dict(stats.misses),
        "partial_reasons": dict(stats.partial),
        "tokens_saved": {source: stats.tokens.get(source, 0) for source in ("memory", "disk")},
        "tokens_asked": stats.asked,
        "restore_s": stats.restore_s,
        "restored_bytes": stats.restored_bytes,
        "read_ahead_bytes": stats.read_ahead_bytes,
        "saves": stats.saves,
        "written_bytes": stats.written_bytes,
        "queued_jobs": stats.queued_jobs,
        "queued_bytes": stats.queued_bytes,
        "problems": dict(stats.problems),
        "disk_off": stats.disk_off,
    }
