"""All records of one kind in columns: for checks of everything, many times faster than objects.

Records are put behind each other, so that a field of all of them is every n-th number of an array.
A column that nobody asks for is never made: most of the time goes into making its numbers.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

from persist_cache.index.records import (
    BLOB,
    EDGE,
    EDGE_KEY,
    ENTRY,
    NUMBER,
    check_kinds,
    check_lengths,
    check_tiers,
    check_versions,
)

Raw = Sequence[bytes | memoryview]
_FIELD = re.compile(r"\d*[a-zA-Z]")


class Packed:
    """Records of one layout behind each other.

    Each ends at a multiple of eight bytes. That puts every number of the layouts in `records`
    where an array of such numbers can have it.
    """

    def __init__(self, layout: struct.Struct, raws: Raw) -> None:
        """Put records together.

        Args:
            layout: What they consist of.
            raws: Their bytes.

        Raises:
            struct.error: One of them has another length.
        """
        check_lengths(layout, raws)
        gap = bytes(-layout.size % 8)
        self._layout = layout
        self._start = len(gap)
        self._size = len(gap) + layout.size
        self._raw = gap.join((b"", *raws)) if gap else b"".join(raws)

    def field(self, place: int) -> Sequence[Any]:
        """One field of every record; `place` counts the letters of the layout's format."""
        order, fields = self._layout.format[0], _FIELD.findall(self._layout.format)
        start = self._start + struct.calcsize(order + "".join(fields[:place]))
        code = fields[place]
        if code == "B":
            return self._raw[start :: self._size]
        if code.endswith("s"):
            behind = self._size - start - int(code[:-1])
            texts = struct.iter_unpack(f"{start}x{code}{behind}x", self._raw)
            return list(chain.from_iterable(texts))
        numbers = array(code, self._raw)
        if (order == ">") != (sys.byteorder == "big"):
            numbers.byteswap()
        return numbers[start // numbers.itemsize :: self._size // numbers.itemsize].tolist()


class _Column:
    """An attribute that is made when it is first asked for: one field of all records."""

    def __init__(self, records: str, place: int) -> None:
        self._records = records
        self._place = place
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, columns: _Columns, owner: type) -> Sequence[Any]:
        records: Packed = getattr(columns, self._records)
        found = columns.__dict__[self._name] = records.field(self._place)
        return found


def _key(place: int) -> Any:
    return _Column("_keys", place)


def _value(place: int) -> Any:
    return _Column("_values", place)


class _Columns:
    """All records of one kind.

    Raises:
        StoreFormatError: Another version of persist-cache wrote one.
        struct.error: One has another length than its layout.
    """

    def __init__(self, key: struct.Struct, keys: Raw, value: struct.Struct, values: Raw) -> None:
        self._keys = Packed(key, keys)
        self._values = Packed(value, values)
        check_versions(self._values.field(0))


class EdgeColumns(_Columns):
    """Every `Edge`, with the key it is filed under: the node above it and its first token.

    Attributes:
        keys: As they were given, so perhaps valid within a transaction only.
    """

    parents: Sequence[int] = _key(0)
    tokens: Sequence[bytes] = _key(1)
    flags: Sequence[int] = _value(1)
    blobs: Sequence[int] = _value(3)
    nodes: Sequence[int] = _value(4)
    entries: Sequence[int] = _value(5)
    first_rows: Sequence[int] = _value(6)
    rows: Sequence[int] = _value(7)

    def __init__(self, keys: Raw, values: Raw) -> None:
        super().__init__(EDGE_KEY, keys, EDGE, values)
        self.keys = keys


class BlobColumns(_Columns):
    """Every `BlobRecord`, with its number; a kind is its number, too."""

    numbers: Sequence[int] = _key(0)
    kinds: Sequence[int] = _value(1)
    references: Sequence[int] = _value(3)
    num_tokens: Sequence[int] = _value(4)
    starts: Sequence[int] = _value(5)
    nbytes: Sequence[int] = _value(6)
    disk_bytes: Sequence[int] = _value(7)
    names: Sequence[bytes] = _value(9)
    digests: Sequence[bytes] = _value(10)

    def __init__(self, keys: Raw, values: Raw) -> None:
        super().__init__(NUMBER, keys, BLOB, values)
        check_kinds(self.kinds)


class EntryColumns(_Columns):
    """Every `EntryRecord`, with its number; a tier is its number, too.

    Raises:
        UnicodeDecodeError: A label is no text.
    """

    numbers: Sequence[int] = _key(0)
    tiers: Sequence[int] = _value(1)
    pinned: Sequence[int] = _value(2)
    num_tokens: Sequence[int] = _value(3)
    checkpoints: Sequence[int] = _value(4)
    namespaces: Sequence[int] = _value(5)
    hits: Sequence[int] = _value(6)
    nodes: Sequence[int] = _value(7)
    created_us: Sequence[int] = _value(8)
    last_uses_us: Sequence[int] = _value(9)
    prefills_s: Sequence[float] = _value(10)
    saved_s: Sequence[float] = _value(11)
    expires: Sequence[float] = _value(12)

    def __init__(self, keys: Raw, values: Raw) -> None:
        size = ENTRY.size
        self.labels = [""] * len(values)
        if set(map(len, values)) - {size}:
            self.labels = [bytes(value[size:]).decode() for value in values]
            values = [value[:size] for value in values]
        super().__init__(NUMBER, keys, ENTRY, values)
        check_tiers(self.tiers)
