"""The JSON objects of the commands' `--json` and of the admin API, member by member.

A member that is only there in some answers is `UNSET` in the others, and left out of them. Times
are UTC seconds, durations seconds, sizes bytes. Members may be added, never renamed or removed.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType

from persist_cache.queries.details import RunDetails

Text = str | None | UnsetType
"""A prompt as text; None where it cannot be decoded, unset where nobody asked."""


class EntryJson(Struct, frozen=True, kw_only=True):
    """One entry.

    Attributes:
        id: 16 hex digits.
        short_id: As much of them as names no other entry.
        fingerprint: Of the model, hex.
        model: Its name.
        tier: `system`, `user` or `assistant`.
        num_tokens: Length of the prompt.
        own_bytes: What only this entry needs.
        shared_bytes: What it has in common with others.
        created: When it was stored.
        last_use: When it was last read, or stored.
        hits: How often it was read.
        saved_s: Prefill that these saved.
        prefill_s: What computing it took.
        pinned: Whether it is exempt from eviction.
        expires: When it goes, or null.
        label: Its name, or "".
        parent: Id of the entry that it continues, or null.
        keep_s: For how long after each use it goes after others of its tier, if its client asked
            for that.
        group: That uses it, or ""; the first one of several.
        groups: All of them, where there are several, or others use it that are of none.
        text: How its own part begins, on one line, where that was asked for; null where it cannot
            be decoded.
    """

    id: str
    short_id: str
    fingerprint: str
    model: str
    tier: str
    num_tokens: int
    own_bytes: int
    shared_bytes: int
    created: float
    last_use: float
    hits: int
    saved_s: float
    prefill_s: float
    pinned: bool
    expires: float | None
    label: str
    parent: str | None
    keep_s: int | UnsetType = UNSET
    group: str = ""
    groups: Sequence[str] | UnsetType = UNSET
    text: Text = UNSET


class IdentityJson(Struct, frozen=True, kw_only=True):
    """What a model's fingerprint was made from, and what is known of the model besides."""

    fields: dict[str, object]
    info: dict[str, object]


class DetailsJson(EntryJson, frozen=True, kw_only=True):
    """Everything about one entry.

    Attributes:
        children: Ids of the entries that go on right after it.
        runs: The blobs with its rows, in order.
        checkpoint: The blob with the state at its end, or null where rows suffice.
        identity: Of its model.
        layout: The cache classes and their geometry.
        text: The prompt, where it was asked for.
    """

    children: Sequence[str]
    runs: Sequence[RunDetails]
    checkpoint: RunDetails | None
    identity: IdentityJson
    layout: object


class MarkJson(Struct, frozen=True, kw_only=True):
    """What a user said about an entry: one of the three."""

    id: str
    short_id: str
    pinned: bool | UnsetType = UNSET
    expires: float | UnsetType | None = UNSET
    label: str | UnsetType = UNSET


class RemovedJson(EntryJson, frozen=True, kw_only=True):
    """An entry that goes, and why, where it was chosen for a reason."""

    reason: str


class RemovalJson(Struct, frozen=True, kw_only=True):
    """An eviction, done or only planned.

    Attributes:
        dry_run: Only planned.
        entries: What goes.
        freed_bytes: What that frees.
        kept_bytes: What stays, since other entries need it.
        kept_for: How many these are.
        dead_bytes: What no entry needs any more, but stays in files that others need.
        unremoved_bytes: Of files that should have gone and could not be unlinked.
        skipped_pinned: Ids that were chosen and stay, being pinned.
        skipped_shared: Ids that were chosen by their group and stay, since others use them, too.
            They leave the group.
    """

    dry_run: bool
    entries: Sequence[RemovedJson]
    freed_bytes: int
    kept_bytes: int
    kept_for: int
    dead_bytes: int
    unremoved_bytes: int
    skipped_pinned: Sequence[str]
    skipped_shared: Sequence[str] = ()


class DivergenceJson(Struct, frozen=True, kw_only=True):
    """Where a prompt parts from what is stored.

    Attributes:
        position: Tokens that they share.
        before_text: The text right before it.
        stored_text: How what is stored goes on.
        prompt_text: How the prompt goes on.
        stored_tokens: Tokens of that.
        prompt_tokens: Tokens of that.
        difference: What they differ in where that cannot be seen, or null.
    """

    position: int
    before_text: str
    stored_text: str
    prompt_text: str
    stored_tokens: Sequence[int]
    prompt_tokens: Sequence[int]
    difference: str | None


class ChangeJson(Struct, frozen=True, kw_only=True):
    """A part of the identity in which the model differs from the one that an entry is for."""

    field: str
    stored: object
    now: object


class VerdictJson(Struct, frozen=True, kw_only=True):
    """What `explain --check` found.

    Attributes:
        percent: Of the tokens that can be found, those that would be; the last one of a prompt is
            always computed.
        at_least: What was asked for.
        passed: Whether that is enough.
    """

    percent: float
    at_least: float
    passed: bool


class BroughtJson(Struct, frozen=True, kw_only=True):
    """What a remote had of a prompt.

    Attributes:
        num_tokens: Leading tokens that it gave; 0 for a miss.
        bytes: Received for it.
        seconds: What that took.
        why: How it ended, a word.
        at: When, where that is not now.
    """

    num_tokens: int
    bytes: int
    seconds: float
    why: str
    at: float | UnsetType = UNSET


