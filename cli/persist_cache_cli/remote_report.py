"""A store's remote, tried: what `remote status` and `doctor` say of it."""

from __future__ import annotations

import os
import shlex

from msgspec import Struct

from persist_cache import Store
from persist_cache.errors import MissingDependencyError, RemoteError
from persist_cache.remote import Probe, RemoteSettings, read_settings
from persist_cache_cli.output import format_duration, printable


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
    from persist_cache.remote import Remote  # most stores have none

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
