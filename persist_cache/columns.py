"""All records of one kind in columns: for checks of everything, many times faster than objects."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from struct import Struct
from typing import Any, NamedTuple

from persist_cache.records import (
    BLOB,
    EDGE,
    ENTRY,
    check_kinds,
    check_tiers,
    check_versions,
    join,
    unpack_numbers,
)

_EDGE_KEY = Struct(">Q8s")
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
        _, _, *columns = _fields(EDGE, values)
        parents, tokens = unpack_keys(_EDGE_KEY, keys)
        return cls._make((tuple(map(bytes, keys)), parents, tokens, *columns))


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
        tiers, pinned, *columns = _fields(ENTRY, [value[:size] for value in values])
        check_tiers(tiers)
        labels = [bytes(value[size:]).decode() if len(value) > size else "" for value in values]
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
