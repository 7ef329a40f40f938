"""What servers and stores tell of a remote, in words; nothing of a remote is imported for it."""

from __future__ import annotations

from collections.abc import Mapping

from persist_cache_cli.output import format_bytes, format_duration, plural

REMOTE_WORDS = {
    "closed": "in use",
    "open": "left alone after failures",
    "half-open": "being tried",
    "off": "not used",
}
"""The states of a server's remote, in words."""


def shown_count(name: str, count: int) -> str:
    """What was counted under a name, for people."""
    if name.endswith("_bytes"):
        return format_bytes(count)
    return format_duration(count / 1000) if name.endswith("_ms") else f"{count:,}"


def counted_line(counters: Mapping[str, int]) -> str:
    """What the remote was good for, by the counters of a store; "" where it was not asked."""

    def count(name: str) -> int:
        return counters.get(f"remote_{name}", 0)

    misses = sum(n for name, n in counters.items() if name.startswith("remote_misses:"))
    if not (count("requests") or misses):
        return ""
    saved = f", {format_duration(count('saved_ms') / 1000)} saved" if count("saved_ms") else ""
    return (
        f"{plural(count('hits'), 'hit')}, {plural(misses, 'miss', 'misses')}{saved}; "
        f"{format_bytes(count('received_bytes'))} received, "
        f"{format_bytes(count('sent_bytes'))} sent"
    )
