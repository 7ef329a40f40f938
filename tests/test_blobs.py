"""A blob is a plain safetensors file, and no damage to it goes unseen."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import safetensors

from persist_cache import fs
from persist_cache.blobs.folder import SUFFIX, BlobFolder, is_blob_file, try_remove_orphan
from persist_cache.blobs.header import ALIGNMENT, TOKENS, BlobHeader, header_bytes
from persist_cache.blobs.reader import BlobReader
from persist_cache.blobs.writer import BlobWriter, Written
from persist_cache.codec import Tensor
from persist_cache.errors import CorruptBlobError, StoreFormatError
from persist_cache.store.store import Store
from persist_cache.tokens import pack_tokens

HEADER = BlobHeader(
    kind="run",
    complete=True,
    fingerprint="ab" * 32,
    identity='{"weights": "w\\"0"}',
    layout='{"fake": 1}',
    detail="{}",
    start=0,
    end=3,
    prefix="",
    parent="",
    tier="user",
    entry=True,
    created=1.7e9,
)


def tensors() -> list[Tensor]:
    rows = memoryview(bytes(range(48)))
    return [
        Tensor(TOKENS, "I64", (3,), [memoryview(pack_tokens([1, -(1 << 59), 3]))]),
        Tensor("layers.0.keys", "BF16", (1, 2, 3, 4), [rows[:10], rows[10:]]),
        Tensor("layers.0.state.0", "U8", (0, 5), []),
        Tensor("layers.1.values", "F32", (3,), [memoryview(bytes(12))]),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> BlobFolder:
    folder = BlobFolder(tmp_path)
    folder.create()
    return folder


@pytest.fixture
def blob(folder: BlobFolder) -> tuple[Path, Written]:
    with BlobWriter(folder) as writer:
        written = writer.write(HEADER, tensors())
        writer.publish()
        writer.keep()
    return folder.path(written.name), written


def read_all(path: Path, **expected: object) -> dict[str, bytes]:
    with BlobReader(path, **expected) as reader:  # type: ignore[arg-type]
        return {name: reader.read_bytes(name) for name in reader.header.tensors}


def test_what_was_written_is_read(blob: tuple[Path, Written]) -> None:
    path, written = blob
    with BlobReader(path, nbytes=written.nbytes, digest=written.digest) as reader:
        assert reader.read_bytes("layers.0.keys") == bytes(range(48))
        assert reader.read_bytes("layers.0.state.0") == b""
        said = reader.header
        reader.verify()
    assert {name: getattr(said, name) for name in ("kind", "identity", "end", "tier")} == {
        name: getattr(HEADER, name) for name in ("kind", "identity", "end", "tier")
    }


def test_safetensors_reads_it(blob: tuple[Path, Written]) -> None:
    path, _ = blob
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == {tensor.name for tensor in tensors()}
        assert file.get_tensor(TOKENS).tolist() == [1, -(1 << 59), 3]
        assert file.get_slice("layers.0.keys").get_dtype() == "BF16"
        assert file.get_slice("layers.0.keys").get_shape() == [1, 2, 3, 4]
        assert file.metadata()["kind"] == "run"
    raw = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    assert bytes(dict(raw)["layers.0.keys"]["data"]) == bytes(range(48))


@pytest.mark.parametrize("text", ["", "x" * 5_000, "x" * 20_000])
def test_data_begins_at_a_page(folder: BlobFolder, text: str) -> None:
    head = header_bytes(HEADER, [Tensor("t" + text, "U8", (1,), [memoryview(b"x")])])

    assert len(head) % ALIGNMENT == 0


def test_shape_that_contradicts_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="does not have"):
        header_bytes(HEADER, [Tensor("t", "F32", (2,), [memoryview(b"1234")])])


def test_rows_are_read_into_many_buffers(blob: tuple[Path, Written]) -> None:
    path, _ = blob
    with BlobReader(path) as reader:
        parts = [memoryview(bytearray(n)) for n in (1, 0, 40, 7)]
        reader.read("layers.0.keys", parts)
        assert b"".join(parts) == bytes(range(48))
        with pytest.raises(ValueError, match="sum up"):
            reader.read("layers.0.keys", parts[:2])


def test_released_reader_opens_again(blob: tuple[Path, Written]) -> None:
    path, _ = blob
    with BlobReader(path) as reader:
        reader.release()
        assert reader.read_bytes("layers.0.keys") == bytes(range(48))
        path.unlink()
        with pytest.raises(FileNotFoundError):
            reader.read_bytes("layers.0.keys")


def flipped_bits(size: int, header: int) -> list[int]:
    """Bits of every region: all of the length, samples of JSON and padding, all of the data."""
    places = [*range(8), *range(8, header, 61), *range(header - 4, header), *range(header, size)]
    return [place * 8 + place % 8 for place in places] + list(range(64))


def test_flipped_bit_is_found_with_and_without_a_record(blob: tuple[Path, Written]) -> None:
    path, written = blob
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    text = good.rindex(b"}", 0, header) + 1
    bits = flipped_bits(len(good), header)
    bits += [place * 8 + place % 8 for place in range(8, text, 3)]
    for bit in bits:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        for record in ({}, {"nbytes": written.nbytes, "digest": written.digest}):
            # Without the record a flip in the version's own text reads as another version.
            expected = CorruptBlobError if record else (CorruptBlobError, StoreFormatError)
            with pytest.raises(expected):
                read_all(path, **record)
    path.write_bytes(good)
    read_all(path)


def test_truncation_anywhere_is_found(blob: tuple[Path, Written]) -> None:
    path, written = blob
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for size in [0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(good) - 1]:
        path.write_bytes(good[:size])
        for record in ({}, {"nbytes": written.nbytes}):
            with pytest.raises(CorruptBlobError):
                read_all(path, **record)
    path.write_bytes(good + b"x")
    with pytest.raises(CorruptBlobError):
        read_all(path)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 60, (1 << 64) - 1])
def test_impossible_header_length_allocates_nothing(
    blob: tuple[Path, Written], length: int
) -> None:
    path, _ = blob
    good = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + good[8:])

    with pytest.raises(CorruptBlobError):
        BlobReader(path)


@pytest.mark.parametrize(
    "text",
    [
        b"garbage",
        b"{}",
        b"[]",
        b"null",
        b'{"__metadata__":{}}',
        b'{"__metadata__":{"format":"pt"}}',
        b'{"__metadata__":{"format":"persist-cache","version":"1"}}',
        b'{"__metadata__":{"format":"persist-cache","version":1}}',
        b'{"a":' + b"[" * 100_000,
        b"\xff" * 64,
    ],
)
def test_foreign_header_is_corrupt(folder: BlobFolder, tmp_path: Path, text: bytes) -> None:
    path = tmp_path / ("0" * 32 + ".safetensors")
    path.write_bytes(len(text).to_bytes(8, "little") + text)

    with pytest.raises(CorruptBlobError):
        BlobReader(path)


def test_unknown_version_is_told_apart_from_damage(blob: tuple[Path, Written]) -> None:
    path, _ = blob
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"version":"1"', b'"version":"2"'))

    with pytest.raises(StoreFormatError, match="'2'"):
        BlobReader(path)


def test_symbolic_link_folder_and_missing_file_are_refused(
    blob: tuple[Path, Written], tmp_path: Path
) -> None:
    path, _ = blob
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(CorruptBlobError):
        BlobReader(link)
    with pytest.raises(CorruptBlobError):
        BlobReader(tmp_path)
    with pytest.raises(FileNotFoundError):
        BlobReader(tmp_path / "nothing")


def test_blob_that_is_not_published_leaves_nothing(folder: BlobFolder) -> None:
    with BlobWriter(folder) as writer:
        writer.write(HEADER, tensors())
    assert list(folder.temporaries()) == []

    with BlobWriter(folder) as writer:
        writer.write(HEADER, tensors())
        writer.publish()
    assert list(folder.names()) == []


def test_writer_dead_before_the_rename_leaves_a_temporary_file_that_a_sweep_removes(
    tmp_path: Path,
) -> None:
    """oMLX: a leftover temporary file indexed as real data."""
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        folder = BlobFolder(store.root)
    child = os.fork()
    if child == 0:
        writer = BlobWriter(folder)
        writer.write(HEADER, tensors())
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list(folder.temporaries())) == 1
    assert list(folder.names()) == []

    Store.open(tmp_path / "store", min_free_bytes=0).close()

    assert list(folder.temporaries()) == []


def test_orphan_is_kept_while_its_writer_lives_or_once_it_is_known(folder: BlobFolder) -> None:
    with BlobWriter(folder) as writer:
        writer.write(HEADER, tensors())
        assert not try_remove_orphan(writer.path, lambda: False)
        writer.publish()
        writer.keep()
    assert not try_remove_orphan(writer.path, lambda: True)
    assert try_remove_orphan(writer.path, lambda: False)
    assert not try_remove_orphan(writer.path, lambda: False)


@pytest.mark.parametrize("sweep", ["locks", "removes"])
def test_writer_starts_again_when_a_sweep_saw_its_file_before_the_lock(
    folder: BlobFolder, monkeypatch: pytest.MonkeyPatch, sweep: str
) -> None:
    create = fs.create
    seen: list[Path] = []
    held: list[int] = []

    def created(path: Path) -> int:
        fd = create(path)
        if not seen:
            seen.append(path)
            if sweep == "removes":
                assert try_remove_orphan(path, lambda: False)
            else:
                held.append(fs.open_read(path))
                assert fs.try_lock(held[0])
        return fd

    monkeypatch.setattr(fs, "create", created)
    with BlobWriter(folder) as writer:
        assert writer.path != seen[0]
        writer.write(HEADER, tensors())
        writer.publish()
        writer.keep()
    assert [path for _, path in folder.names()] == [writer.path]
    assert list(folder.temporaries()) == []
    for fd in held:
        os.close(fd)


def test_only_names_of_blobs_are_ever_touched(folder: BlobFolder) -> None:
    for name in ("notes.txt", "x" * 32 + ".safetensors", "A" * 32 + ".safetensors", "0" * 32):
        (folder.temporary / name).write_text("mine")

    assert list(folder.temporaries()) == []
    assert is_blob_file("0123456789abcdef" * 2 + SUFFIX)
    names = ["", "0" * 31, "0" * 33, "g" * 32, "A" * 32]
    assert not any(is_blob_file(name + SUFFIX) for name in names)
    assert not is_blob_file("0" * 32)


def test_short_writes_and_many_buffers_are_handled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, parts: writev(fd, [parts[0][:3]]))
    pieces = [memoryview(bytes([n % 251] * (n % 5))) for n in range(2500)]
    fd = fs.create(tmp_path / "file")

    count = fs.write_all(fd, pieces)

    assert count == sum(map(len, pieces))
    buffers = [memoryview(bytearray(len(piece))) for piece in pieces]
    assert fs.read_into(fd, 0, buffers) == count
    assert all(a == b for a, b in itertools.zip_longest(pieces, buffers))
    os.close(fd)
