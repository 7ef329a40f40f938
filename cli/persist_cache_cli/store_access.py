"""Opening the store for a command, and finding the entries that its arguments name.

A command never creates a store: a mistyped `--store` must not leave a folder behind.
"""

from __future__ import annotations

import contextlib
import gc
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from persist_cache import Store, default_store_path
from persist_cache.errors import StoreAccessError
from persist_cache.queries.ids import (
    SHORT_ID_DIGITS,
    find_departed,
    find_each,
    find_labelled,
    is_id,
    short_ids,
)
from persist_cache_cli.output import format_age, printable
from persist_cache_cli.parse import ENTRY_ID, GROUP

_CANDIDATES = 8
F = TypeVar("F", bound=Callable[..., Any])


class NothingFound(click.ClickException):
    """What was asked for is not there."""

    exit_code = 3


def common_options(quiet: str = "Print errors only.") -> Callable[[F], F]:
    """Add the options that every command has.

    Args:
        quiet: What `-q` does.
    """

    def add(command: F) -> F:
        command = click.option("-q", "--quiet", is_flag=True, help=quiet)(command)
        return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)

    return add


class _EntryIds(click.Argument):
    """Entries by their ids, which are not asked for where `--group` names some."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        # What was not given is None, or a sentinel of click's.
        has_ids = isinstance(value, (list, tuple)) and bool(value)
        if not has_ids and isinstance(ctx.params.get("group"), str):
            return ()
        return super().process_value(ctx, value)


def ids_or_group(said: str) -> Callable[[F], F]:
    """Add the two ways to name entries; see `refuse_both`.

    Args:
        said: What `--group` means.
    """

    def add(command: F) -> F:
        command = click.option("--group", type=GROUP, help=said)(command)
        options = {"metavar": "ID...", "type": ENTRY_ID, "nargs": -1, "required": True}
        return click.argument("ids", cls=_EntryIds, **options)(command)

    return add


def refuse_both(ids: Sequence[str], group: str | None) -> None:
    """Have entries named in one way.

    Raises:
        click.UsageError: They are in both.
    """
    if ids and group is not None:
        raise click.UsageError("Name the entries by their IDs or by --group, not by both.")


def store_path(given: str | None) -> Path:
    return Path(given) if given is not None else default_store_path()


def command_line(given: str | None, command: str) -> str:
    """How to call `command` for this store, to be printed and copied."""
    path = store_path(given)
    where = "" if _is_taken_by_itself(path) else f" --store {shlex.quote(str(path))}"
    return f"persist-cache{where} {command}"


def _is_taken_by_itself(path: Path) -> bool:
    """Whether commands use this store without being told."""
    from persist_cache_cli.config import config_of  # which lists and the like need not read

    ctx = click.get_current_context(silent=True)
    if ctx is not None and config_of(ctx).store is not None:
        return False  # by that file, which need not be read the next time
    return path == default_store_path()


@contextlib.contextmanager
def reading(given: str | None) -> Iterator[Store | None]:
    """Open the store read-only; None when there is none.

    Raises:
        StoreError: It is there, but cannot be read.
    """
    root = store_path(given)
    state = _look(root)
    if state == "none":
        yield None
        return
    if state == "unindexed":
        raise StoreAccessError(
            f"The store at {root} has lost its index; "
            f"`{command_line(given, 'check --rebuild-index')}` makes it anew from the blobs."
        )
    with _no_collection(), Store.open(root, read_only=True) as store:
        yield store


@contextlib.contextmanager
def changing(given: str | None) -> Iterator[Store | None]:
    """Open the store for change; None when there is none.

    Raises:
        StoreError: It is there, but cannot be changed.
    """
    root = store_path(given)
    if _look(root) == "none":
        yield None
        return
    with _no_collection(), Store.open(root) as store:
        yield store


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector away from the records of a large index.

    It would go over all of them again and again, and there are no cycles among them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _look(root: Path) -> str:
    """Say whether there is `none`, a `store`, or blobs that are `unindexed`."""
    try:
        if not root.exists():
            return "none"
        if not root.is_dir():
            raise StoreAccessError(f"{root} is not a folder.")
        if (root / "data.mdb").exists():
            return "store"
        return "unindexed" if (root / "blobs").is_dir() else "none"
    except PermissionError:
        raise StoreAccessError(f"{root} cannot be read (Permission denied).") from None


def no_store(given: str | None) -> str:
    return f"There is no store at {store_path(given)} yet."


def resolve(store: Store | None, names: Sequence[str]) -> list[str]:
    """Full ids of the entries that `names` name, each once, in that order.

    A name is the beginning of an id, or a label. An id goes first, but where so few digits are
    given that they may be a label as well, that is looked for, too.

    Raises:
        NothingFound: One of them names no entry.
        click.ClickException: One of them names several.
    """
    if store is None:
        for name in names:
            raise _no_entry(name)
        return []
    prefixes = [name.lower() for name in names if is_id(name)]
    by_id = dict(zip(prefixes, find_each(store, prefixes), strict=True))
    unclear = {name for name in names if not by_id.get(name.lower()) or len(name) < SHORT_ID_DIGITS}
    by_label = find_labelled(store, unclear) if unclear else {}
    ids = (
        _only_one(store, name, by_id.get(name.lower(), []), by_label.get(name, []))
        for name in names
    )
    return list(dict.fromkeys(ids))


def _only_one(store: Store, name: str, by_id: Sequence[str], labelled: Sequence[str]) -> str:
    """The id among those that begin with `name`, and those of the entries with that label."""
    found = sorted({*by_id, *labelled})
    if len(found) == 1:
        return found[0]
    if found:
        short = list(short_ids(found).values())[:_CANDIDATES]
        more = ", …" if len(found) >= _CANDIDATES else ""
        both = " or the label" if by_id and labelled else ""
        what = f"an id that begins with{both}" if by_id else "the label"
        raise click.ClickException(
            f"Several entries have {what} {printable(name)}: {', '.join(short)}{more}."
        )
    departed = find_departed(store, name.lower()) if is_id(name) else None
    if departed is not None:
        ago = format_age(store.clock() - departed.since)
        raise NothingFound(
            f"Entry {departed.id} is no longer there: {departed.reason}, "
            f"{'just now' if ago == 'now' else ago + ' ago'}."
        )
    raise _no_entry(name)


def _no_entry(name: str) -> NothingFound:
    if is_id(name):
        return NothingFound(f"No entry has an id that begins with {name.lower()}, or that label.")
    return NothingFound(f"No entry has the label {printable(name)!r}, and it is no id.")
