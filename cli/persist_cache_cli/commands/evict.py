"""`persist-cache evict`: remove entries, saying first what goes and what stays."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import compress
from operator import not_

import click
import msgspec

from persist_cache import Store
from persist_cache.errors import PersistCacheError
from persist_cache.queries.as_json import removal_json
from persist_cache.queries.details import tokens_of
from persist_cache.queries.ids import short_entry_ids, short_model_names
from persist_cache.queries.schema import RemovalJson
from persist_cache.queries.select import Filters, split_shared
from persist_cache.queries.stale import stale_reason
from persist_cache.queries.totals import Survey, left_in_trash, quarantined
from persist_cache.queries.upkeep import erased
from persist_cache_cli.calling import Declined
from persist_cache_cli.erasing import CANNOT_BE_ERASED, refuse_incomplete
from persist_cache_cli.output import (
    Column,
    format_age,
    format_bytes,
    keeping,
    painter,
    plural,
    print_json,
    printable,
    table,
    terminal_width,
)
from persist_cache_cli.parse import DURATION, ENTRY_ID, GROUP, SIZE, TIER
from persist_cache_cli.store_access import (
    NothingFound,
    changing,
    common_options,
    no_store,
    reading,
    resolve,
)

_ROWS_SHOWN = 20


@click.command("evict")
@click.argument("ids", metavar="[ID]...", type=ENTRY_ID, nargs=-1)
@click.option("--tier", type=TIER, multiple=True, help="Entries of this tier.")
@click.option(
    "--model", metavar="TEXT", multiple=True, help="Models with this in their name or path."
)
@click.option("--label", metavar="PATTERN", help="Labels like this; * stands for anything.")
@click.option("--group", type=GROUP, help="What only requests with this `prompt_cache_key` use.")
@click.option("--older-than", type=DURATION, help="Not used for this long, such as 30d.")
@click.option("--larger-than", type=SIZE, help="More bytes of their own, such as 500MB.")
@click.option("--stale", is_flag=True, help="Models that nothing installed here can use.")
@click.option("--match", metavar="TEXT", help="This text in the prompt; needs the tokenizer.")
@click.option("--to", "to_bytes", type=SIZE, help="In order, until the store takes this much.")
@click.option(
    "--all", "everything", is_flag=True, help="All entries, and damaged blobs in quarantine."
)
@click.option(
    "--erase",
    is_flag=True,
    help="Leave nothing of them in the store's folder, nor of what went before.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common_options()
@click.pass_obj
def command(
    store: str | None,
    *,
    ids: Sequence[str],
    tier: tuple[str, ...],
    model: tuple[str, ...],
    label: str | None,
    group: str | None,
    older_than: float | None,
    larger_than: int | None,
    stale: bool,
    match: str | None,
    to_bytes: int | None,
    everything: bool,
    erase: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Remove entries.

    What several options name must be true of an entry together; --tier and --model may be given
    several times, for any of them. Rows that other entries share
    stay for those. With --group, so do entries that others than its requests use, too; they leave
    the group. Pinned entries go only when they are named by id, or with --all, which also
    removes the damaged blobs that were put aside: they hold prompts, too.

    Before it asks, it lists what is to go. "own" are bytes that only this entry needs, "frees" what
    the entries down to this one free together: rows that they share are freed with the last of
    them.

    What goes leaves rows in files that others need, and tokens in free pages of the index. With
    --erase it does not, and files are overwritten before they are unlinked. What it cannot erase
    it says.

    \b
    Examples:
      persist-cache evict 3fa2b1
      persist-cache evict --tier assistant --older-than 30d --dry-run
      persist-cache evict --to 10GB --yes
    """
    if "" in model or match == "":
        # Such as a variable of the shell that is not set.
        raise click.UsageError("An empty --model or --match means everything; say --all for that.")
    filters = Filters(
        tiers=tier,
        models=model,
        label=label,
        unused_s=older_than,
        larger_than=larger_than,
        group=group,
    )
    chosen_by = [*ids, stale, match is not None, to_bytes is not None, filters != Filters()]
    if everything and any(chosen_by):
        raise click.UsageError("--all goes with no other choice of entries.")
    if not everything and not any(chosen_by):
        raise click.UsageError("Say which entries: by id, by options, or --all.")
    # A dry run of everything but --to only reads, so it works on a store that may not be changed.
    access = reading if dry_run and to_bytes is None else changing
    with access(store) as opened:
        if opened is None and not ids:
            raise NothingFound(no_store(store))
        wanted = frozenset(resolve(opened, ids)) if ids else None
        assert opened is not None, "without a store there are no ids"
        survey = Survey(opened)
        filters = msgspec.structs.replace(filters, ids=wanted)
        plan = _plan(opened, survey, filters, stale, match, to_bytes, everything)
        if erase:  # files with dead rows are written anew without them, or named as what is left
            plan.removal = msgspec.structs.replace(plan.removal, dead_bytes=0)
        if not plan.rows and not plan.shared and not everything:
            _say_nothing(plan, as_json=as_json, dry_run=dry_run)
        if not dry_run:
            if plan.rows and not yes:
                _ask(plan)
            _leave(opened, plan, group)
            planned = plan.freed_bytes
            if erase:
                plan.freed_bytes, left = erased(opened, plan.ids)
            else:
                plan.freed_bytes, left = _evict(opened, plan, everything, to_bytes), []
            plan.unremoved_bytes = left_in_trash(opened, planned - plan.freed_bytes)
    if as_json:
        print_json(plan.as_json(dry_run))
    elif not quiet:
        click.echo("\n".join(plan.lines(dry_run)))
        if erase and not dry_run and not left:
            click.echo(CANNOT_BE_ERASED)
    if not dry_run:
        refuse_incomplete(left)


