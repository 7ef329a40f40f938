"""How requests of a running server are shown: a block each, or a line each."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping
from typing import Any

import click

from persist_cache.stability.causes.kinds import Kind
from persist_cache_cli.asking import running_server
from persist_cache_cli.output import (
    Painter,
    format_duration,
    hanging,
    painter,
    plain,
    plural,
    print_json,
    shorten,
    terminal_width,
    text_width,
)
from persist_cache_cli.store_access import NothingFound

Said = Mapping[str, Any]
_MARKS = {"disk": "█", "memory": "▓", "remote": "▒", "computed": "░"}
_STYLES = {"disk": "good", "memory": "good", "remote": "good", "computed": "faint"}
_SOURCES = {
    "miss": "nothing",
    "memory": "from memory",
    "disk": "from the disk",
    "remote": "from the remote",
}
_CLIENT = 40
_NEW = {kind.value for kind in Kind if kind.is_new}
LEGEND = "  ".join(f"{mark} {name}" for name, mark in _MARKS.items())
_WIDE = 110
"""Columns from which on a line has room for sentences and clients."""


def show_last(
    store: str | None, count: int, admin_token: str | None, *, as_json: bool, quiet: bool
) -> None:
    """Explain the latest requests of the running server, the newest last.

    Args:
        store: The folder that was given, if one was.
        count: So many.
        admin_token: The secret that was given, if one was.
        as_json: Print JSON.
        quiet: Print nothing.
    """
    with running_server(store, admin_token) as server:
        listed = server.get(f"requests?limit={count}")
        found = []
        for one in reversed(listed):
            with contextlib.suppress(NothingFound):  # further ones may push it out meanwhile
                found.append(server.get(f"requests/{one['id']}"))
    if as_json:
        print_json(found)
        return
    if quiet:
        return
    if not found:
        click.echo("The server has answered no request yet.")
    width, paint = terminal_width(), painter()
    for place, one in enumerate(found):
        if place:
            click.echo()
        for line in block(one, width, paint):
            click.echo(line)


def block(said: Said, width: int | None, paint: Painter = plain) -> list[str]:
    """A request with all that is known of why it hit or missed.

    Args:
        said: As the server tells it.
        width: Columns of the terminal; None for lines of any length.
        paint: Adds colours.
    """
    model = f" of {said['model']}" if said["model"] else ""
    client = f" by {said['client']}" if said["client"] else ""
    head = f"{_clock(said)}  {said['path']}{model}{client}"
    lines = [paint(head if width is None else shorten(head, width), "heading")]
    columns = 32 if width is None else min(32, max(8, width - 4 - len(_tokens(said))))
    lines.append(f"  {bar(said, columns, paint)}  {_tokens(said)}")
    parted = said["parted"]
    facts = [
        ("  id        ", said["id"]),
        ("  outcome   ", _outcome(said)),
        ("  reused    ", _reused(said)),
        ("  remote    ", _remote(said.get("remote"))),
        ("  repaired  ", ", ".join(said["repaired"])),
        ("  cause     ", "" if parted is None else _cause(parted)),
    ]
    if parted is not None and parted["cause"] is not None:
        facts += [
            ("  where     ", _where(parted)),
            ("  after     ", _quoted(parted.get("before"), "…")),
            ("  earlier   ", _quoted(parted.get("old"))),
            ("  now       ", _quoted(parted.get("new"))),
            ("  lost      ", "" if parted["cause"] in _NEW else _lost(parted)),
            ("  mended by ", _mended(parted)),
        ]
    lines += [hanging(name, text, width) for name, text in facts if text]
    return lines


def line(said: Said, width: int | None, paint: Painter = plain) -> str:
    """A request on one line: when, a bar, tokens, seconds to the first token, why not more, who.

    Args:
        said: As the server tells it.
        width: Columns of the terminal; None for a line of any length.
        paint: Adds colours.
    """
    is_wide = width is None or width >= _WIDE
    first = said["first_token_s"]
    cells = [
        _clock(said),
        bar(said, 24 if is_wide else 12, paint),
        f"{said['cached_tokens']:,}/{said['num_tokens']:,}".rjust(15),
        ("" if first is None else format_duration(first)).rjust(6),
    ]
    taken = 8 + (24 if is_wide else 12) + len(cells[2]) + 6 + 4 * 2
    why, client = _short_cause(said, is_wide), said["client"]
    if width is None:
        return "  ".join([*cells, why, client]).rstrip()
    room = max(0, width - taken)
    for_client = min(_CLIENT, room // 2) if is_wide else 0
    why = shorten(why, room - (for_client + 2 if for_client else 0), "end")
    if for_client:
        why += " " * (room - for_client - 2 - text_width(why))
        return "  ".join([*cells, why, shorten(client, for_client, "end")]).rstrip()
    return "  ".join([*cells, why]).rstrip()


def bar(said: Said, width: int, paint: Painter = plain) -> str:
    """What came from the disk, from memory or a remote, and what was computed, as one bar."""
    total = said["num_tokens"]
    if not total:
        return " " * width
    cached = said["cached_tokens"]
    # Neither is to be seen where there was none of it, nor hidden where there was some.
    found = min(max(round(width * cached / total), cached > 0), width - 1)
    if cached and cached >= total - 1:
        found = width  # the last token is always computed
    source = said["source"] if said["source"] in _MARKS else "memory"
    return paint(_MARKS[source] * found, _STYLES[source]) + paint(
        _MARKS["computed"] * (width - found), _STYLES["computed"]
    )


def _clock(said: Said) -> str:
    return datetime.datetime.fromtimestamp(said["time"]).strftime("%H:%M:%S")


def _tokens(said: Said) -> str:
    return f"{said['cached_tokens']:,} of {plural(said['num_tokens'], 'token')}"


def _outcome(said: Said) -> str:
    words = {"failed": "It failed.", "left": "Its client left before the answer was over."}
    first = said["first_token_s"]
    after = f"First token after {format_duration(first)}." if first is not None else ""
    return " ".join(filter(None, (words.get(said["state"], ""), after)))


def _reused(said: Said) -> str:
    if said["source"] is None:
        return ""
    source = _SOURCES[said["source"]]
    why = f"; {said['reason']}" if said["reason"] else ""
    return f"{source}{why}"


def _remote(said: Said | None) -> str:
    """What the remote said; "" where it was not asked."""
    if said is None:
        return ""
    took = f" after {format_duration(said['seconds'])}" if said["seconds"] else ""
    return f"{said['why'].replace('_', ' ')}{took}"


def _cause(parted: Said) -> str:
    if parted["cause"] is None:
        return f"None: it goes on from request {parted['id']}."
    code = f" ({parted['code']})" if parted["code"] else ""
    also = f" Further on: {', '.join(parted['also'])}." if parted["also"] else ""
    return f"{parted['sentence']}{code}{also}"


def _where(parted: Said) -> str:
    places = [
        f"{parted['at']} ({parted['role']})" if parted["role"] else parted["at"],
        "" if parted["character"] is None else f"character {parted['character']:,}",
        f"token {parted['shared_tokens']:,}",
        f"compared with request {parted['id']}",
    ]
    return ", ".join(filter(None, places))


def _lost(parted: Said) -> str:
    lost = plural(parted["lost_tokens"], "token")
    seconds = parted["lost_s"]
    return lost if seconds is None else f"{lost}, about {format_duration(seconds)}"


def _mended(parted: Said) -> str:
    options = [f"--stabilize {','.join(parted['repairs'])}"] if parted["repairs"] else []
    return "; ".join([*options, *(f"in the client: {one}" for one in parted["switches"])])


def _quoted(text: str | None, dots: str = "") -> str:
    if text is None:
        return ""
    return f"{dots}{text}" if text else "(nothing)"


def _short_cause(said: Said, is_wide: bool) -> str:
    if said["state"] != "done":
        return {"failed": "failed", "left": "client left"}[said["state"]]
    parted = said["parted"]
    if parted is None or parted["cause"] is None:
        if said["source"] == "miss":
            return "nothing like it yet"
        return "goes on" if parted is not None else ""
    code = f"{parted['code']} " if parted["code"] else ""
    is_mended = is_wide and parted["repairs"]
    mended = f": --stabilize {','.join(parted['repairs'])}" if is_mended else ""
    return f"{code}{parted['cause']}".replace("_", " ") + mended
