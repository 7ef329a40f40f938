"""Large volumes are not taken for full ones, and a volume is known again after a restart."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from pathlib import Path

import pytest

from persist_cache import fs
from persist_cache.doctor import facts
from persist_cache.fingerprint import contents, memo
from persist_cache.fingerprint.identifier import identify_or_reason
from persist_cache.store.store import Store
from persist_cache.system import volumes
from tests.fakes import put
from tests.test_fingerprint import write_model

TIB = 1 << 40
UUID = bytes(range(1, 17))


def statfs(
    *,
    block: int = 4096,
    total: int = 20 * TIB,
    free: int = 17 * TIB,
    files: int = 0xFFFF_FFFF,
    free_files: int = 0xFFFF_0000,
    flags: int = 0,
    point: bytes = b"/System/Volumes/Data",
    kind: bytes = b"apfs",
) -> bytes:
    """macOS's structure, field by field as <sys/mount.h> has them."""
    numbers = struct.pack(
        "=IiQQQQQiiIIII",
        block,
        1 << 20,
        total // block,
        free // block + 77,
        free // block,
        files,
        free_files,
        0x0100_0004,
        0x1A,
        501,
        0x1A,
        flags,
        0,
    )
    names = struct.pack("=16s1024s1024s", kind, point, b"/dev/disk3s5")
    return (numbers + names + bytes(32)).ljust(4096, b"\0")


class Mac:
    """The calls of macOS's kernel, answered from here; its device numbers may be dealt out anew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.raw = statfs()
        self.uuid = UUID
        self.asked: list[bytes] = []
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(volumes, "DARWIN", True)
        monkeypatch.setattr(volumes, "_ask_statfs", lambda path: self.raw)
        monkeypatch.setattr(volumes, "_ask_attributes", self._attributes)

    def _attributes(self, path: bytes) -> bytes:
        self.asked.append(path)
        return struct.pack("=I16s", 20, self.uuid)

    def restart(self, by: int = 7) -> None:
        """From now on `stat` gives another device number for every file."""
        stamp_of = memo.Stamp.of.__func__  # type: ignore[attr-defined]

        def moved(cls: type, status: os.stat_result) -> memo.Stamp:
            stamp: memo.Stamp = stamp_of(cls, status)
            return stamp._replace(device=stamp.device + by)

        self._monkeypatch.setattr(memo.Stamp, "of", classmethod(moved))


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Mac:
    return Mac(monkeypatch)


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was digested, all of which may be remembered."""
    monkeypatch.setenv("PERSIST_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(contents, "SETTLED_NS", -(10**12))
    names: list[str] = []
    digest = hashlib.file_digest

    def counting(file, algorithm):  # type: ignore[no-untyped-def]
        names.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return names


@pytest.mark.parametrize("block", [512, 1024, 4096])
def test_a_volume_of_more_blocks_than_32_bits_count_is_seen_in_full(
    tmp_path: Path, mac: Mac, block: int
) -> None:
    mac.raw = statfs(block=block, total=40 * TIB, free=32 * TIB)  # 0 modulo 2**32 blocks

    assert fs.free_bytes(tmp_path) == 32 * TIB
    assert facts.look_at_folder(tmp_path).total_bytes == 40 * TIB


def test_the_floor_is_not_hit_on_a_large_volume(tmp_path: Path, mac: Mac) -> None:
    mac.raw = statfs(total=40 * TIB, free=16 * TIB)  # what statvfs would call 0

    with Store.open(tmp_path / "store", min_free_bytes=2 << 30) as store:
        first, second = put(store, [1, 2, 3]), put(store, [4, 5, 6])

        assert {one.id for one in store.entries()} == {first, second}


def test_files_without_a_limit_have_none(tmp_path: Path, mac: Mac) -> None:
    assert fs.free_files(tmp_path) is None
    mac.raw = statfs(files=0, free_files=0)
    assert fs.free_files(tmp_path) is None
    mac.raw = statfs(files=1000, free_files=3)
    assert fs.free_files(tmp_path) == 3


@pytest.mark.parametrize("flags", [0, 1])
def test_a_read_only_volume_is_seen(tmp_path: Path, mac: Mac, flags: int) -> None:
    mac.raw = statfs(flags=flags)

    assert facts.look_at_folder(tmp_path).writable is not bool(flags)


def test_elsewhere_statvfs_is_asked(tmp_path: Path) -> None:
    found = volumes.space(tmp_path)
    status = os.statvfs(tmp_path)

    assert found.total_bytes == status.f_blocks * status.f_frsize
    assert volumes.lasting_device(tmp_path, 42) == 42


def test_weights_are_not_read_again_after_a_restart(
    tmp_path: Path, mac: Mac, reads: list[str]
) -> None:
    model = write_model(tmp_path / "model")
    before = identify_or_reason(str(model))
    mac.restart()

    assert identify_or_reason(str(model)) == before

    assert reads == ["model.safetensors"]
    assert set(mac.asked) == {b"/System/Volumes/Data"}


def test_a_change_is_still_seen_after_a_restart(tmp_path: Path, mac: Mac, reads: list[str]) -> None:
    model = write_model(tmp_path / "model")
    before = identify_or_reason(str(model))
    mac.restart()
    write_model(tmp_path / "other", seed=1)
    content = (tmp_path / "other" / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content)

    assert identify_or_reason(str(model)) != before

    assert len(reads) == 2


def test_another_volume_in_its_place_is_another(tmp_path: Path, mac: Mac, reads: list[str]) -> None:
    model = write_model(tmp_path / "model")
    before = identify_or_reason(str(model))
    mac.restart()
    mac.uuid = bytes(reversed(UUID))

    assert identify_or_reason(str(model)) == before

    assert len(reads) == 2


def test_what_an_earlier_build_remembered_is_still_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    model = write_model(tmp_path / "model")
    before = identify_or_reason(str(model))  # by the device number of `stat`
    mac = Mac(monkeypatch)

    assert identify_or_reason(str(model)) == before
    mac.restart()
    assert identify_or_reason(str(model)) == before

    assert reads == ["model.safetensors"]


@pytest.mark.parametrize("trouble", ["no uuid", "too short", "refused"])
def test_without_an_identity_of_the_volume_the_device_number_serves(
    tmp_path: Path,
    mac: Mac,
    reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    def ask(path: bytes) -> bytes:
        if trouble == "refused":
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return struct.pack("=I16s", 4 if trouble == "too short" else 20, bytes(16))

    monkeypatch.setattr(volumes, "_ask_attributes", ask)
    model = write_model(tmp_path / "model")

    assert identify_or_reason(str(model)) == identify_or_reason(str(model))

    assert reads == ["model.safetensors"]
