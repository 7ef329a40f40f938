"""macOS: a store stays out of backups and of the search index, and nothing fails for that."""

from __future__ import annotations

import errno
import os
import plistlib
from pathlib import Path

import pytest

from persist_cache.store import exclusion
from persist_cache.store.store import Store
from tests.fakes import disk_usage, put
from tests.test_volumes import Mac, statfs

NAME = b"com.apple.metadata:com_apple_backup_excludeItem"


class Attributes(dict[tuple[bytes, bytes], bytes]):
    """Extended attributes as macOS keeps them, by path and name."""

    def set(self, path: bytes, name: bytes, value: bytes) -> None:
        self[path, name] = value

    def ask(self, path: bytes, name: bytes) -> bytes:
        if (path, name) not in self:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return self[path, name]


@pytest.fixture
def attributes(monkeypatch: pytest.MonkeyPatch) -> Attributes:
    made = Attributes()
    monkeypatch.setattr(exclusion, "_set_attribute", made.set)
    monkeypatch.setattr(exclusion, "_attribute", made.ask)
    return made


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Mac:
    return Mac(monkeypatch)


def test_a_store_is_left_out_of_backups_and_search(
    tmp_path: Path, mac: Mac, attributes: Attributes
) -> None:
    root = tmp_path / "store"

    with Store.open(root, min_free_bytes=0) as store:
        put(store, [1, 2, 3])
        assert store.check(read_data=True) == []
        assert store.stats().usage.total >= disk_usage(root)

    assert (root / ".metadata_never_index").stat().st_size == 0
    ((path, name),) = attributes
    assert (path, name) == (os.fsencode(root), NAME)
    assert plistlib.loads(attributes[path, name]) == "com.apple.backupd"
    assert exclusion.is_excluded(root)


def test_a_sweep_leaves_the_marks(tmp_path: Path, mac: Mac, attributes: Attributes) -> None:
    for _ in range(2):
        with Store.open(tmp_path / "store", min_free_bytes=0) as store:
            store.gc()

    assert (tmp_path / "store" / ".metadata_never_index").exists()


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EPERM, errno.EIO])
def test_attributes_that_cannot_be_set_are_no_error(
    tmp_path: Path, mac: Mac, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*arguments: bytes) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(exclusion, "_set_attribute", refuse)
    monkeypatch.setattr(exclusion, "_attribute", refuse)

    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put(store, [1, 2, 3])


def test_where_attributes_are_files_of_their_own_none_is_set(
    tmp_path: Path, mac: Mac, attributes: Attributes
) -> None:
    """exFAT: `._store` would appear beside the store."""
    mac.raw = statfs(kind=b"exfat")

    Store.open(tmp_path / "store", min_free_bytes=0).close()

    assert not attributes
    assert (tmp_path / "store" / ".metadata_never_index").exists()


def test_reading_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.open(tmp_path / "store", min_free_bytes=0).close()
    Mac(monkeypatch)
    made = Attributes()
    monkeypatch.setattr(exclusion, "_set_attribute", made.set)

    Store.open(tmp_path / "store", read_only=True).close()

    assert not made
    assert not (tmp_path / "store" / ".metadata_never_index").exists()


def test_elsewhere_nothing_is_marked(tmp_path: Path, attributes: Attributes) -> None:
    Store.open(tmp_path / "store", min_free_bytes=0).close()

    assert not attributes
    assert not (tmp_path / "store" / ".metadata_never_index").exists()
