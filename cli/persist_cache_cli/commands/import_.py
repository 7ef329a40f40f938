"""`persist-cache import`: add the entries of a bundle."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from persist_cache import Store
from persist_cache.bundle import Bundle, Imported, PortableEntry, Usability, load, preview
from persist_cache.bundle.as_json import imported_json, judged, model_name, usable
from persist_cache.entry import NO_GROUP
from persist_cache.errors import ModelError
from persist_cache.fingerprint.value import Fingerprint
from persist_cache_cli.output import format_bytes, plural, print_json, printable
from persist_cache_cli.parse import GROUP
from persist_cache_cli.progress import bar
from persist_cache_cli.prompts import choose_model, model_options
from persist_cache_cli.store_access import changing, common_options, store_path


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--model",
    metavar="PATH_OR_HUB_ID",
    help="Add only what this model can use, as the server is given it.",
)
@model_options
@click.option("--group", type=GROUP, help="The `prompt_cache_key` that it is to belong to.")
@click.option("--dry-run", is_flag=True, help="Verify it and say what would be added.")
@common_options()
@click.pass_obj
def command(
    store: str | None,
    /,
    *,
    file: Path,
    model: str | None,
    group: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **model_choice: Any,
) -> None:
    """Add the entries of FILE, which `export` wrote: all of them, or none.

    Every byte is verified first. What is stored already is left as it is. The checksums find
    damage, not malice: import only what you trust as you would trust a model.

    Exit status 3 says that the model given cannot use any of it.

    \b
    Examples:
      persist-cache import agent.tar --model mlx-community/Qwen3-4B-4bit
      persist-cache import agent.tar --dry-run
    """
    if file.is_dir():
        raise click.UsageError(f"{file} is a folder; name the file that `export` wrote.")
    silent = quiet or as_json
    here = None if model is None else _identify(model, **model_choice)
    with bar("Verifying", silent=silent, unit="bytes") as progress:
        bundle = Bundle(file, progress)
    with bundle:
        entries = usable(bundle, here)
        models, done = _import(store, bundle, entries, here, group or NO_GROUP, dry_run, silent)
    if as_json:
        said = imported_json(bundle, models, done, dry_run=dry_run)
        print_json({"file": str(bundle.path), **said})
    elif not quiet:
        click.echo("\n".join(_lines(models, done, dry_run)))
    if not entries:
        sys.exit(3)


def _identify(model: str, **model_choice: Any) -> Fingerprint:
    choice = choose_model(model, **model_choice)
    identifier = choice.identifier()
    found = identifier(choice.key)
    if found is None:
        reason = identifier.reason(choice.key)
        raise ModelError(f"The model {model!r} cannot be identified: {reason}.")
    return found


def _import(
    store: str | None,
    bundle: Bundle,
    entries: Sequence[PortableEntry],
    here: Fingerprint | None,
    group: str,
    dry_run: bool,
    silent: bool,
) -> tuple[list[tuple[Fingerprint, Usability]], list[Imported]]:
    """What can be used, and what was added."""
    if dry_run or not entries:
        with changing(store) as opened:
            return judged(bundle, here, opened), preview(opened, entries)
    with Store.open(store_path(store)) as opened:
        # Before, because afterwards the store has entries of all these models.
        models = judged(bundle, here, opened)
        with bar("Storing", silent=silent) as progress:
            return models, load(opened, entries, here=here, group=group, progress=progress)


def _lines(
    models: Sequence[tuple[Fingerprint, Usability]], done: Sequence[Imported], dry_run: bool
) -> list[str]:
    added = [one for one in done if not one.was_there]
    there = len(done) - len(added)
    verb = "would be added" if dry_run else "added"
    tokens = sum(one.new_tokens for one in added)
    nbytes = format_bytes(sum(one.nbytes for one in added))
    line = f"{plural(len(added), 'entry', 'entries')} {verb}"
    if added:
        line += f" ({tokens:,} new tokens, {nbytes})"
    if there:
        line += f", {there:,} there already"
    lines = [line + "."]
    for fingerprint, found in models:
        computed = fingerprint.fields.get("mlx_lm")
        by = f" (mlx-lm {printable(computed)})" if computed else ""
        lines.append(f"{printable(model_name(fingerprint))}{by}: {printable(found.message)}")
        lines += [
            f"  {printable(change.name)}: {_value(change.old)} in the file, "
            f"{_value(change.new)} here"
            for change in found.changes
        ]
    return lines


def _value(value: str | None) -> str:
    return "none" if value is None else printable(value)
