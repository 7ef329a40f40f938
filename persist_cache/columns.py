"""All records of one kind in columns: for checks of everything, many times faster than objects."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct, unpack
from typing import Any, NamedTuple

from persist_cache.records import (
    BLOB,
    EDGE,
    check_kinds,
    check_tiers,
    check_versions,
    join,
    unpack_numbers,
)

_ENTRY_PLACE = Struct("<BB2xII8xQ8xQ16xd")
"""Of an entry's record the version, and what `EntryColumns` has."""
Raw = Sequence[bytes | memoryview]
Numbers = tuple[int, ...]


class EdgeColumns(NamedTuple):
    """Every `Edge`, with the key it is filed under: the node above it and its first token."""

    keys: tuple[bytes, ...]
    parents: Numbers
    tokens: list[bytes]
    blobs: Numbers
    nodes: Numbers
    entries: Numbers
    first_rows: Numbers
    rows: Numbers

    @classmethod
    def unpack(cls, keys: Raw, values: Raw) -> EdgeColumns:
        _, _, *columns = _fields(EDGE, values)
        names = tuple(map(bytes, keys))
        parents = unpack_numbers([key[:8] for key in names])
        return cls(names, parents, [key[8:] for key in names], *columns)


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
        kinds, _, *rest = _fields(BLOB, values)
        check_kinds(kinds)
        *numbers, _, names, digests = rest
        return cls._make((unpack_numbers(keys), kinds, *numbers, names, digests))


class EntryColumns(NamedTuple):
    """What places an `EntryRecord`, with its number; the rest of it is read, but not kept."""

    numbers: Numbers
    tiers: Numbers
    num_tokens: Numbers
    checkpoints: Numbers
    nodes: Numbers
    last_uses_us: Numbers
    expires: tuple[float, ...]

    @classmethod
    def unpack(cls, keys: Raw, values: Raw) -> EntryColumns:
        size = _ENTRY_PLACE.size
        columns = _fields(_ENTRY_PLACE, [value[:size] for value in values])
        check_tiers(columns[0])
        for value in values:
            if len(value) > size:
                bytes(value[size:]).decode()
        return cls._make((unpack_numbers(keys), *columns))


def unpack_keys(layout: Struct, keys: Raw) -> Sequence[Numbers]:
    """The numbers that each of many keys consists of, the first of all, then the second …"""
    # All at once: a tuple for every record would take twice the time.
    flat = unpack(layout.format[0] + layout.format[1:] * len(keys), join(layout, keys))
    width = len(layout.unpack(bytes(layout.size)))
    return [flat[column::width] for column in range(width)]


def _fields(layout: Struct, values: Raw) -> Sequence[tuple[Any, ...]]:
    """Each field of many records; the first one, the version, is checked and left out."""
    versions, *columns = unpack_keys(layout, values)
    check_versions(versions)
    return columns
