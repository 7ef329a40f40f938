"""Reading a bundle's file: every byte of its container is compared with what it has to be.

Sizes are compared with the file's own length before anything is allocated. Whether the manifest
and its members fit together is the business of `verifying`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from persist_cache import fs
from persist_cache.blobs.folder import SUFFIX
from persist_cache.bundle.container import (
    BLOCK,
    CHECKSUM,
    END,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    VERSION,
    MalformedError,
    Manifest,
    checksum_text,
    claimed_version,
    member_header,
    member_size,
    padding,
    parse_manifest,
)
from persist_cache.bundle.verifying import Progress, Verified
from persist_cache.errors import CorruptBlobError, StoreAccessError, StoreFormatError
from persist_cache.portable.entries import Member


class Bundle:
    """A verified bundle; use as a context manager.

    Attributes:
        path: The file.
        nbytes: Its length.
        created: UTC seconds.
        writer: Program and version that made it.
        entries: The shortest prefix first, so that one follows those that it continues.
    """

    def __init__(
        self, path: Path, progress: Progress | None = None, *, fd: int | None = None
    ) -> None:
        """Open the bundle at `path` and verify all of it.

        Args:
            path: The file, or what it is called where it has no name.
            progress: Called with bytes done and bytes in total.
            fd: The file, open for reading; it stays open.

        Raises:
            StoreAccessError: It cannot be read.
            StoreFormatError: It was written by an unknown version.
            CorruptBlobError: It is no bundle, or not what was written.
        """
        self.path = path
        # A pipe would have us wait for ever.
        with self._errors():
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(path, flags) if fd is None else os.dup(fd)
        try:
            with self._errors():
                status = os.fstat(self._fd)
                if not stat.S_ISREG(status.st_mode):
                    raise StoreAccessError(f"{path} is not a file that `export` wrote.")
                self.nbytes = status.st_size
                manifest, offset = self._read_manifest()
                self.created, self.writer = manifest.created, manifest.writer
                members = self._read_members(manifest, offset)
                self.entries = Verified(manifest, members, self.nbytes, progress).entries
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except MalformedError as error:
            raise CorruptBlobError(self.path, str(error)) from None
        except CorruptBlobError as error:
            raise CorruptBlobError(self.path, f"member {error}") from error
        except OSError as error:
            raise StoreAccessError(f"{self.path} cannot be read ({error.strerror}).") from error

    def _read_manifest(self) -> tuple[Manifest, int]:
        """The manifest, and where the members behind it begin."""
        try:
            size = member_size(self._bytes(0, BLOCK), MANIFEST)
        except MalformedError:
            raise MalformedError("it is not a bundle that `export` wrote") from None
        if size > MAX_MANIFEST_BYTES:
            raise MalformedError(f"its manifest has {size} bytes")
        raw = self._bytes(BLOCK, size)
        version = claimed_version(raw)
        if version is not None and version != VERSION:
            raise StoreFormatError(
                f"{self.path.name} is a bundle of version {version}; this version of "
                f"persist-cache reads version {VERSION} only."
            )
        offset = BLOCK + size
        offset = self._expect(offset, padding(size), "its manifest is not filled up")
        checksum = checksum_text(raw)
        header = member_header(CHECKSUM, len(checksum))
        offset = self._expect(offset, header, f"{CHECKSUM} does not follow its manifest")
        offset = self._expect(offset, checksum, "the checksum of its manifest differs")
        offset = self._expect(offset, padding(len(checksum)), f"{CHECKSUM} is not filled up")
        return parse_manifest(raw), offset

    def _read_members(self, manifest: Manifest, offset: int) -> dict[str, Member]:
        """The blobs by name; their headers are verified, their tensors are not."""
        if len({blob.name for blob in manifest.blobs}) != len(manifest.blobs):
            raise MalformedError("its manifest names a member twice")
        end = offset + len(END)
        end += sum(BLOCK + blob.nbytes + len(padding(blob.nbytes)) for blob in manifest.blobs)
        if end != self.nbytes:
            raise MalformedError(f"it has {self.nbytes} bytes instead of {end}")
        members = {}
        for blob in manifest.blobs:
            name = blob.name + SUFFIX
            header = member_header(name, blob.nbytes)
            offset = self._expect(offset, header, f"member {name} is not where it should be")
            members[blob.name] = Member(
                self.path, blob.name, self._fd, offset, blob.nbytes, bytes.fromhex(blob.digest)
            )
            offset += blob.nbytes
            offset = self._expect(offset, padding(blob.nbytes), f"member {name} is not filled up")
        self._expect(offset, END, "it does not end behind its last member")
        return members

    def _expect(self, offset: int, content: bytes, problem: str) -> int:
        """Compare what is at `offset`; returns the position behind it."""
        if self._bytes(offset, len(content)) != content:
            raise MalformedError(problem)
        return offset + len(content)

    def _bytes(self, offset: int, size: int) -> bytes:
        if offset + size > self.nbytes:
            raise MalformedError("it is truncated")
        buffer = bytearray(size)
        if fs.read_into(self._fd, offset, [memoryview(buffer)]) != size:
            raise MalformedError("it is truncated")
        return bytes(buffer)