class _Plan:
    """What is to go: rows of `survey`, which may be thousands, and are objects only if shown."""

    def __init__(
        self,
        survey: Survey,
        rows: Sequence[int],
        skipped: Sequence[int],
        reasons: Mapping[str, str],
        shared: Sequence[int] = (),
    ) -> None:
        self.survey = survey
        self.rows = rows
        self.skipped = skipped
        self.shared = shared
        self.removal = survey.removal(self.ids)
        going = set(survey.columns(rows, ["fingerprint"])["fingerprint"]) if reasons else ()
        self.reasons = {one: reason for one, reason in reasons.items() if one in going}
        self.damaged = 0
        self.freed_bytes = self.removal.freed_bytes
        self.unremoved_bytes = 0

    @property
    def ids(self) -> list[str]:
        return [self.survey.ids[row] for row in self.rows]

    def as_json(self, dry_run: bool) -> RemovalJson:
        return removal_json(
            self.survey,
            self.survey.entries_at(self.rows),
            self.removal,
            dry_run=dry_run,
            freed_bytes=self.freed_bytes,
            unremoved_bytes=self.unremoved_bytes,
            skipped=self.survey.entries_at(self.skipped),
            shared=self.survey.entries_at(self.shared),
            reasons=self.reasons,
        )

    def lines(self, dry_run: bool) -> list[str]:
        if not self.rows and not self.damaged and not self.shared:
            return ["The store was empty."]
        lines = self.table() if dry_run and self.rows else []
        count = plural(len(self.rows), "entry", "entries")
        verb = "would go" if dry_run else "gone"
        free = "to free" if dry_run else "freed"
        lines.append(f"{count} {verb}, {format_bytes(self.freed_bytes)} {free}.")
        return lines + self.remarks()

    def remarks(self) -> list[str]:
        lines = []
        if self.damaged:
            verb = "goes" if self.damaged == 1 else "go"
            lines.append(f"{plural(self.damaged, 'damaged blob')} in quarantine {verb}, too.")
        kept = self.removal
        if self.unremoved_bytes:
            lines.append(
                f"{format_bytes(self.unremoved_bytes)} could not be removed and are tried again "
                "later; look at the permissions of the store's folders."
            )
        if kept.dead_bytes:
            lines.append(
                f"{format_bytes(kept.dead_bytes)} of their rows are in files that others need: "
                "they take room until those go, or until `persist-cache gc` rewrites a file that "
                "is mostly dead."
            )
        if kept.kept_for:
            others = plural(kept.kept_for, "other entry", "other entries")
            verb = "needs" if kept.kept_for == 1 else "need"
            lines.append(
                f"{format_bytes(kept.kept_bytes)} of their rows stay: {others} {verb} them, too."
            )
        if self.skipped:
            verb = "stays" if len(self.skipped) == 1 else "stay"
            lines.append(f"{plural(len(self.skipped), 'pinned entry', 'pinned entries')} {verb}.")
        if self.shared:
            verb = "stays" if len(self.shared) == 1 else "stay"
            count = plural(len(self.shared), "entry", "entries")
            lines.append(f"{count} of the group {verb}: others use them, too.")
        names = short_model_names(self.survey.models)
        lines += [
            f"{printable(names[fingerprint])} is stale: {printable(reason)}."
            for fingerprint, reason in self.reasons.items()
        ]
        return lines

    def table(self) -> list[str]:
        now = time.time()
        short = short_entry_ids(self.survey)
        names = short_model_names(self.survey.models)
        columns = [
            Column("id", style="id"),
            Column("tier"),
            Column("model", least=12),
            Column("tokens", right=True),
            Column("own", right=True, drop=4),
            Column("shared", right=True, drop=5),
            Column("frees", right=True),
            Column("used", right=True, drop=3),
            Column("kept", style="good", drop=2),
            Column("label", least=10, cut="end", drop=1),
        ]
        shown = self.survey.entries_at(self.rows[:_ROWS_SHOWN])
        rows = [
            (
                short[entry.id],
                entry.tier.label,
                printable(names.get(entry.fingerprint, "?")),
                f"{entry.num_tokens:,}",
                format_bytes(entry.own_bytes),
                format_bytes(entry.shared_bytes),
                format_bytes(self.survey.removal([one.id for one in shown[:count]]).freed_bytes),
                format_age(now - entry.last_use),
                keeping(entry.pinned, entry.expires, now),
                printable(entry.label),
            )
            for count, entry in enumerate(shown, start=1)
        ]
        lines = table(columns, rows, width=terminal_width(), paint=painter())
        if len(self.rows) > _ROWS_SHOWN:
            lines.append(f"… and {len(self.rows) - _ROWS_SHOWN:,} more")
        return [*lines, ""]


