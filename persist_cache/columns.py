"""All records of one kind in columns: for checks of everything, many times faster than objects."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from struct import Struct
from typing import Any, NamedTuple

from persist_cache.records import (
    ENTRY,
    check_kinds,
    check_tiers,
    check_versions,
    join,
    unpack_numbers,
)

_EDGE_KEY = Struct(">Q8s")
_PARENT = Struct(">Q8x")
# As in `records`, but what is not asked for is passed over: to make a number takes its time.
_EDGE = Struct("<B3xIQQII")
_BLOB = Struct("<BB2xIIIQQ8x16s16s")
_BLOB_SIZE = Struct("<BB6xII8xQ40x")
_AT_ONCE = 256
"""Records that are unpacked by one format."""
Raw = Sequence[bytes | memoryview]
Numbers = tuple[int, ...]


class EdgeColumns(NamedTuple):
    """Every `Edge`, with the key it is filed under: the node above it and its first token."""

    keys: tuple[bytes, ...]
    parents: Numbers
    tokens: tuple[bytes, ...]
    blobs: Numbers
    nodes: Numbers
    entries: Numbers
    first_rows: Numbers
    rows: Numbers

    @classmethod
    def unpack(cls, keys: Raw, values: Raw) -> EdgeColumns:
        parents, tokens = unpack_keys(_EDGE_KEY, keys)
        return cls._make((tuple(map(bytes, keys)), parents, tokens, *_fields(_EDGE, values)))


class TreeColumns(NamedTuple):
    """What listing needs of every `Edge`: a part of `EdgeColumns`, in half of the time."""

    parents: Numbers
    blobs: Numbers
    nodes: Numbers
    entries: Numbers
    first_rows: Numbers
    rows: Numbers

    @classmethod
    def unpack(cls, keys: Raw, values: Raw) -> TreeColumns:
        return cls._make((*unpack_keys(_PARENT, keys), *_fields(_EDGE, values)))


class BlobColumns(NamedTuple):
    """Every `BlobRecord`, with its number."""

    numbers: Numbers
    kinds: Numbers
    references: Numbers
    num_tokens: Numbers
    starts: Numbers
    nbytes: Numbers
    disk_bytes: Numbers
    names: tuple[bytes, ...]
    digests: tuple[bytes, ...]

    @classmethod
    def unpack(cls, keys: Raw, values: Raw) -> BlobColumns:
        kinds, *rest = _fields(_BLOB, values)
        check_kinds(kinds)
        return cls._make((unpack_numbers(keys), kinds, *rest))


class SizeColumns(NamedTuple):
    """What listing needs of every `BlobRecord`: a part of `BlobColumns`, in half of the time."""

    numbers: Numbers
    num_tokens: Numbers
    starts: Numbers
    disk_bytes: Numbers

    @classmethod
    def unpack(cls, keys: Raw, values: Raw) -> SizeColumns:
        kinds, *rest = _fields(_BLOB_SIZE, values)
        check_kinds(kinds)
        return cls._make((unpack_numbers(keys), *rest))


class EntryColumns(NamedTuple):
    """Every `EntryRecord`, with its number; a tier is its number, too."""

    numbers: Numbers
    tiers: Numbers
    pinned: Numbers
    num_tokens: Numbers
    checkpoints: Numbers
    namespaces: Numbers
    hits: Numbers
    nodes: Numbers
    created_us: Numbers
    last_uses_us: Numbers
    prefills_s: tuple[float, ...]
    saved_s: tuple[float, ...]
    expires: tuple[float, ...]
    labels: list[str]

    @classmethod
    def unpack(cls, keys: Raw, values: Raw) -> EntryColumns:
        size = ENTRY.size
        labels = [""] * len(values)
        if set(map(len, values)) != {size}:
            labels = [bytes(value[size:]).decode() for value in values]
            values = [value[:size] for value in values]
        tiers, pinned, *columns = _fields(ENTRY, values)
        check_tiers(tiers)
        return cls._make((unpack_numbers(keys), tiers, pinned, *columns, labels))


def unpack_keys(layout: Struct, keys: Raw) -> Sequence[tuple[Any, ...]]:
    """What each of many keys consists of, the first part of all, then the second …"""
    # A tuple for every record would take twice the time; a format for all of them at once would
    # take longer to be understood than to be followed.
    raw = memoryview(join(layout, keys))
    many = Struct(layout.format[0] + layout.format[1:] * _AT_ONCE)
    whole = len(raw) - len(raw) % many.size
    rest = Struct(layout.format[0] + layout.format[1:] * ((len(raw) - whole) // layout.size))
    parts = [*many.iter_unpack(raw[:whole]), rest.unpack(raw[whole:])]
    flat = tuple(chain.from_iterable(parts))
    width = len(layout.unpack(bytes(layout.size)))
    return [flat[column::width] for column in range(width)]


def _fields(layout: Struct, values: Raw) -> Sequence[tuple[Any, ...]]:
    """Each field of many records; the first one, the version, is checked and left out."""
    versions, *columns = unpack_keys(layout, values)
    check_versions(versions)
    return columns
