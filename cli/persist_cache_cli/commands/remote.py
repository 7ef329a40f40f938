"""`persist-cache remote`: prompts that many machines share, by an object store."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from persist_cache import Store
from persist_cache.errors import RemoteError
from persist_cache.queries.schema import BroughtJson
from persist_cache.queries.select import Filters
from persist_cache.queries.totals import Survey
from persist_cache.remote import (
    Probe,
    Remote,
    RemoteSettings,
    check_settings,
    default_secret_path,
    make_publisher_key,
    make_secret,
    read_settings,
    write_settings,
)
from persist_cache.sharing.as_json import (
    PublishedJson,
    brought_json,
    published_json,
    settings_json,
)
from persist_cache.sharing.choice import NO_REMOTE
from persist_cache_cli.calling import with_store
from persist_cache_cli.jobs import jobs_of, prompt_options
from persist_cache_cli.output import (
    format_bytes,
    painter,
    pairs,
    print_json,
    printable,
)
from persist_cache_cli.parse import ENTRY_ID
from persist_cache_cli.remote_options import how_options, parse_url, remote_choice
from persist_cache_cli.remote_report import open_secret, probe_line
from persist_cache_cli.remote_words import shown_count
from persist_cache_cli.store_access import (
    NothingFound,
    changing,
    command_line,
    common_options,
    resolve,
    store_path,
)
from persist_cache_cli.warming import Run, name_of, published_line

_SECRETS = ("PERSIST_CACHE_REMOTE_SECRET", "PERSIST_CACHE_REMOTE_SECRET_FILE")


class _Group(click.Group):
    """Lets `--store` stand behind each of its commands, too."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        found = super().get_command(ctx, name)
        return None if found is None else with_store(found)


