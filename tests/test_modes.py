"""KV tensors reveal their prompt: nobody but the owner can read a store."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from persist_cache.errors import StoreAccessError
from persist_cache.store.store import Store
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


NEEDS_ROOT = pytest.mark.skipif(
    os.geteuid() != 0, reason="NOT ROOT: nothing can be given to another user"
)
PARTS = ["blobs", "tmp", "quarantine", "blobs/FAN"]
FILES = ["data.mdb", "lock.mdb", "writer.lock", "store.lock", "ballast"]


def made(root: Path, part: str) -> Path:
    """A part of a store with one entry; `FAN` is the folder that its blob is in."""
    with Store.open(root, min_free_bytes=0) as store:
        put(store, [1, 2, 3])
    fan = next((root / "blobs").iterdir()).name
    return root / part.replace("FAN", fan)


@NEEDS_ROOT
@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("part", [*PARTS, *FILES])
def test_part_of_another_user_is_refused(tmp_path: Path, part: str, read_only: bool) -> None:
    place = made(tmp_path / "store", part)
    os.chown(place, 4711, -1)

    with pytest.raises(StoreAccessError, match=f"{place} belongs to another user"):
        Store.open(tmp_path / "store", read_only=read_only)

    os.chown(place, 0, -1)
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        assert fetched(store, [1, 2, 3]) == 3


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_part_that_leads_elsewhere_is_refused(tmp_path: Path, part: str, read_only: bool) -> None:
    place = made(tmp_path / "store", part)
    elsewhere = tmp_path / "elsewhere"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())

    with pytest.raises(StoreAccessError, match="not a folder of its own"):
        Store.open(tmp_path / "store", read_only=read_only)
    assert sorted(elsewhere.iterdir()) == before


@NEEDS_ROOT
def test_index_that_leads_to_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    place = made(tmp_path / "store", "data.mdb")
    place.rename(tmp_path / "theirs")
    os.chown(tmp_path / "theirs", 4711, -1)
    place.symlink_to(tmp_path / "theirs")

    with pytest.raises(StoreAccessError, match="another user"):
        Store.open(tmp_path / "store")


@pytest.mark.parametrize("answer", ["ignored", errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_permissions_is_used_and_said_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answer: str | int,
) -> None:
    """exFAT on a Mac: chmod does nothing, and all that is there is 0777."""
    root = tmp_path / "store"

    def chmod(target: object, mode: int, **options: object) -> None:
        if isinstance(answer, int):
            raise OSError(answer, os.strerror(answer))

    with umask(0):
        root.mkdir(0o777)
        monkeypatch.setattr(os, "chmod", chmod)
        monkeypatch.setattr(os, "fchmod", chmod)
        for tokens in ([1, 2, 3], [4, 5, 6]):
            with Store.open(root, min_free_bytes=0) as store:
                put(store, tokens)
                assert fetched(store, tokens) == 3

    (said,) = [one.message for one in caplog.records if one.levelname == "WARNING"]
    assert "keeps no permissions" in said
    assert "yours alone" not in caplog.text
