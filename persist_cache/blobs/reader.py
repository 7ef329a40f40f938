"""Reading a blob: no byte leaves here that its checksum does not vouch for."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from persist_cache import fs
from persist_cache.blobs.folder import SUFFIX
from persist_cache.blobs.header import (
    ALIGNMENT,
    MAX_HEADER_BYTES,
    TOKENS,
    BlobHeader,
    checksum,
    parse_header,
    prefix_digest,
)
from persist_cache.errors import CorruptBlobError
from persist_cache.tokens import TOKEN_BYTES


class BlobReader:
    """One verified, open blob.

    Thread safety: `read` may be called from several threads at once (`preadv`, no shared state).
    """

    def __init__(self, path: Path, *, nbytes: int | None = None, digest: bytes | None = None):
        """Open and check the header.

        Args:
            path: The file.
            nbytes: Size its record names, if there is a record.
            digest: xxh3-128 of its header bytes, from the record; without it the header's own
                seal is checked.

        Raises:
            FileNotFoundError: The blob is gone.
            CorruptBlobError: The file is not what was written.
            StoreFormatError: It was written by an unknown version.
        """
        self.path = path
        self.name = path.name.removesuffix(SUFFIX)
        with bad_sectors(path):
            self._fd = fs.open_read(path)
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptBlobError(path, "it is not a file")
            self.nbytes = status.st_size
            if nbytes is not None and self.nbytes != nbytes:
                raise CorruptBlobError(path, f"{self.nbytes} bytes long instead of {nbytes}")
            self.header = self._read_header(digest)
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def release(self) -> None:
        """Give the descriptor back until the next `read`.

        A path of thousands of runs would exceed the limit of open files. The name stands for
        the same bytes for ever, so opening it again is safe; it may be gone by then.
        """
        self.close()

    def __enter__(self) -> BlobReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self, name: str, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` with one tensor's bytes; see `read_adjacent`."""
        self.read_adjacent([(name, buffers)])

    def read_adjacent(self, parts: Sequence[tuple[str, Sequence[memoryview]]]) -> None:
        """Fill buffers with the bytes of tensors that lie end to end, and verify each.

        One call of the system reads all, as far as its limits allow.

        Args:
            parts: Per tensor, in file order: its name in `header.tensors`, and writable flat byte
                views for its bytes, whose lengths sum up to its size.

        Raises:
            CorruptBlobError: Torn or flipped bytes; the buffers then hold garbage.
        """
        tensors = self.header.tensors
        start = end = tensors[parts[0][0]].offset
        views: list[memoryview] = []
        for name, buffers in parts:
            info = tensors[name]
            if info.offset != end:
                raise ValueError(f"tensor {name!r} does not follow the one before it")
            end += info.nbytes
            views += buffers
        if sum(map(len, views)) != end - start:
            raise ValueError(f"the buffers do not sum up to {end - start} bytes")
        with bad_sectors(self.path), self._descriptor() as fd:
            count = fs.read_into(fd, start, views)
        if count != end - start:
            names = (name for name, _ in parts if tensors[name].end > start + count)
            raise CorruptBlobError(self.path, f"ends within tensor {next(names)!r}")
        for name, buffers in parts:
            if checksum(buffers) != tensors[name].xxh3:
                raise CorruptBlobError(self.path, f"checksum of tensor {name!r} differs")

    def read_bytes(self, name: str) -> bytes:
        """The verified bytes of a small tensor."""
        buffer = bytearray(self.header.tensors[name].nbytes)
        self.read(name, [memoryview(buffer)])
        return bytes(buffer)

    def read_part(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with a tensor's bytes from `start` on, of a blob that `verify` passed.

        A checksum is over a whole tensor, so nothing is verified here.

        Raises:
            CorruptBlobError: The file has become shorter.
        """
        with bad_sectors(self.path), self._descriptor() as fd:
            count = fs.read_into(fd, self.header.tensors[name].offset + start, [buffer])
        if count != len(buffer):
            raise CorruptBlobError(self.path, f"ends within tensor {name!r}")

    def check_place(self, fingerprint: str, packed: bytes, start: int, used: int) -> None:
        """Make sure that this blob belongs where the index, which has no checksums, puts it.

        Args:
            fingerprint: Hex digest of the model asked for.
            packed: The packed prompt.
            start: Position of the blob's first token in it.
            used: Tokens to be used of the blob; 0 for a checkpoint.

        Raises:
            CorruptBlobError: It is of another model or other tokens; nothing of it may be served.
        """
        header = self.header
        here = packed[start * TOKEN_BYTES : (start + used) * TOKEN_BYTES]
        before = memoryview(packed)[: start * TOKEN_BYTES]
        if (
            header.fingerprint != fingerprint
            or header.start != start
            or header.prefix != prefix_digest(before)
            or (used and not self.read_bytes(TOKENS).startswith(here))
        ):
            raise CorruptBlobError(self.path, "it holds another prompt than the index says")

    def verify(self) -> None:
        """Read every tensor and check it; nothing is kept.

        Raises:
            CorruptBlobError: Some bytes differ from what was written.
        """
        with bad_sectors(self.path), self._descriptor() as fd:
            self._verify(fd)

    def _verify(self, fd: int) -> None:
        scratch = memoryview(bytearray(1 << 20))
        for name, info in self.header.tensors.items():
            digest = xxhash.xxh3_128()
            for start in range(0, info.nbytes, len(scratch)):
                part = scratch[: min(len(scratch), info.nbytes - start)]
                count = fs.read_into(fd, info.offset + start, [part])
                if count != len(part):
                    raise CorruptBlobError(self.path, f"ends within tensor {name!r}")
                digest.update(part)
            if digest.hexdigest() != info.xxh3:
                raise CorruptBlobError(self.path, f"checksum of tensor {name!r} differs")

    @contextlib.contextmanager
    def _descriptor(self) -> Iterator[int]:
        if self._fd >= 0:
            yield self._fd
            return
        fd = fs.open_read(self.path)
        try:
            yield fd
        finally:
            os.close(fd)

    def _read_header(self, digest: bytes | None) -> BlobHeader:
        # Mostly the whole header, because data begins at the next multiple of `ALIGNMENT`.
        raw = self._exactly(0, max(8, min(ALIGNMENT, self.nbytes)))
        size = int.from_bytes(raw[:8], "little")
        # A damaged length must not become an allocation of 2^60 bytes.
        if not 2 <= size <= min(MAX_HEADER_BYTES, self.nbytes - 8):
            raise CorruptBlobError(self.path, "its header length is impossible")
        missing = 8 + size - len(raw)
        raw = raw + self._exactly(len(raw), missing) if missing > 0 else raw[: 8 + size]
        self.digest = xxhash.xxh3_128_digest(raw)
        if digest is not None and self.digest != digest:
            raise CorruptBlobError(self.path, "its header differs from what was written")
        return self._parse(raw[8:], data_start=8 + size, sealed=digest is not None)

    def _exactly(self, offset: int, size: int) -> bytes:
        buffer = bytearray(size)
        with bad_sectors(self.path):
            count = fs.read_into(self._fd, offset, [memoryview(buffer)])
        if count != size:
            raise CorruptBlobError(self.path, "ends within its header")
        return bytes(buffer)

    def _parse(self, raw: bytes, data_start: int, *, sealed: bool) -> BlobHeader:
        return parse_header(self.path, raw, data_start, self.nbytes, sealed=sealed)


@contextlib.contextmanager
def bad_sectors(path: Path) -> Iterator[None]:
    """What can never be read again is corrupt, and must not be tried at every request."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EIO, errno.ELOOP, errno.EISDIR):
            raise CorruptBlobError(path, f"it cannot be read ({error.strerror})") from error
        raise