def _plan(
    store: Store,
    survey: Survey,
    filters: Filters,
    stale: bool,
    match: str | None,
    to_bytes: int | None,
    everything: bool,
) -> _Plan:
    """Choose the entries that are to go."""
    rows = filters.rows(survey, time.time())
    skipped: list[int] = []
    if filters.ids is None and not everything:
        pinned = survey.columns(rows, ["pinned"])["pinned"]
        skipped = list(compress(rows, pinned))
        rows = list(compress(rows, map(not_, pinned)))
    reasons: dict[str, str] = {}
    if stale:
        fingerprints = survey.columns(rows, ["fingerprint"])["fingerprint"]
        reasons = _stale(survey, set(fingerprints))
        rows = list(compress(rows, map(reasons.__contains__, fingerprints)))
        skipped = []
    if match is not None:
        rows = _matching(store, survey, rows, match)
        skipped = []
    shared: list[int] = []
    if filters.group is not None:
        rows, shared = split_shared(survey, rows, filters.group)
    if to_bytes is not None:
        by_id = {survey.ids[row]: row for row in rows}
        rows = [by_id[one] for one in store.victims_until(to_bytes, by_id.keys())]
    plan = _Plan(survey, rows, skipped, reasons, shared)
    if everything:
        aside = quarantined(store)
        plan.damaged = len(aside)
        plan.freed_bytes += sum(one.nbytes for one in aside)
    return plan


def _stale(survey: Survey, fingerprints: set[str]) -> dict[str, str]:
    """Per fingerprint why nothing can use it any more; those that something may are left out."""
    from persist_cache.fingerprint.identifier import Identifier

    identifier = Identifier()
    reasons = {
        fingerprint: stale_reason(survey.models[fingerprint], identifier)
        for fingerprint in fingerprints
        if fingerprint in survey.models
    }
    return {fingerprint: reason for fingerprint, reason in reasons.items() if reason}


def _matching(store: Store, survey: Survey, rows: Sequence[int], text: str) -> list[int]:
    """Rows of entries whose prompt contains `text`, whatever its case.

    Models without a tokenizer are skipped with a warning, unless that leaves none.
    """
    from persist_cache.queries.decoder import Decoder

    decoders: dict[str, Decoder | None] = {}
    errors: list[PersistCacheError] = []
    found = []
    for row, entry in zip(rows, survey.entries_at(rows), strict=True):
        if entry.fingerprint not in decoders:
            try:
                decoders[entry.fingerprint] = Decoder(survey.model_of(entry))
            except PersistCacheError as error:
                decoders[entry.fingerprint] = None
                errors.append(error)
        decoder = decoders[entry.fingerprint]
        if decoder is not None:
            try:
                tokens = tokens_of(store, entry.id)
            except KeyError:
                continue  # evicted meanwhile
            if text.casefold() in decoder.text(tokens).casefold():
                found.append(row)
    if errors and len(errors) == len(decoders):
        raise errors[0]
    for problem in errors:
        click.echo(f"Warning: {problem}", err=True)
    return found


def _say_nothing(plan: _Plan, *, as_json: bool, dry_run: bool) -> None:
    """Nothing is to go: that is the answer, and exit status 3."""
    if as_json:
        print_json(plan.as_json(dry_run))
    pinned = len(plan.skipped)
    if not pinned:
        raise NothingFound("Nothing matches; nothing was evicted.")
    what = "The entry that matches is" if pinned == 1 else f"All {pinned:,} entries that match are"
    raise NothingFound(f"{what} pinned; nothing was evicted.")


def _ask(plan: _Plan) -> None:
    """Have the user agree.

    Raises:
        click.UsageError: There is nobody to ask.
        Declined: The user does not agree.
    """
    count = plural(len(plan.rows), "entry", "entries")
    if not sys.stdin.isatty():
        raise click.UsageError(
            f"This would evict {count}; say --yes, because there is no terminal to ask on."
        )
    for line in [*plan.table(), *plan.remarks()]:
        click.echo(line, err=True)
    if not click.confirm(f"Evict {count}, {format_bytes(plan.freed_bytes)}?", err=True):
        raise Declined("Nothing was evicted.")


def _leave(store: Store, plan: _Plan, group: str | None) -> None:
    """Take out of the group what stays for others."""
    for row in plan.shared:
        with contextlib.suppress(KeyError):  # it was evicted meanwhile
            store.leave_group(plan.survey.ids[row], group or "")


def _evict(store: Store, plan: _Plan, everything: bool, to_bytes: int | None) -> int:
    """Evict what was planned; what others evicted meanwhile is fine."""
    freed = 0
    if plan.rows:
        freed = store.evict(plan.ids, to_bytes=to_bytes, missing_ok=True)
    if everything:
        freed += store.purge_quarantine()
    return freed
