"""Pulling blobs: into room that the store set aside, verified, then through the store's own put.

Bytes are written as they come, a few MiB at a time, and none is used before the digest of its
object was compared with the manifest's. Whatever ends a pull leaves the store as it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

from persist_cache import fs
from persist_cache.blobs.header import TOKENS, prefix_digest
from persist_cache.blobs.layout import Shapes
from persist_cache.entry import Tier
from persist_cache.errors import CorruptBlobError, StoreFormatError
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.index.records import entry_id, entry_number, namespace_key
from persist_cache.portable.checking import check_blob
from persist_cache.portable.entries import Member, PortableEntry, Stretch
from persist_cache.remote.keys import Keys
from persist_cache.remote.manifest import MAX_TOKENS, BlobSection, Manifest, Part, RefusedError
from persist_cache.remote.transport import Transport
from persist_cache.store.scratch import Scratch
from persist_cache.tokens import TOKEN_BYTES

_AT_ONCE = 4
_LONGEST_S = 120.0
"""A pull without anything to be compared with is given up after so long."""
_JUDGED_AFTER_S = 0.25
_JUDGED_AFTER_SHARE = 8
"""The first bytes say little of the speed: part of the time that it may take is waited for."""


class GoneError(Exception):
    """An object of a published entry is not there any more."""


class TooSlowError(Exception):
    """Computing the tokens would take less time than is left."""


class Watch:
    """Follows a pull, and ends it when computing would be faster.

    Thread safety: the counts are changed on one thread and may be read from others.
    """

    def __init__(
        self, nbytes: int, worth_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin now.

        Args:
            nbytes: That are to come.
            worth_s: What computing takes instead, 0 when nobody knows.
            clock: Seconds.
        """
        self._nbytes = nbytes
        self._worth_s = worth_s
        self._clock = clock
        self._began = clock()
        self.done = 0

    def begin(self) -> None:
        """Begin once more: nothing was asked for yet."""
        self._began = self._clock()

    @property
    def seconds(self) -> float:
        return self._clock() - self._began

    @property
    def bytes_per_s(self) -> float:
        """The speed so far; 0 for too little to tell."""
        return self.done / self.seconds if self.done and self.seconds > 0 else 0.0

    def check(self) -> None:
        """See whether it is still worth while.

        Raises:
            TooSlowError: It is not.
        """
        spent = self.seconds
        if not self._worth_s:
            if spent > _LONGEST_S:
                raise TooSlowError
            return
        expected = spent
        if spent > max(_JUDGED_AFTER_S, self._worth_s / _JUDGED_AFTER_SHARE) and self.done:
            expected = spent * self._nbytes / self.done
        if expected > self._worth_s:
            raise TooSlowError


class Wanted(Struct, frozen=True):
    """The part of an entry that is to be pulled.

    Attributes:
        manifest: Of the entry.
        packed: The tokens that are to be stored: all of its own, or the first of them.
        have: Leading tokens whose rows the store has.
    """

    manifest: Manifest
    packed: bytes
    have: int

    @property
    def num_tokens(self) -> int:
        return len(self.packed) // TOKEN_BYTES

    @property
    def runs(self) -> list[BlobSection]:
        blobs = self.manifest.blobs
        return [one for one in blobs if one.end > self.have and one.start < self.num_tokens]

    @property
    def state(self) -> BlobSection | None:
        """The state, where it is needed."""
        return None if self.manifest.complete else self.manifest.state

    @property
    def blobs(self) -> list[BlobSection]:
        return [*self.runs, *([self.state] if self.state is not None else [])]

    @property
    def nbytes(self) -> int:
        return sum(blob.nbytes for blob in self.blobs)

    @property
    def namespace(self) -> bytes:
        """Key of its model and layout in an index."""
        return namespace_key(Fingerprint(self.manifest.fields).digest, self.manifest.layout)


