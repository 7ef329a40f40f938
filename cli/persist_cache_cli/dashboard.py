"""What `top` shows: what was saved, the disk, the latest requests, the largest prompts, as lines.

Pure functions of what a server says; they fit a terminal of any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from persist_cache_cli.output import (
    Painter,
    format_bytes,
    format_duration,
    format_time,
    hanging,
    plain,
    plural,
    printable,
    shorten,
)
from persist_cache_cli.remote_words import REMOTE_WORDS, counted_line
from persist_cache_cli.requests import LEGEND, line

Said = Mapping[str, Any]
_WINDOWS = {"hour": "last hour", "day": "last 24 hours", "start": "since the start"}
_TIERS = (("system", "█"), ("user", "▓"), ("assistant", "▒"), ("other", "░"))
_HEAD_LINES = 12
"""Lines that are there whatever there is room for."""


def lines(
    stats: Said,
    history: Said,
    requests: Sequence[Said],
    largest: Sequence[Said],
    previews: Mapping[str, Said],
    *,
    width: int,
    height: int | None = None,
    paint: Painter = plain,
) -> list[str]:
    """The whole screen.

    Args:
        stats: As the server tells them.
        history: Likewise.
        requests: The latest, the newest first.
        largest: Branches of the tree, the largest first.
        previews: Of these, by their ids.
        width: Columns of the terminal.
        height: Its lines; None for as many as there are.
        paint: Adds colours.
    """
    found = [_head(stats, width, paint), ""]
    found += [_window(one, width) for one in history["windows"]]
    found += ["", *_disk(stats, width, paint), *_remote(stats, width), ""]
    room = len(requests) + len(largest) if height is None else max(4, height - _HEAD_LINES - 3)
    most = min(len(largest), room if height is None else max(2, room // 3))
    found.append(paint(shorten(f"Requests, the latest first   {LEGEND}", width, "end"), "heading"))
    if not requests:
        found.append("None yet.")
    found += [line(one, width, paint) for one in requests[: max(1, room - most)]]
    found += ["", paint("Most disk", "heading")]
    found += [_prompt(one, previews, width) for one in largest[:most]] or ["Nothing is stored."]
    return found


def _head(stats: Said, width: int, paint: Painter) -> str:
    model = printable(stats["model"] or "no model is loaded")
    text = f"{model}   {format_time(stats['time'])}"
    return paint(shorten(text, width), "heading")


def _window(one: Said, width: int) -> str:
    reused, asked = sum(one["tokens_reused"].values()), one["tokens_asked"]
    share = f" ({100 * reused / asked:.0f} %)" if asked else ""
    text = (
        f"{_WINDOWS[one['window']]:<15}  {reused:,} of {plural(asked, 'token')} reused{share}, "
        f"{format_duration(one['saved_s']) if one['saved_s'] else 'nothing'} of prefill saved, "
        f"{plural(one['requests'], 'request')}, since {format_time(one['since'])}"
    )
    return shorten(text, width, "end")


def _disk(stats: Said, width: int, paint: Painter) -> list[str]:
    store, off = stats["store"], stats["server"]["disk_off"]
    if store is None or off:
        return hanging("Disk  off: ", printable(off or "there is no store"), width).splitlines()
    total, budget = store["bytes"]["total"], max(1, store["max_bytes"])
    sizes = {one["tier"]: one["bytes"] for one in store["tiers"]}
    sizes["other"] = max(0, total - sum(sizes.values()))
    columns = max(10, min(60, width - 40))
    bar = "".join(mark * round(columns * sizes[name] / budget) for name, mark in _TIERS)[:columns]
    written = format_bytes(store["written_today_bytes"])
    if store["daily_write_bytes"] is not None:
        written += f" of {format_bytes(store['daily_write_bytes'])}"
    legend = "  ".join(f"{mark} {name} {format_bytes(sizes[name])}" for name, mark in _TIERS)
    return [
        f"Disk  {paint(bar.ljust(columns, '·'), 'good')}  "
        + shorten(f"{format_bytes(total)} of {format_bytes(budget)}", max(8, width - columns - 8)),
        shorten(f"      {legend}", width, "end"),
        shorten(f"      written today: {written}", width, "end"),
    ]


def _remote(stats: Said, width: int) -> list[str]:
    """What the remote was good for since the server was started; nothing without one."""
    one = stats.get("remote")
    if one is None:
        return []
    counters = {f"remote_{name}": count for name, count in one["counters"].items()}
    said = [REMOTE_WORDS.get(one["breaker"], one["breaker"]), counted_line(counters)]
    said += [one["last_error"]] if one["breaker"] != "closed" else []
    return [shorten(f"Remote  {printable('; '.join(filter(None, said)))}", width, "end")]


def _prompt(one: Said, previews: Mapping[str, Said], width: int) -> str:
    title = ", ".join(one["labels"]) or previews.get(one["id"], {}).get("text") or one["tier"]
    below = one["below"]
    cells = (
        f"{format_bytes(below['bytes']):>9}  {plural(below['entries'], 'entry', 'entries'):>13}  "
        f"{one['short_id']}  "
    )
    return shorten(cells + printable(title), width, "end")
