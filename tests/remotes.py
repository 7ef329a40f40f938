"""Stores that share a remote in a folder, and prompts long enough to be published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from persist_cache.remote import Brought, Remote, RemoteSettings, checked_url
from persist_cache.store.store import Store
from tests.fakes import fingerprint, put

SECRET = "a secret of a fleet of test machines"
LONG = [7 * number % 1000 for number in range(1200)]


def secret_file(folder: Path, text: str = SECRET) -> str:
    """A file with the secret."""
    path = folder / f"{abs(hash(text))}.secret"
    path.write_text(text + "\n")
    return str(path)


def folder_settings(folder: Path, **changes: Any) -> RemoteSettings:
    """Settings of the remote in `folder`, whose secret lies beside it."""
    (folder / "bucket").mkdir(exist_ok=True)
    settings = RemoteSettings(
        url=checked_url(str(folder / "bucket")),
        secret_file=secret_file(folder),
        publish_plain=True,
    )
    return msgspec.structs.replace(settings, **changes)


def objects(folder: Path) -> dict[str, bytes]:
    """All objects of the remote in `folder`, by name.

    A writer that was killed may leave what it had not moved to its name yet: no reader sees it.
    """
    bucket = folder / "bucket"
    return {
        str(path.relative_to(bucket)): path.read_bytes()
        for path in sorted(bucket.rglob("*"))
        if path.is_file() and "#" not in path.name  # as `object_store` names it until then
    }


@contextmanager
def opened(store: Store, settings: RemoteSettings, **options: Any) -> Iterator[Remote]:
    """The remote of a store."""
    remote = Remote.open(store, settings, **options)
    try:
        yield remote
    finally:
        assert remote.close(10), "it goes on after it was closed"


@contextmanager
def machine(folder: Path, name: str, settings: RemoteSettings) -> Iterator[tuple[Store, Remote]]:
    """Another machine: a store of its own, and the same remote."""
    with (
        Store.open(folder / name, max_bytes=1 << 30, min_free_bytes=0, run_tokens=64) as store,
        opened(store, settings) as remote,
    ):
        yield store, remote


def put_real(store: Store, tokens: Sequence[int], **options: Any) -> str:
    """Store a prompt under a layout that exists."""
    return put(store, tokens, real=True, **options)


def bring(remote: Remote, tokens: Sequence[int], **options: Any) -> Brought:
    """Look for all of `tokens`, with nothing known."""
    asked = {"known": 0, "limit": len(tokens), **options}
    model = asked.pop("model", "w0")
    return remote.bring(fingerprint(weights=model), list(tokens), **asked)
