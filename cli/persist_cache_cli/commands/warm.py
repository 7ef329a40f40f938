"""`persist-cache warm`: prefill prompts ahead of traffic."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import replace

from persist_cache import Store
from persist_cache.errors import MissingDependencyError, RemoteError
from persist_cache.queries.schema import WarmJson
from persist_cache.sharing import RemoteChoice
from persist_cache.warm import WARM_STEP_TOKENS
from persist_cache_cli.jobs import jobs_of, prompt_options
from persist_cache_cli.output import print_json
from persist_cache_cli.parse import DURATION, GROUP, LABEL
from persist_cache_cli.remote_options import remote_options, take_choice
from persist_cache_cli.store_access import common_options, store_path
from persist_cache_cli.warming import Run

if TYPE_CHECKING:
    from persist_cache.remote import Remote


@click.command("warm")
@prompt_options
@click.option("--tier", metavar="TIER", help="system, user or assistant.  [default: by content]")
@click.option("--pin", is_flag=True, help="Exempt it from eviction.")
@click.option("--ttl", type=DURATION, help="Let it expire after this time, such as 7d.")
@click.option("--label", type=LABEL, default="", help="A name for it.")
@click.option("--group", type=GROUP, help="The `prompt_cache_key` that it is to belong to.")
@click.option(
    "--prefill-step-size",
    type=click.IntRange(min=1),
    default=WARM_STEP_TOKENS,
    show_default=True,
    help="Tokens per step; an interruption loses one.",
)
@click.option("--check", is_flag=True, help="Only report; exit 3 if something is missing.")
@click.option("--dry-run", is_flag=True, help="Only report.")
@click.option("--publish", is_flag=True, help="Share what was asked for by the remote, at once.")
@remote_options
@common_options()
@click.pass_obj
def command(
    store: str | None,
    /,
    *,
    ttl: float | None,
    group: str | None,
    prefill_step_size: int,
    check: bool,
    dry_run: bool,
    publish: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Prefill prompts and store them, so that the first request finds them.

    What is stored already is skipped, and what the remote has is fetched. An interrupted run goes
    on where its last step ended.

    \b
    Examples:
      persist-cache warm --model mlx-community/Qwen3-4B-4bit --system @prompt.txt --pin
      persist-cache warm --manifest prompts.toml --check
    """
    choice = take_choice(given)
    asked = jobs_of(ttl=ttl, silent=quiet or as_json, **given)
    jobs = asked.jobs
    if group is not None:
        jobs = [replace(job, group=job.group or group) for job in jobs]
    looks_only = check or dry_run
    reports: list[WarmJson] = []
    with (
        Store.open(store_path(store)) as opened,
        _remote(opened, choice, needed=publish and not looks_only) as shared,
    ):
        run = Run(
            opened,
            prefill_step_size,
            quiet=quiet or as_json,
            remote=shared,
            publishes=publish,
        )
        for job in jobs:
            reports.append(run.check(job) if looks_only else run.warm(job))
    if as_json:
        print_json(reports)
    if any(report.missing_tokens for report in reports) and not dry_run:
        sys.exit(3)
    if asked.is_incomplete:
        sys.exit(1)


@contextlib.contextmanager
def _remote(store: Store, choice: RemoteChoice, *, needed: bool) -> Iterator[Remote | None]:
    """The remote of a store; None where it has none, or none that can be used, and needs none."""
    settings = choice.of(store)
    if settings is None:
        choice.remember(store, None)
        if needed:
            raise RemoteError(
                "There is no remote to publish to; name one with --remote URL, or run "
                "`persist-cache remote add URL` first."
            )
        yield None
        return
    from persist_cache.remote import Remote  # most stores have none

    try:
        remote = Remote.open(store, settings)
    except (RemoteError, MissingDependencyError) as error:
        if needed or choice != RemoteChoice():
            raise
        click.echo(f"Note: the remote is not used. {error}", err=True)
        yield None
        return
    try:
        choice.remember(store, settings)
        if needed and remote.why_not_publish:
            raise RemoteError(remote.why_not_publish)
        yield remote
    finally:
        remote.close()