class ExplanationJson(Struct, frozen=True, kw_only=True):
    """Whether a prompt is cached, and why not.

    Attributes:
        outcome: Its kind, a word.
        message: The same as a sentence.
        num_tokens: Length of the prompt.
        cached_tokens: What is on disk of it.
        common_tokens: What it shares with anything that is stored.
        id: The entry with most of it, or null.
        saved_s: Prefill that a request would save.
        divergence: Where it parts from what is stored, or null.
        changes: What is different about the model.
        now_tokens: What a server would not compute now, or null.
        memory_tokens: How much of that its memory alone would serve, or null.
        check: What `--check` found, or null; in the command's answer.
        known_tokens: What the server has of it, memory included; in the server's answer.
        repaired: What was changed in the request before it was rendered, if anything was.
        ignored: What it asks for and cannot be said to the model, if there is anything.
        marks: Places in it that its client marked to be kept, if there are any.
        expires: When the entry with most of it expires, if it does.
        remote: What the remote said when this server asked it for the prompt last, if it did; in
            the server's answer.
    """

    outcome: str
    message: str
    num_tokens: int
    cached_tokens: int
    common_tokens: int
    id: str | None
    saved_s: float
    divergence: DivergenceJson | None
    changes: Sequence[ChangeJson]
    now_tokens: int | None
    memory_tokens: int | None
    check: VerdictJson | UnsetType | None = UNSET
    known_tokens: int | UnsetType = UNSET
    repaired: Sequence[str] | UnsetType = UNSET
    ignored: Sequence[str] | UnsetType = UNSET
    marks: int | UnsetType = UNSET
    expires: float | UnsetType = UNSET
    remote: BroughtJson | UnsetType = UNSET


class WarmJson(Struct, frozen=True, kw_only=True):
    """What warming a prompt did.

    Attributes:
        id: The entry, or null where it did not get to the disk.
        model: As it was named.
        label: The entry's name, or "".
        tier: Its tier.
        num_tokens: Tokens that requests will find.
        found_tokens: How many of them were there before.
        missing_tokens: How many are still not.
        written_bytes: What was written.
        prefill_s: What computing the others took.
        disk_off: Why nothing is kept on disk, or ""; in a server's answer.
        published: What became of it at the remote, where that was asked for: `sent`,
            `there_already`, or `claimed` by another process.
    """

    id: str | None
    model: str
    label: str
    tier: str
    num_tokens: int
    found_tokens: int
    missing_tokens: int
    written_bytes: int
    prefill_s: float
    disk_off: str | UnsetType = UNSET
    published: str | UnsetType = UNSET


class BytesJson(Struct, frozen=True, kw_only=True):
    """What a store takes on disk, by what it is for."""

    blobs: int
    index: int
    pending: int
    trash: int
    quarantine: int
    folders: int
    ballast: int
    total: int


class TierJson(Struct, frozen=True, kw_only=True):
    """What a store holds of a tier."""

    tier: str
    entries: int
    bytes: int
    hits: int
    saved_s: float


class ModelJson(Struct, frozen=True, kw_only=True):
    """What a store holds of a model."""

    fingerprint: str
    model: str
    entries: int
    bytes: int
    hits: int
    saved_s: float


class QuotaJson(Struct, frozen=True, kw_only=True):
    """How much of a quota is used.

    Attributes:
        kind: `model` or `salt`.
        name: Of the model; of a salt its digest.
        bytes: What its files take.
        max_bytes: What they may take.
        near: It is nearly used up.
    """

    kind: str
    name: str
    bytes: int
    max_bytes: int
    near: bool


class LeftBehindJson(Struct, frozen=True, kw_only=True):
    """Entries that nothing finds any more, for one reason."""

    reason: str
    entries: int
    bytes: int
    pinned: int


class QuarantinedJson(Struct, frozen=True, kw_only=True):
    """A blob in quarantine: since when, and why."""

    blob: str
    bytes: int
    since: float
    reason: str


class StoreJson(Struct, frozen=True, kw_only=True):
    """Totals of a store.

    Attributes:
        store: Its folder.
        exists: Whether there is one at all.
        entries: Their number.
        blobs: Number of files with KV.
        bytes: What it takes on disk.
        max_bytes: Its budget.
        min_free_bytes: What it leaves free on the file system.
        free_bytes: What is free there.
        daily_write_bytes: What it may write a day, or null.
        written_today_bytes: What it wrote today.
        written_bytes: What it ever wrote.
        tiers: Totals by tier.
        models: Totals by model.
        hits: Since it was made, by where they came from.
        misses: Since it was made.
        miss_reasons: Their number by kind.
        partial_reasons: Of hits that were shorter than they could be.
        tokens_saved: Tokens that hits did not compute.
        tokens_reused: The same, counted together with the next.
        tokens_asked: Tokens of the prompts.
        saved_s: Prefill that the entries saved.
        left_behind: What nothing finds any more.
        quarantine: Files that are damaged.
        disk_off: Why nothing can be written, or "".
        eviction_paused: Why nothing is evicted for the free-space floor, or "".
        counters: All counters as they are stored.
        quotas: How much of each quota is used, the fullest first.
        ttl_s: Default lifetimes by what they are about.
    """

    store: str
    exists: bool
    entries: int
    blobs: int
    bytes: BytesJson
    max_bytes: int
    min_free_bytes: int
    free_bytes: int
    daily_write_bytes: int | None
    written_today_bytes: int
    written_bytes: int
    tiers: Sequence[TierJson]
    models: Sequence[ModelJson]
    hits: dict[str, int]
    misses: int
    miss_reasons: dict[str, int]
    partial_reasons: dict[str, int]
    tokens_saved: int
    tokens_reused: int
    tokens_asked: int
    saved_s: float
    left_behind: Sequence[LeftBehindJson]
    quarantine: Sequence[QuarantinedJson]
    disk_off: str
    eviction_paused: str
    counters: dict[str, int]
    quotas: Sequence[QuotaJson]
    ttl_s: dict[str, int]
