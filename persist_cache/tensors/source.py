"""From a live cache to bytes: views of its buffers, taken once, that any thread may read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from persist_cache.blobs.layout import encode_layout
from persist_cache.codec import Payload, Tensor
from persist_cache.errors import UnsupportedCacheError
from persist_cache.tensors.layers import (
    DTYPES,
    RowKind,
    describe,
    leaves,
    require_kind,
)


class _Part(Struct, frozen=True):
    """The bytes of one buffer `(B, H, num_rows, D)`, of which the first `used` rows count."""

    data: memoryview
    num_rows: int
    used: int


class _Held(Struct, frozen=True):
    """One array's bytes; they stay as they are whatever the live cache does.

    Attributes:
        name: Of the array in its layer.
        dtype: safetensors name of its type.
        shape: Of its first buffer.
        parts: Its buffers; several only of an array of rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Sequence[_Part]

    @classmethod
    def of(cls, name: str, buffers: Sequence[tuple[Any, int]]) -> _Held:
        first, _ = buffers[0]
        parts = [
            _Part(_bytes_of(array), array.shape[-2] if used else 0, used) for array, used in buffers
        ]
        return cls(name, DTYPES[first.dtype], tuple(first.shape), parts)

    @property
    def nbytes(self) -> int:
        return sum(len(part.data) for part in self.parts)

    def whole(self, prefix: str) -> Tensor:
        """An array in one buffer, as it is."""
        (part,) = self.parts
        return Tensor(prefix + self.name, self.dtype, self.shape, [part.data] if part.data else [])

    def cut(self, prefix: str, first: int, last: int) -> Tensor:
        """Rows `[first, last)` of an array `(B, H, rows, D)`: a piece per head and buffer."""
        batch, heads, num_rows, dim = self.shape
        if len(self.parts) == 1 and (first, last) == (0, num_rows):
            return self.whole(prefix)
        cuts = list(self._cuts(first, last, batch * heads))
        pieces = [
            part.data[start + head * per_head : end + head * per_head]
            for head in range(batch * heads)
            for part, start, end, per_head in cuts
        ]
        return Tensor(prefix + self.name, self.dtype, (batch, heads, last - first, dim), pieces)

    def _cuts(self, first: int, last: int, heads: int) -> Iterator[tuple[_Part, int, int, int]]:
        """Per buffer: where the rows lie in it for the first head, and the bytes of a head."""
        begin = 0
        for part in self.parts:
            start, end = max(first - begin, 0), min(last - begin, part.used)
            begin += part.used
            if part.data and start < end:
                per_head = len(part.data) // heads
                per_row = per_head // part.num_rows
                yield part, start * per_row, end * per_row, per_head


def _bytes_of(array: Any) -> memoryview:
    # An array object is changed by `x[...] = y`, a copy of the object is not: the write then
    # goes to new memory. The view keeps the copy alive, and with it the bytes.
    view = memoryview(copy.copy(array))
    # A view without elements cannot be cast; one that is not contiguous must not be.
    return view.cast("B") if view.nbytes else memoryview(b"")


class _RowLayer(Struct, frozen=True):
    """A layer of which any run of tokens can be cut out."""

    prefix: str
    lag: int
    arrays: Sequence[_Held]

    def span(self, start: int, end: int) -> tuple[int, int]:
        return max(start - self.lag, 0), max(end - self.lag, 0)


class _StateLayer(Struct, frozen=True):
    """A layer that can be saved as it is now, or not at all."""

    place: str
    moving: dict[str, int]
    rows: tuple[int, int] | None
    arrays: Sequence[_Held]


class CacheSource:
    """The bytes of a cache at one moment, without a copy of them.

    As long as it lives, the live cache's next write to a buffer copies that buffer: hold it only
    for caches that do not go on decoding, or shortly.

    Thread safety: immutable. Reading it runs no MLX operation, so any thread may.

    Attributes:
        layout: Canonical JSON of classes and geometry; it stays the same for a whole
            conversation. Two caches can share runs exactly when their layouts are equal.
        num_tokens: Tokens the cache stands for.
        complete: Rows of every layer exist for all tokens: any position can be resumed.
        nbytes: Bytes of all buffers held, their unused rows included.
        checkpoint_nbytes: Bytes of `checkpoint()`.
    """

    def __init__(self, cache: Sequence[Any], num_tokens: int) -> None:
        self.layout = encode_layout(describe(cache, num_tokens))
        self.num_tokens = num_tokens
        self._rows: list[_RowLayer] = []
        self._states: list[_StateLayer] = []
        self.complete = True
        self.nbytes = 0
        for place, layer in leaves(cache):
            kind = require_kind(layer)
            held = [_Held.of(name, buffers) for name, buffers in kind.buffers(layer).items()]
            if not isinstance(kind, RowKind):
                self._states.append(_StateLayer(place, {}, None, held))
                self.complete = False
            elif held:
                has_rows = kind.has_rows(layer)
                if has_rows:
                    lag = num_tokens - layer.offset
                    self._rows.append(_RowLayer(f"layers.{place}.", lag, held))
                if not kind.always_rows:
                    rows, moving = kind.state_rows(layer), kind.moving(layer)
                    self._states.append(_StateLayer(place, moving, rows, held))
                self.complete &= has_rows
            self.nbytes += sum(array.nbytes for array in held)
        self._checkpoint = self._make_checkpoint()
        self.checkpoint_nbytes = self._checkpoint.nbytes if self._checkpoint else 0

    def rows(self, start: int, end: int) -> Payload:
        """The KV rows of tokens `[start, end)`, of all layers that have rows.

        Tensors are named `layers.<place>.keys` and so on, and shaped `(B, H, rows, D)`.
        """
        self._check(start, end)
        return Payload(
            [
                held.cut(layer.prefix, *layer.span(start, end))
                for layer in self._rows
                for held in layer.arrays
            ]
        )

    def checkpoint(self) -> Payload | None:
        """The state at `num_tokens` of all layers that may drop rows; None if there are none.

        A layer that has dropped none yet is in it, too: the rows that others stored for the same
        tokens may lack its own. Tensors are named `layers.<place>.state.<name>`.
        """
        return self._checkpoint

    def _make_checkpoint(self) -> Payload | None:
        if not self._states:
            return None
        tensors = []
        for layer in self._states:
            prefix = f"layers.{layer.place}.state."
            for held in layer.arrays:
                cut = layer.rows
                tensors.append(held.cut(prefix, *cut) if cut else held.whole(prefix))
        moving = {layer.place: layer.moving for layer in self._states}
        return Payload(tensors, msgspec.json.encode({"states": moving}).decode())

    def _check(self, start: int, end: int) -> None:
        if not 0 <= start <= end <= self.num_tokens:
            raise ValueError(f"tokens [{start}, {end}) are not within [0, {self.num_tokens})")


def source(cache: Sequence[Any], num_tokens: int) -> CacheSource:
    """Take the bytes of a prepared cache, without copying them.

    Args:
        cache: What `prepare` was given.
        num_tokens: What `prepare` returned.

    Raises:
        UnsupportedCacheError: A layer's class is not known, or one layer is used twice.
    """
    layers = [layer for _, layer in leaves(cache)]
    seen: set[int] = set()
    for layer in layers:
        if id(layer) in seen:
            raise UnsupportedCacheError(type(layer).__name__, "one layer is used twice")
        seen.add(id(layer))
    return CacheSource(cache, num_tokens)