async def pull(transport: Transport, keys: Keys, wanted: Wanted, fd: int, watch: Watch) -> None:
    """Write the blobs one after the other into a file, each object verified.

    Args:
        transport: Of the remote.
        keys: Make the names.
        wanted: What to pull.
        fd: The file, long enough.
        watch: Told of what came.

    Raises:
        GoneError: An object is missing.
        RefusedError: One has other bytes than was published.
        TransportError: A request failed.
        OSError: The disk failed.
    """
    todo = list(_places(wanted.blobs))
    todo.reverse()

    async def work() -> None:
        while todo:
            offset, part = todo.pop()
            await _pull_part(transport, keys, part, fd, offset, watch)

    tasks = [asyncio.create_task(work()) for _ in range(min(_AT_ONCE, len(todo)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        # No task may go on writing to the file once this has ended.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _places(blobs: Sequence[BlobSection]) -> Iterator[tuple[int, Part]]:
    offset = 0
    for blob in blobs:
        for part in blob.parts:
            yield offset, part
            offset += part.nbytes


async def _pull_part(
    transport: Transport, keys: Keys, part: Part, fd: int, offset: int, watch: Watch
) -> None:
    digest = hashlib.blake2b(digest_size=32)
    received = 0
    pieces = transport.pieces(keys.blob_name(part.digest))
    try:
        async for piece in pieces:
            if received + len(piece) > part.nbytes:
                raise RefusedError("length", "an object is longer than its manifest says")
            digest.update(piece)
            fs.write_at(fd, offset + received, piece)
            received += len(piece)
            watch.done += len(piece)
            watch.check()
    except FileNotFoundError:
        raise GoneError from None
    finally:
        await pieces.aclose()
    if received != part.nbytes:
        raise RefusedError("length", "an object is shorter than its manifest says")
    if digest.digest() != part.digest:
        raise RefusedError("digest", "an object has other bytes than its manifest says")


def pulled_entry(wanted: Wanted, scratch: Scratch, fingerprint: Fingerprint) -> PortableEntry:
    """What was pulled, as a source for the store's put.

    Args:
        wanted: What was pulled.
        scratch: Where to.
        fingerprint: Identity of the model here.

    Raises:
        RefusedError: The blobs are not those of the entry.
    """
    try:
        return _entry(wanted, scratch, fingerprint)
    except (CorruptBlobError, StoreFormatError) as error:
        raise RefusedError("blob", f"a blob cannot be used ({error})") from None
    except ValueError as error:
        raise RefusedError("blob", f"its blobs cannot be used ({error})") from None


def _entry(wanted: Wanted, scratch: Scratch, fingerprint: Fingerprint) -> PortableEntry:
    manifest = wanted.manifest
    shapes = Shapes(manifest.layout)
    stretches, state, offset = [], None, 0
    for section in wanted.blobs:
        blob = Member(scratch.path, f"{section.start}", scratch.fd, offset, section.nbytes, None)
        offset += section.nbytes
        check_blob(blob, shapes, MAX_TOKENS)
        _check_place(blob, section, wanted, fingerprint)
        if section.start == section.end:
            state = blob
        else:
            end = min(section.end, wanted.num_tokens)
            stretches.append(Stretch(blob, section.start, end))
    if state is not None:
        shapes.check_entry([one.reader.header for one in stretches], state.header)
    elif not all(one.reader.header.complete for one in stretches):
        raise RefusedError("blob", "it lacks rows that it is said to have")
    number = entry_number(wanted.namespace, wanted.packed)
    is_whole = wanted.num_tokens == manifest.num_tokens
    return PortableEntry(
        id=entry_id(number),
        fingerprint=fingerprint,
        layout=manifest.layout,
        tier=Tier.parse(manifest.tier) if is_whole else Tier.ASSISTANT,
        packed=wanted.packed,
        created=manifest.created,
        prefill_s=manifest.prefill_s * wanted.num_tokens / manifest.num_tokens,
        label="",
        stretches=tuple(stretches),
        state=state,
    )


def _check_place(
    blob: Member, section: BlobSection, wanted: Wanted, fingerprint: Fingerprint
) -> None:
    header = blob.header
    if header.fingerprint != fingerprint.hex or header.layout != wanted.manifest.layout:
        raise RefusedError("blob", "a blob is of another model")
    if (header.start, header.end) != (section.start, section.end):
        raise RefusedError("blob", "a blob is of another place")
    before = memoryview(wanted.packed)[: section.start * TOKEN_BYTES]
    if header.prefix != prefix_digest(before):
        raise RefusedError("blob", "a blob follows other tokens")
    if section.start < section.end:
        own = wanted.packed[section.start * TOKEN_BYTES : section.end * TOKEN_BYTES]
        if header.kind != "run" or not blob.read_bytes(TOKENS).startswith(own):
            raise RefusedError("blob", "a blob is of other tokens")
    elif header.kind != "checkpoint":
        raise RefusedError("blob", "a blob is no state")
