"""Writing a blob: once, under a temporary name, made durable, renamed; never changed afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import xxhash
from msgspec import Struct

from persist_cache import fs
from persist_cache.blobs.folder import BlobFolder, is_same_file, new_name
from persist_cache.blobs.header import BlobHeader, header_bytes
from persist_cache.codec import Tensor
from persist_cache.system import forked

_WRITTEN_AT_ONCE = 8 << 20


class Written(Struct, frozen=True):
    """A published file: what its index record must say."""

    name: str
    nbytes: int
    disk_bytes: int
    digest: bytes


class BlobWriter:
    """One blob on its way to the disk; use as a context manager.

    The file exists from construction on, under a temporary name and with its lock held, so that
    its reservation can be told from a dead one. Leaving the context gives the lock back: do that
    only after the record is committed. A blob not published by then is removed.
    """

    def __init__(self, folder: BlobFolder) -> None:
        self._folder = folder
        self._done = False
        self._fd = -1
        forked.register(self)
        while True:
            self.name = new_name()
            self.path = folder.temporary_path(self.name)
            self._fd = fs.create(self.path)
            # A sweep may have seen the file before its lock was taken; it is lost then.
            try:
                if fs.try_lock(self._fd) and is_same_file(self.path, self._fd):
                    return
                self.discard()
            except BaseException:
                self.__exit__()
                raise
            self._close()

    def let_go(self) -> None:
        """In a forked child: the file, and its lock, are the parent's."""
        self._done = True
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def fileno(self) -> int:
        """The descriptor of the file, for reading and writing."""
        return self._fd

    @property
    def is_gone(self) -> bool:
        """Whether the file was removed again."""
        return not self.path.exists()

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.discard()
        finally:
            self._close()

    def discard(self) -> None:
        """Remove the file, unless `keep` was called."""
        if not self._done:
            with contextlib.suppress(OSError):
                fs.unlink(self.path)

    def write(self, header: BlobHeader, tensors: Sequence[Tensor]) -> Written:
        """Write the whole file and make its bytes durable.

        Raises:
            OSError: The disk is full or failed; leaving the context removes the file.
        """
        head = header_bytes(header, tensors)
        fs.allocate(self._fd, len(head) + sum(tensor.nbytes for tensor in tensors))
        nbytes = sum(fs.write_all(self._fd, pieces) for pieces in _batches(head, tensors))
        fs.sync(self._fd)
        digest = xxhash.xxh3_128_digest(head)
        return Written(self.name, nbytes, fs.disk_bytes(self.path), digest)

    def publish(self) -> None:
        """Give the file its final name, durably. The lock stays held."""
        target = self._folder.path(self.name)
        for attempts_left in range(9, -1, -1):
            try:
                self._folder.ensure_parent(target)
                fs.rename(self.path, target)
                break
            except FileNotFoundError:
                # `gc` of another process may have found the folder empty meanwhile.
                if not attempts_left or not self.path.exists():
                    raise
        self.path = target
        fs.sync_folder(target.parent)

    def keep(self) -> None:
        """Say that a record now names the file: it stays when the context is left."""
        self._done = True


def _batches(head: bytes, tensors: Sequence[Tensor]) -> Iterator[list[memoryview]]:
    """The pieces of a file, no more at once than `_WRITTEN_AT_ONCE`, or one tensor.

    Those of a tensor that is on disk are read when they are looked at.
    """
    pieces, held = [memoryview(head)], len(head)
    for tensor in tensors:
        if held + tensor.nbytes > _WRITTEN_AT_ONCE:
            yield pieces
            pieces, held = [], 0
        pieces.extend(tensor.pieces)
        held += tensor.nbytes
    yield pieces
