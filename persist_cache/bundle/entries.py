"""The runs of a bundle, and the paths that they form."""

from __future__ import annotations

from dataclasses import dataclass

from persist_cache.blobs.header import BlobHeader
from persist_cache.portable.entries import Member
from persist_cache.tokens import TOKEN_BYTES


@dataclass(slots=True)
class BundledRun:
    """A run of the bundle, and what is known of the path above it.

    Attributes:
        packed: Its own tokens.
        parent: The run before it, or None.
    """

    reader: Member
    packed: bytes
    parent: BundledRun | None
    used: bool = False

    @property
    def header(self) -> BlobHeader:
        return self.reader.header

    def path(self, end: int) -> bytes:
        """Packed tokens from the beginning up to `end`, which lies within this run."""
        parts = []
        run: BundledRun | None = self
        while run is not None:
            parts.append(run.packed[: (end - run.header.start) * TOKEN_BYTES])
            end, run = run.header.start, run.parent
        return b"".join(reversed(parts))
