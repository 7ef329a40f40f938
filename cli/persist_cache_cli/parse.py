"""Types of arguments: sizes, durations, tiers, entry ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from persist_cache.entry import check_group
from persist_cache.stability.names import parse_names

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    _Type = click.ParamType[Any]
else:
    _Type = click.ParamType  # click 8.1 knows no parameter for it

_NUMBER_AND_UNIT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)")
_SIZE_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    # As in mlx-lm's --prompt-cache-bytes, a bare letter counts in thousands.
    _SIZE_UNITS |= {_letter: 1000**_power, f"{_letter}b": 1000**_power}
    _SIZE_UNITS[f"{_letter}ib"] = 1024**_power
_DURATION_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_MAX_DURATION_S = 100 * 366 * 86400.0
_MAX_BYTES = 1 << 62
_MAX_LABEL = 200


def parse_size(text: str) -> int:
    """`500MB` is 500,000,000 and `2GiB` is 2,147,483,648; a bare number counts bytes.

    Raises:
        click.BadParameter: `text` is something else.
    """
    found = _NUMBER_AND_UNIT.fullmatch(text.strip())
    factor = _SIZE_UNITS.get(found[2].lower()) if found else None
    if text.strip().startswith("-"):
        raise click.BadParameter(f"a size must not be negative: {text!r}.")
    if found is None or factor is None:
        raise click.BadParameter(f"{text!r} is not a size: write it like 500MB or 2GiB.")
    nbytes = float(found[1]) * factor
    if nbytes > _MAX_BYTES:  # infinite, for as many digits as that
        raise click.BadParameter(f"{text!r} is more than any disk holds.")
    return int(nbytes)


def parse_duration(text: str) -> float:
    """Seconds in a length of time like `7d`, `12h` or `1h30m`.

    Raises:
        click.BadParameter: `text` is something else.
    """
    stripped = text.strip()
    if stripped.startswith("-"):
        raise click.BadParameter(f"a length of time must not be negative: {text!r}.")
    total = 0.0
    position = 0
    while position < len(stripped):
        found = _NUMBER_AND_UNIT.match(stripped, position)
        unit = _DURATION_UNITS.get(found[2].lower()) if found else None
        if found is None or unit is None:
            break
        total += float(found[1]) * unit
        position = found.end()
    if not stripped or position < len(stripped):
        raise click.BadParameter(
            f"{text!r} is not a length of time: write it like 45s, 30m, 12h, 7d or 2w."
        )
    if total > _MAX_DURATION_S:
        raise click.BadParameter(f"{text!r} is longer than 100 years.")
    return total


def parse_label(text: str) -> str:
    """A name for an entry: one line that is not too long.

    Raises:
        click.BadParameter: `text` is something else.
    """
    if len(text) > _MAX_LABEL:
        raise click.BadParameter(f"a label has at most {_MAX_LABEL} characters.")
    if not text.isprintable():
        raise click.BadParameter("a label is one line of text without control characters.")
    return text


def parse_repairs(text: str) -> frozenset[str]:
    """Names of the repairs that may be done.

    Raises:
        click.BadParameter: There is no such repair.
    """
    try:
        return parse_names(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_group(text: str) -> str:
    """Check the name of a group.

    Raises:
        click.BadParameter: It can be none.
    """
    try:
        check_group(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None
    if not text:
        raise click.BadParameter("an empty name is that of no group.")
    return text


def parse_rules(
    given: Sequence[str], option: str, parse: Callable[[str], float], *, tiers: bool
) -> dict[str, int] | None:
    """Rules such as `model=4GB` or `salt:alice=1GB`, by what they are about.

    Args:
        given: The rules, each as `WHAT=VALUE`; or `none` alone.
        option: What they are given to, for the sentence.
        parse: Reads a value.
        tiers: A tier is something to make a rule about.

    Returns:
        The rules; none if they are to end, None if nothing was said.

    Raises:
        click.UsageError: One of them is something else.
    """
    from persist_cache.fingerprint.value import salt_digest
    from persist_cache.store.quotas import check_rules

    if not given:
        return None
    if "none" in given:
        if len(given) > 1:
            raise click.UsageError(f"{option}: none goes with no other rule.")
        return {}
    found: dict[str, int] = {}
    for one in given:
        what, _, value = one.rpartition("=")
        kind, colon, name = what.partition(":")
        if kind == "salt" and name:
            what = f"salt{colon}{salt_digest(name)}"
        if what in found:
            raise click.UsageError(f"{option}: {one!r} is the second rule about the same.")
        try:
            found[what] = int(parse(value))
            check_rules({what: found[what]}, tiers=tiers)
        except click.BadParameter as error:
            raise click.UsageError(f"{option}: {error.message}") from None
        except ValueError as error:
            raise click.UsageError(f"{option}: {error}.") from None
    return found


class _Size(_Type):
    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        return value if isinstance(value, int) else parse_size(value)


class _Duration(_Type):
    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        return value if isinstance(value, float) else parse_duration(value)


class _Lifetime(_Type):
    """A duration, or `none` for no end."""

    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if value == "none":
            return float("inf")
        return value if isinstance(value, float) else parse_duration(value)


class _Label(_Type):
    name = "name"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        return parse_label(value)


class _Group(_Type):
    name = "key"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        return parse_group(value)


class _Repairs(_Type):
    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> frozenset[str]:
        return value if isinstance(value, frozenset) else parse_repairs(value)


class _EntryId(_Type):
    """The beginning of an entry's id, or its label; the store decides whether it names just one."""

    name = "id"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        text = str(value)
        if not text.strip():
            self.fail("an entry has an id, and may have a label; this is neither.")
        return text

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        from persist_cache.errors import PersistCacheError
        from persist_cache.queries.ids import find_ids, is_id, labels_from
        from persist_cache_cli.store_access import reading

        root = ctx.find_root()
        try:
            with reading(root.params.get("store")) as store:
                if store is None:
                    return []
                found = labels_from(store, incomplete, limit=100)
                if not incomplete or is_id(incomplete):
                    found += find_ids(store, incomplete.lower(), limit=100 - len(found))
        except (PersistCacheError, OSError):
            return []
        return [CompletionItem(one) for one in found]


SIZE = _Size()
DURATION = _Duration()
LIFETIME = _Lifetime()
LABEL = _Label()
REPAIRS = _Repairs()
ENTRY_ID = _EntryId()
GROUP = _Group()
TIER = click.Choice(["system", "user", "assistant"], case_sensitive=False)
