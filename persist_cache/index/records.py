"""The binary records of the index: what each sub-database holds, byte for byte.

Fixed little-endian layouts that begin with a version byte; keys are big-endian, so that LMDB sorts
them as numbers. `docs/format.md` has the tables. Nothing here touches LMDB.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import msgspec
import xxhash

from persist_cache.entry import Tier
from persist_cache.errors import StoreFormatError
from persist_cache.fingerprint.value import CACHE_SALT

RECORD_VERSION = 1
NO_ENTRY = 0
NO_BLOB = 0
MAX_BLOB = (1 << 32) - 1
MAX_HITS = (1 << 32) - 1
MAX_COUNTER = (1 << 63) - 1
LAST_DATE_S = 253_402_300_799.0
"""The last second of the year 9999, as far as a calendar goes."""
END_OF_TIME_S = 1e12
"""No date is as late, in UTC seconds: microseconds up to it fit into 64 bits."""

NUMBER = struct.Struct(">Q")
EDGE_KEY = struct.Struct(">Q8s")
RECENCY_KEY = struct.Struct(">BQQ")
EXPIRY_KEY = struct.Struct(">QQ")
EDGE = struct.Struct("<BBHIQQII")
BLOB = struct.Struct("<BBHIIIQQd16s16s")
ENTRY = struct.Struct("<BBHIIIIQQQddd")
_TIERS = {int(tier): tier for tier in Tier}
"""Enums by number: calling one takes longer than unpacking a whole record."""
_SIZED = struct.Struct("<BxxxxxxxQd")
_COUNTER = struct.Struct("<q")
COUNTER_BYTES = _COUNTER.size
UNREADABLE = (struct.error, UnicodeDecodeError, msgspec.MsgspecError)
"""What unpacking a damaged record raises."""


class BlobKind(enum.IntEnum):
    RUN = 0
    CHECKPOINT = 1


_KINDS = {int(kind): kind for kind in BlobKind}


class Edge(NamedTuple):
    """A stretch of tokens below a node: rows of one blob.

    Attributes:
        complete: The rows are those of every layer; no checkpoint is needed within them.
        blob: Number of the blob.
        node: The node at the lower end.
        entry: Entry that ends there, or `NO_ENTRY`.
        first_row: First row of the blob, counted in tokens from the blob's start.
        rows: Tokens on the edge.
    """

    complete: bool
    blob: int
    node: int
    entry: int
    first_row: int
    rows: int

    def pack(self) -> bytes:
        return EDGE.pack(
            RECORD_VERSION,
            self.complete,
            0,
            self.blob,
            self.node,
            self.entry,
            self.first_row,
            self.rows,
        )

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> Edge:
        version, flags, _, blob, node, entry, first_row, rows = EDGE.unpack(raw)
        _check_version(version)
        return cls._make((bool(flags & 1), blob, node, entry, first_row, rows))

    @classmethod
    def unpack_all(cls, raws: Sequence[bytes | memoryview]) -> list[Edge]:
        """Like `unpack` of each, in a third of the time."""
        new = tuple.__new__
        return [
            new(cls, (flags & 1 == 1, blob, node, entry, first_row, rows))
            for _, flags, _, blob, node, entry, first_row, rows in _unpack_records(EDGE, raws)
        ]


class BlobRecord(NamedTuple):
    """A published file.

    Attributes:
        kind: Run or checkpoint.
        references: Edges, or entries for a checkpoint, that use it; it goes with the last one.
        num_tokens: Tokens of the run; 0 for a checkpoint.
        start: Position of its first token.
        nbytes: Length of the file.
        disk_bytes: What it occupies, as `du` counts.
        created: UTC seconds.
        name: 16 bytes; in hex the file's name.
        digest: xxh3-128 of its header bytes.
    """

    kind: BlobKind
    references: int
    num_tokens: int
    start: int
    nbytes: int
    disk_bytes: int
    created: float
    name: bytes
    digest: bytes

    def pack(self) -> bytes:
        return BLOB.pack(
            RECORD_VERSION,
            self.kind,
            0,
            self.references,
            self.num_tokens,
            self.start,
            self.nbytes,
            self.disk_bytes,
            self.created,
            self.name,
            self.digest,
        )

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> BlobRecord:
        version, kind, _, *rest = BLOB.unpack(raw)
        _check_version(version)
        return cls._make((_kind(kind), *rest))

    @classmethod
    def unpack_all(cls, raws: Sequence[bytes | memoryview]) -> list[BlobRecord]:
        """Like `unpack` of each, in half the time."""
        new = tuple.__new__
        return [new(cls, (_kind(kind), *rest)) for _, kind, _, *rest in _unpack_records(BLOB, raws)]


class EntryRecord(NamedTuple):
    """One stored prefix that can be resumed.

    Attributes:
        tier: Role class.
        pinned: Exempt from eviction.
        num_tokens: Length of the prefix: the depth of its node.
        checkpoint: Blob with the state at its end, or `NO_BLOB` when rows suffice.
        namespace: Number of its namespace.
        hits: Requests that it served, from disk or out of memory.
        node: Its node.
        created_us, last_use_us: UTC microseconds.
        prefill_s: Seconds that computing the whole prefix took, 0 when nobody measured.
        saved_s: Seconds of prefill its hits saved, less what reading took.
        expires: UTC seconds, 0 for never.
        label: The user's name for it.
    """

    tier: Tier
    pinned: bool
    num_tokens: int
    checkpoint: int
    namespace: int
    hits: int
    node: int
    created_us: int
    last_use_us: int
    prefill_s: float
    saved_s: float
    expires: float
    label: str

    @classmethod
    def fresh(cls, tier: Tier, num_tokens: int, created: float) -> EntryRecord:
        """An entry nobody has used yet; `node` and `namespace` are still to be set."""
        created_us = int(created * 1e6)
        return cls(
            tier=tier,
            pinned=False,
            num_tokens=num_tokens,
            checkpoint=NO_BLOB,
            namespace=0,
            hits=0,
            node=0,
            created_us=created_us,
            last_use_us=created_us,
            prefill_s=0.0,
            saved_s=0.0,
            expires=0.0,
            label="",
        )

    def pack(self) -> bytes:
        fixed = ENTRY.pack(
            RECORD_VERSION,
            self.tier,
            self.pinned,
            self.num_tokens,
            self.checkpoint,
            self.namespace,
            self.hits,
            self.node,
            self.created_us,
            self.last_use_us,
            self.prefill_s,
            self.saved_s,
            self.expires,
        )
        return fixed + self.label.encode()

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> EntryRecord:
        version, tier, pinned, *rest = ENTRY.unpack_from(raw)
        _check_version(version)
        label = bytes(raw[ENTRY.size :]).decode() if len(raw) > ENTRY.size else ""
        return cls._make(
            (
                _tier(tier),
                bool(pinned),
                *rest,
                label,
            )
        )

    @classmethod
    def unpack_all(cls, raws: Sequence[bytes | memoryview]) -> list[EntryRecord]:
        """Like `unpack` of each, in a third of the time."""
        new, size = tuple.__new__, ENTRY.size
        fixed = _unpack_records(ENTRY, [raw[:size] for raw in raws])
        labels = [bytes(raw[size:]).decode() if len(raw) > size else "" for raw in raws]
        # Letters, because a list for the rest of the fields would double the time.
        return [
            new(cls, (_tier(tier), pinned != 0, a, b, c, d, e, f, g, h, i, j, label))
            for (_, tier, pinned, a, b, c, d, e, f, g, h, i, j), label in zip(
                fixed, labels, strict=True
            )
        ]


class NamespaceRecord(msgspec.Struct, frozen=True):
    """One model identity together with one cache layout: the root of a tree.

    Attributes:
        number: Short name used by entries.
        root: Root node.
        identity: JSON of the readable identity fields.
        layout: JSON of the cache classes and their geometry.
        created: UTC seconds.
    """

    number: int
    root: int
    identity: str
    layout: str
    created: float

    def pack(self) -> bytes:
        return bytes([RECORD_VERSION]) + msgspec.msgpack.encode(self)

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> NamespaceRecord:
        _check_version(raw[0] if len(raw) else -1)
        return msgspec.msgpack.decode(raw[1:], type=cls)


class SizedRecord(NamedTuple):
    """Bytes on disk that no entry owns: reserved, in the trash, or quarantined.

    Attributes:
        nbytes: Bytes as `du` counts, or expected.
        since: UTC seconds.
        note: Why, in words.
    """

    nbytes: int
    since: float
    note: str = ""

    def pack(self) -> bytes:
        return _SIZED.pack(RECORD_VERSION, self.nbytes, self.since) + self.note.encode()

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> SizedRecord:
        version, nbytes, since = _SIZED.unpack_from(raw)
        _check_version(version)
        return cls(nbytes, since, bytes(raw[_SIZED.size :]).decode())


def pack_number(number: int) -> bytes:
    """A node, blob or entry number as a key."""
    return NUMBER.pack(number)


def unpack_number(raw: bytes | memoryview) -> int:
    return int(NUMBER.unpack(raw)[0])


def pack_counter(value: int) -> bytes:
    return _COUNTER.pack(value)


def unpack_counter(raw: bytes | memoryview) -> int:
    return int(_COUNTER.unpack(raw)[0])


def edge_key(parent: int, first_token: bytes) -> bytes:
    """Key of the edge below `parent` that begins with the packed token `first_token`."""
    return NUMBER.pack(parent) + first_token


def edge_parent(key: bytes) -> int:
    return int.from_bytes(key[:8], "big")


def expiry_key(expires: float, entry: int) -> bytes:
    """Sorts by date: the first key is the entry that expires next.

    What is no date, because a record is damaged, becomes the beginning or the end of time.
    """
    return EXPIRY_KEY.pack(int(min(max(0.0, expires), END_OF_TIME_S) * 1e6), entry)


def recency_key(tier: Tier, last_use_us: int, entry: int) -> bytes:
    """Sorts by tier, then by last use: the first key of a tier is its next victim."""
    return RECENCY_KEY.pack(tier, last_use_us, entry)


def namespace_key(fingerprint: bytes, layout: str) -> bytes:
    """Fingerprint (32 bytes), then the digest of the layout: one prefix lists all layouts."""
    return fingerprint + xxhash.xxh3_128_digest(layout.encode())


FAMILY_BYTES = 16
_NO_SALT = bytes(FAMILY_BYTES)


def family(identity: str) -> bytes:
    """What only the namespaces have in common that may know of each other: the salt of requests.

    Args:
        identity: JSON of the readable identity.
    """
    try:
        fields = msgspec.json.decode(identity, type=dict[str, dict[str, str]]).get("fields", {})
    except msgspec.MsgspecError:
        return _NO_SALT
    return family_of(fields.get(CACHE_SALT, ""))


def family_of(salt: str) -> bytes:
    """The same of the field `cache_salt`, "" where there is none."""
    return xxhash.xxh3_128_digest(salt.encode()) if salt else _NO_SALT


def entry_number(namespace: bytes, packed: bytes | memoryview) -> int:
    """Number of the entry for these tokens: the same in every store, and after a rebuild."""
    digest = xxhash.xxh3_64(namespace)
    digest.update(packed)
    return int(digest.intdigest()) or 1


def entry_id(number: int) -> str:
    return number.to_bytes(8, "big").hex()


def entry_ids(numbers: Sequence[int]) -> list[str]:
    """The id of each of many entries."""
    digits = struct.pack(f">{len(numbers)}Q", *numbers).hex()
    return [digits[start : start + 16] for start in range(0, len(digits), 16)]


def check_kinds(kinds: Iterable[int]) -> None:
    """Refuse what is no `BlobKind`."""
    for number in set(kinds):
        _kind(number)


def tiers_of(numbers: Iterable[int]) -> list[Tier]:
    """The `Tier` of each number, all of which `check_tiers` has seen."""
    return [_TIERS[number] for number in numbers]


def check_tiers(tiers: Iterable[int]) -> None:
    """Refuse what is no `Tier`."""
    for number in set(tiers):
        _tier(number)


def _kind(number: int) -> BlobKind:
    return _KINDS[number] if number in _KINDS else _unknown(f"blob kind {number}")


def _tier(number: int) -> Tier:
    return _TIERS[number] if number in _TIERS else _unknown(f"tier {number}")


def _unknown(what: str) -> NoReturn:
    raise StoreFormatError(f"The index holds a record with the unknown {what}.")


def _unpack_records(
    layout: struct.Struct, raws: Collection[bytes | memoryview]
) -> Iterator[tuple[Any, ...]]:
    """The fields of many records of one kind, as `layout` has them: the version comes first."""
    check_lengths(layout, raws)
    joined = b"".join(raws)
    check_versions(joined[:: layout.size])
    return layout.iter_unpack(joined)


def check_lengths(layout: struct.Struct, raws: Iterable[bytes | memoryview]) -> None:
    """Refuse records of another length than `layout` has."""
    for size in set(map(len, raws)) - {layout.size}:
        raise struct.error(f"it has {size} bytes instead of {layout.size}")


def check_versions(versions: Iterable[int]) -> None:
    """Refuse records that another version of persist-cache wrote."""
    for version in set(versions):
        _check_version(version)


def _check_version(version: int) -> None:
    if version != RECORD_VERSION:
        raise StoreFormatError(
            f"The index holds a record of version {version}; this version of persist-cache "
            f"knows version {RECORD_VERSION} only."
        )
