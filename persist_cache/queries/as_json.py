"""What the store knows, as JSON: the same objects from the command line and the admin API.

Pure functions: values in, objects of `schema` out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import asdict

from persist_cache.entry import SOURCES, Entry, Tier
from persist_cache.queries.details import Details
from persist_cache.queries.ids import short_entry_ids
from persist_cache.queries.models import Model
from persist_cache.queries.schema import (
    BytesJson,
    ChangeJson,
    DetailsJson,
    DivergenceJson,
    EntryJson,
    ExplanationJson,
    IdentityJson,
    LeftBehindJson,
    ModelJson,
    QuarantinedJson,
    QuotaJson,
    RemovalJson,
    RemovedJson,
    StoreJson,
    Text,
    TierJson,
    VerdictJson,
)
from persist_cache.queries.totals import Amount, Quarantined, Removal, Survey
from persist_cache.stability.lookalike import common_text, difference, escaped, shown_apart
from persist_cache.store.catalog import StoreStats

if TYPE_CHECKING:
    from persist_cache.queries.explain import Divergence, Explanation


def entry_json(entry: Entry, model: Model, short: str) -> EntryJson:
    """One entry.

    Args:
        entry: The entry.
        model: Whose it is.
        short: Its short id.
    """
    return EntryJson(
        id=entry.id,
        short_id=short,
        fingerprint=entry.fingerprint,
        model=model.name,
        tier=entry.tier.label,
        num_tokens=entry.num_tokens,
        own_bytes=entry.own_bytes,
        shared_bytes=entry.shared_bytes,
        created=entry.created,
        last_use=entry.last_use,
        hits=entry.hits,
        saved_s=entry.saved_s,
        prefill_s=entry.prefill_s,
        pinned=entry.pinned,
        expires=entry.expires,
        label=entry.label,
        parent=entry.parent,
        keep_s=entry.keep_s or UNSET,
        group=next(filter(None, entry.groups), ""),
        groups=list(filter(None, entry.groups)) if len(entry.groups) > 1 else UNSET,
    )


def groups_said(groups: Sequence[str]) -> str:
    """The groups of an entry for people, requests of none among them."""
    others = ["others"] if groups and not groups[0] else []
    return ", ".join([*filter(None, groups), *others])


def details_json(details: Details, short: str, *, text: Text = UNSET) -> DetailsJson:
    """Everything about one entry.

    Args:
        details: What is known of it.
        short: Its short id.
        text: The prompt, if it was asked for.
    """
    model = details.model
    return DetailsJson(
        **asdict(msgspec.structs.replace(entry_json(details.entry, model, short), text=text)),
        children=details.children,
        runs=details.runs,
        checkpoint=details.checkpoint,
        identity=IdentityJson(fields=dict(model.fields), info=dict(model.info)),
        layout=as_json_object(details.layout),
    )


def removal_json(
    survey: Survey,
    entries: Sequence[Entry],
    removal: Removal,
    *,
    dry_run: bool,
    freed_bytes: int,
    unremoved_bytes: int = 0,
    skipped: Sequence[Entry] = (),
    shared: Sequence[Entry] = (),
    reasons: Mapping[str, str] | None = None,
) -> RemovalJson:
    """An eviction, done or only planned.

    Args:
        survey: The store before it.
        entries: What goes.
        removal: What that frees, and what stays for others.
        dry_run: Only planned.
        freed_bytes: Bytes that went, or would go.
        unremoved_bytes: Bytes of files that should have gone and could not be unlinked.
        skipped: Entries that were chosen but are pinned.
        shared: Those that were chosen by their group but others use, too.
        reasons: Per fingerprint why its entries go, "" by default.
    """
    short = short_entry_ids(survey)
    return RemovalJson(
        dry_run=dry_run,
        entries=[
            RemovedJson(
                **asdict(entry_json(entry, survey.model_of(entry), short[entry.id])),
                reason=(reasons or {}).get(entry.fingerprint, ""),
            )
            for entry in entries
        ],
        freed_bytes=freed_bytes,
        kept_bytes=removal.kept_bytes,
        kept_for=removal.kept_for,
        dead_bytes=removal.dead_bytes,
        unremoved_bytes=0 if dry_run else unremoved_bytes,
        skipped_pinned=[entry.id for entry in skipped],
        skipped_shared=[entry.id for entry in shared],
    )


def explanation_json(
    found: Explanation,
    decode: Callable[[list[int]], str],
    *,
    check: VerdictJson | UnsetType | None = UNSET,
    known_tokens: int | UnsetType = UNSET,
    repaired: Sequence[str] = (),
    ignored: Sequence[str] = (),
    marks: int = 0,
) -> ExplanationJson:
    """An explanation.

    Args:
        found: What `explain` said.
        decode: Tokens as text.
        check: What `--check` found, where there is such an option; None without it.
        known_tokens: Tokens that a server has of the prompt, memory included.
        repaired: Names of what was changed in the request before it was rendered.
        ignored: Names of what it asks for and cannot be said to the model.
        marks: Places in it that its client marked to be kept.
    """
    texts = None if found.divergence is None else divergence_texts(found.divergence, decode)
    return ExplanationJson(
        outcome=found.outcome,
        message=explanation_message(found, texts),
        num_tokens=found.num_tokens,
        cached_tokens=found.cached_tokens,
        common_tokens=found.common_tokens,
        id=found.entry,
        saved_s=found.saved_s,
        divergence=None
        if found.divergence is None or texts is None
        else _divergence_json(found.divergence, texts),
        changes=[
            ChangeJson(field=change.name, stored=change.old, now=change.new)
            for change in found.changes
        ],
        now_tokens=found.now_tokens,
        memory_tokens=found.memory_tokens,
        check=check,
        known_tokens=known_tokens,
        repaired=list(repaired) or UNSET,
        ignored=list(ignored) or UNSET,
        marks=marks or UNSET,
        expires=found.expires or UNSET,
    )


def _divergence_json(divergence: Divergence, texts: DivergenceTexts) -> DivergenceJson:
    return DivergenceJson(
        position=divergence.position,
        before_text=texts.before,
        stored_text=texts.stored,
        prompt_text=texts.prompt,
        stored_tokens=divergence.stored,
        prompt_tokens=divergence.prompt,
        difference=texts.difference,
    )


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


def store_json(
    stats: StoreStats,
    survey: Survey | None,
    damaged: Sequence[Quarantined] = (),
    *,
    disk_off: str = "",
    exists: bool = True,
) -> StoreJson:
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
    return StoreJson(
        store=stats.path,
        exists=exists,
        entries=stats.entries,
        blobs=stats.blobs,
        bytes=BytesJson(
            blobs=usage.blobs,
            index=usage.index,
            pending=usage.pending,
            trash=usage.trash,
            quarantine=usage.quarantine,
            folders=usage.folders,
            ballast=usage.ballast,
            total=usage.total,
        ),
        max_bytes=stats.max_bytes,
        min_free_bytes=stats.min_free_bytes,
        free_bytes=stats.free_bytes,
        daily_write_bytes=stats.daily_write_bytes,
        written_today_bytes=stats.written_today,
        written_bytes=stats.written_bytes,
        tiers=[
            TierJson(tier=tier.label, **_amount(by_tier.get(tier, Amount())))
            for tier in reversed(Tier)
        ],
        models=[
            ModelJson(
                fingerprint=fingerprint,
                model=models[fingerprint].name if fingerprint in models else "unnamed",
                **_amount(amount),
            )
            for fingerprint, amount in sorted(by_model.items(), key=lambda item: -item[1].nbytes)
        ],
        hits={source: stats.counters.get(f"hits_{source}", 0) for source in SOURCES},
        misses=stats.counters.get("misses", 0),
        miss_reasons=_counted(stats.counters, "misses:"),
        partial_reasons=_counted(stats.counters, "partial:"),
        tokens_saved=stats.counters.get("tokens_saved", 0),
        tokens_reused=stats.counters.get("tokens_reused", 0),
        tokens_asked=stats.counters.get("tokens_asked", 0),
        saved_s=survey.saved_s if survey else 0.0,
        left_behind=[
            LeftBehindJson(
                reason=one.reason, entries=one.entries, bytes=one.nbytes, pinned=one.pinned
            )
            for one in (survey.left_behind if survey else [])
        ],
        quarantine=quarantine_json(damaged),
        disk_off=disk_off,
        eviction_paused=stats.eviction_paused,
        counters=dict(stats.counters),
        quotas=[
            QuotaJson(
                kind=one.kind,
                name=one.name,
                bytes=one.nbytes,
                max_bytes=one.max_bytes,
                near=one.is_near,
            )
            for one in stats.quotas
        ],
        ttl_s=dict(stats.ttl),
    )


def quarantine_json(damaged: Sequence[Quarantined]) -> list[QuarantinedJson]:
    """Blobs in quarantine."""
    return [
        QuarantinedJson(blob=one.blob, bytes=one.nbytes, since=one.since, reason=one.reason)
        for one in damaged
    ]


def _amount(amount: Amount) -> dict[str, Any]:
    return {
        "entries": amount.entries,
        "bytes": amount.nbytes,
        "hits": amount.hits,
        "saved_s": amount.saved_s,
    }


def _counted(counters: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {
        name.removeprefix(prefix): count
        for name, count in counters.items()
        if name.startswith(prefix)
    }


def as_json_object(text: str) -> object:
    """Decode JSON that the store keeps as text; the text itself when it is none."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
