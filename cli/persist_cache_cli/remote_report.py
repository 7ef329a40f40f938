"""A store's remote, tried: what `remote status` and `doctor` say of it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

from msgspec import Struct

from persist_cache import Store
from persist_cache.errors import MissingDependencyError, RemoteError
from persist_cache.remote import Probe, Remote, RemoteSettings, read_settings
from persist_cache_cli.output import format_bytes, format_duration, plural, printable

REMOTE_WORDS = {
    "closed": "in use",
    "open": "left alone after failures",
    "half-open": "being tried",
    "off": "not used",
}
"""The states of a server's remote, in words."""


class RemoteReport(Struct, frozen=True):
    """What came of it.

    Attributes:
        settings: Which remote the store uses.
        probe: What was tried; None where it cannot even be opened.
        trouble: What is wrong, in a sentence, or "".
    """

    settings: RemoteSettings
    probe: Probe | None
    trouble: str


def look_at_remote(store: Store) -> RemoteReport | None:
    """Try the remote of a store; None where it has none.

    Raises:
        RemoteError: What the store remembers of it cannot be understood.
    """
    settings = read_settings(store)
    if settings is None:
        return None
    try:
        remote = Remote.open(store, settings)
    except (RemoteError, MissingDependencyError) as error:
        return RemoteReport(settings, None, str(error))
    try:
        probe = remote.probe()
    finally:
        remote.close()
    return RemoteReport(settings, probe, probe.message)


def open_secret(settings: RemoteSettings) -> str:
    """What to do where other users of this machine can read the secret; "" where they cannot."""
    path = settings.secret_file
    try:
        is_open = bool(path) and bool(os.stat(path).st_mode & 0o077)
    except OSError:
        return ""
    if not is_open:
        return ""
    return (
        f"Other users of this machine can read or change {path}, which holds the remote's secret; "
        f"run `chmod 600 {shlex.quote(path)}`."
    )


def remote_line(report: RemoteReport) -> str:
    """Where it is, and what may be done there."""
    return f"{printable(report.settings.url)}: {probe_line(report.probe)}"


def probe_line(probe: Probe | None) -> str:
    """What was found when it was tried."""
    if probe is None or not probe.reachable:
        return "it cannot be used" if probe is None else "it cannot be read"
    rights = ["read"] if probe.may_read else []
    rights += ["create"] if probe.may_create else []
    may = " and ".join(rights) or "do nothing"
    return f"it answers after {format_duration(probe.latency_s)}; may {may}"


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