@click.group("remote", cls=_Group, invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Share prompts with other machines, by a bucket or a folder that all of them reach.

    docs/sharing.md says how that is set up, and who can read what.

    \b
    Examples:
      persist-cache remote add s3://team/prompts --new-secret --publish-plain
      persist-cache remote status
    """
    if ctx.invoked_subcommand is None:
        names = ", ".join(command.commands)
        raise click.UsageError(f"Say what to do: {names}.")


# ---- which one -------------------------------------------------------------------------------


@command.command("add")
@click.argument("url")
@click.option("--new-secret", is_flag=True, help="Make a secret, for the first who shares.")
@click.option(
    "--new-publisher",
    is_flag=True,
    help="Make a publisher's key: whoever has its public half can read what this machine sends.",
)
@how_options()
@common_options()
@click.pass_obj
def add(
    store: str | None,
    /,
    *,
    url: str,
    new_secret: bool,
    new_publisher: bool,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Have the store use the remote at URL: s3://bucket/prefix, a folder, or an https:// mirror.

    Credentials are never remembered: for S3 they are the environment's, or the SDK's profile. All
    who share need the same secret. What is published is not encrypted: whoever can read the bucket
    can read the prompts.

    \b
    Examples:
      persist-cache remote add s3://team/prompts --new-secret --publish-plain
      persist-cache remote add s3://team/prompts --secret-file team.secret
      persist-cache remote add https://mirror.example/prompts --public-key 8f0c…
    """
    if new_secret + new_publisher + (how["secret_file"] is not None) > 1:
        raise click.UsageError(
            "Give one of --new-secret, --new-publisher, and --secret-file; the others are made "
            "of nothing."
        )
    wanted = remote_choice(remote=parse_url(url), **how).settings(None)
    if wanted is None:
        raise click.UsageError(f"{NO_REMOTE} is no remote; `persist-cache remote remove` ends it.")
    check_settings(wanted)
    made: Path | None = None
    if new_secret or new_publisher:
        made = default_secret_path()
        wanted = _with_new(wanted, made, publisher=new_publisher)
    elif not (wanted.secret_file or wanted.public_key or any(map(os.environ.get, _SECRETS))):
        raise click.UsageError(
            "All who share need one secret: make it with --new-secret if you are the first, or "
            "name a file with the others' by --secret-file."
        )
    try:
        with Store.open(store_path(store)) as opened:
            Remote.open(opened, wanted).close()
            write_settings(opened, wanted)
    except BaseException:
        if made is not None:
            made.unlink()
        raise
    if as_json:
        said = msgspec.to_builtins(settings_json(wanted))
        print_json({**said, "made": None if made is None else str(made)})
    elif not quiet:
        click.echo("\n".join(_added(wanted, "" if made is None else str(made))))


def _with_new(settings: RemoteSettings, path: Path, *, publisher: bool) -> RemoteSettings:
    """The settings with a secret, or a publisher's key, that is made for them."""
    if not publisher:
        make_secret(path)
        return msgspec.structs.replace(settings, secret_file=str(path))
    key = make_publisher_key(path)
    return msgspec.structs.replace(
        settings, secret_file=str(path), trust="publisher", public_key=key
    )


def _added(settings: RemoteSettings, made: str) -> Iterator[str]:
    yield f"The store uses {printable(settings.url)} from now on."
    if settings.publish_plain:
        yield (
            f"It publishes prompts ({', '.join(settings.tiers)}) at hit {settings.publish_after}, "
            "unencrypted: whoever can read the remote can read them."
        )
    elif settings.may_write:
        yield "It only reads there; add --publish-plain for it to publish, unencrypted."
    else:
        yield "It is a mirror, which is only read."
    if made and settings.trust == "publisher":
        url = "https://…" if settings.url.startswith("s3:") else settings.url
        yield f"The private key is in {printable(made)}; keep it here. Readers run"
        yield f"  persist-cache remote add {shlex.quote(url)} --public-key {settings.public_key}"
    elif made:
        yield f"The secret is in {printable(made)}; copy that file to the other machines, and run"
        yield f"  persist-cache remote add {shlex.quote(settings.url)} --secret-file FILE"
    if said := open_secret(settings):
        yield printable(said)
    yield "A server that runs already uses it when it is started again."


@command.command("remove")
@common_options()
@click.pass_obj
def remove(store: str | None, /, *, as_json: bool, quiet: bool) -> None:
    """Have the store use no remote any more. What lies there stays.

    \b
    Example:
      persist-cache remote remove
    """
    with changing(store) as opened:
        settings = None if opened is None else read_settings(opened)
        if opened is None or settings is None:
            raise NothingFound(_no_remote(store))
        write_settings(opened, None)
    if as_json:
        print_json({"url": settings.url})
    elif not quiet:
        click.echo(f"The store uses {printable(settings.url)} no longer. What lies there stays.")


@command.command("status")
@click.option("--probe/--no-probe", default=True, show_default=True, help="Whether to try it.")
@common_options()
@click.pass_obj
def status(store: str | None, /, *, probe: bool, as_json: bool, quiet: bool) -> None:
    """Say which remote the store uses, whether it can be used, and what it was good for.

    Exit status 1 says that it cannot be used.

    \b
    Example:
      persist-cache remote status
    """
    with _opened(store) as (opened, remote):
        settings, found = remote.settings, remote.probe() if probe else None
        counts = {
            name.removeprefix("remote_"): count
            for name, count in sorted(opened.stats().counters.items())
            if name.startswith("remote_")
        }
    if as_json:
        print_json(
            {
                **msgspec.to_builtins(settings_json(settings)),
                "probe": found,
                "counters": counts,
            }
        )
    elif not quiet:
        click.echo("\n".join(_status_lines(settings, found, counts)))
    if found is not None and found.message:
        if quiet:
            click.echo(f"Error: {printable(found.message)}", err=True)
        sys.exit(1)


def _status_lines(
    settings: RemoteSettings, probe: Probe | None, counts: dict[str, int]
) -> list[str]:
    paint = painter()
    secret = settings.secret_file or "the environment's"
    by_key = f"the publisher {settings.public_key[:16]}…"
    sends = (
        f"{', '.join(settings.tiers)}; at hit {settings.publish_after}"
        if settings.publish_plain
        else f"nothing ({'--publish-plain' if settings.may_write else 'a mirror'})"
    )
    daily = settings.budget_bytes_per_day
    lines = pairs(
        [
            ("remote", printable(settings.url)),
            ("trust", by_key if settings.trust == "publisher" else f"a secret, {secret}"),
            ("publishes", sends),
            ("budget", "" if daily is None else f"{format_bytes(daily)} a day"),
            ("tried", "" if probe is None else probe_line(probe)),
            *((name.replace("_", " "), shown_count(name, count)) for name, count in counts.items()),
        ],
        paint=paint,
    )
    if said := open_secret(settings):
        lines.append(paint("note", "heading") + f": {printable(said)}")
    if probe is not None and probe.message:
        lines.append(paint("problem", "bad") + f": {printable(probe.message)}")
    return lines


# ---- by hand ---------------------------------------------------------------------------------


@command.command("push")
@click.argument("ids", metavar="[ID]...", type=ENTRY_ID, nargs=-1)
@common_options()
@click.pass_obj
def push(store: str | None, /, *, ids: Sequence[str], as_json: bool, quiet: bool) -> None:
    """Publish entries now: those named, or all that would be published by themselves.

    \b
    Examples:
      persist-cache remote push 3fa2b1
      persist-cache remote push
    """
    done: list[PublishedJson] = []
    with _opened(store) as (opened, remote):
        full = resolve(opened, ids) if ids else _of_tiers(opened, remote.settings.tiers)
        for one in full:
            try:
                published = remote.publish(one)
            except RemoteError as error:
                done.append(
                    PublishedJson(
                        id=one,
                        outcome="failed",
                        num_tokens=0,
                        bytes=0,
                        requests=0,
                        error=str(error),
                    )
                )
                click.echo(f"{one[:12]}: not published: {printable(str(error))}", err=True)
            else:
                done.append(published_json(published))
                if not quiet and not as_json:
                    click.echo(published_line(published))
    if as_json:
        print_json(done)
    elif not quiet and not done:
        click.echo("There is nothing to publish: no entry is pinned, or of such a tier.")
    if any(one.error for one in done):
        sys.exit(1)


def _of_tiers(store: Store, tiers: Sequence[str]) -> list[str]:
    """Ids of the entries that may be published by themselves, each once."""
    survey = Survey(store)
    rows: dict[int, None] = {}
    for tier in tiers:
        chosen = Filters(pinned=True) if tier == "pinned" else Filters(tiers=(tier,))
        rows |= dict.fromkeys(chosen.rows(survey, store.clock()))
    return [survey.ids[row] for row in rows]


@command.command("pull")
@prompt_options
@common_options()
@click.pass_obj
def pull(store: str | None, /, *, as_json: bool, quiet: bool, **of_prompt: Any) -> None:
    """Fetch what the remote has of prompts, which are named as `warm` is given them.

    Names on a remote are keyed digests of prompts, so there is no fetching of all of it. Exit
    status 3 says that it had nothing of some.

    \b
    Example:
      persist-cache remote pull --model mlx-community/Qwen3-4B-4bit --system @prompt.txt
    """
    asked = jobs_of(silent=quiet or as_json, **of_prompt)
    done: list[dict[str, Any]] = []
    missing = False
    with _opened(store) as (opened, remote):
        run = Run(opened, 1, quiet=True, remote=remote)
        for job in asked.jobs:
            total, known, brought = run.bring(job)
            found = max(known, brought.num_tokens)
            missing = missing or found < total
            said: BroughtJson = brought_json(brought)
            done.append(
                {
                    "model": job.choice.model,
                    "label": job.label,
                    "num_tokens": total,
                    "found_tokens": known,
                    "remote": said,
                }
            )
            if not quiet and not as_json:
                click.echo(
                    f"{name_of(job)}: {found:,} of {total:,} tokens are stored"
                    + (
                        f"; {brought.num_tokens - known:,} of them came from the remote, "
                        f"{format_bytes(brought.nbytes)} in {brought.seconds:.1f} s."
                        if brought.is_hit
                        else f" ({brought.why.value.replace('_', ' ')})."
                    )
                )
    if as_json:
        print_json(done)
    elif not quiet and any(one["remote"].why == "not_found" for one in done):
        click.echo(
            "What was published is found with the publisher's secret alone, for the same weights "
            "and the same version of mlx-lm.",
            err=True,
        )
    if missing:
        sys.exit(3)


@contextlib.contextmanager
def _opened(given: str | None) -> Iterator[tuple[Store, Remote]]:
    """The store and its remote.

    Raises:
        NothingFound: There is no store, or it has no remote.
        RemoteError: The remote cannot be used.
    """
    with changing(given) as store:
        settings = None if store is None else read_settings(store)
        if store is None or settings is None:
            raise NothingFound(_no_remote(given))
        remote = Remote.open(store, settings)
        try:
            yield store, remote
        finally:
            remote.close()


def _no_remote(given: str | None) -> str:
    return (
        f"The store at {printable(str(store_path(given)))} has no remote; "
        f"`{command_line(given, 'remote add URL')}` names one."
    )
