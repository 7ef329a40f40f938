"""KV tensors reveal their prompt: nobody but the owner can read a store."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from persist_cache.errors import StoreAccessError
from persist_cache.store import Store
from tests.fakes import fetched, put


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode)
        for path in [root, *root.rglob("*")]
    }


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o277, 0o777])
def test_everything_is_the_owners_alone_under_any_umask(tmp_path: Path, mask: int) -> None:
    """llama.cpp, vLLM: prompts that every local user can read (0644)."""
    root = tmp_path / "store"
    with umask(mask), Store.open(root, min_free_bytes=0) as store:
        put(store, [1, 2, 3], complete=False)
        assert fetched(store, [1, 2, 3]) == 3

    for name, mode in modes(root).items():
        assert mode == (0o700 if (root / name).is_dir() else 0o600), name


def test_open_folder_is_closed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "store"
    Store.open(root, min_free_bytes=0).close()
    root.chmod(0o755)

    Store.open(root, min_free_bytes=0).close()

    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert "open to other users" in caplog.text


@pytest.mark.parametrize("read_only", [False, True])
def test_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    Store.open(tmp_path / "store", min_free_bytes=0).close()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)

    with pytest.raises(StoreAccessError, match="another user"):
        Store.open(tmp_path / "store", read_only=read_only)


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("mine")

    with pytest.raises(StoreAccessError):
        Store.open(tmp_path / "store", min_free_bytes=0)
    assert (tmp_path / "store").read_text() == "mine"


def test_backups_are_told_to_leave_it_out(tmp_path: Path) -> None:
    Store.open(tmp_path / "store", min_free_bytes=0).close()

    tag = (tmp_path / "store" / "CACHEDIR.TAG").read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
