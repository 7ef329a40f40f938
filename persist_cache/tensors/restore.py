"""From blobs to a cache that is ready to decode.

Rows are read straight to where the cache wants them, in buffers that have room for the next
tokens: no array is joined, grown or copied afterwards, so many blobs cost what one costs. What is
checked is the memory that will be used, after it was read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from persist_cache.blobs.header import DTYPE_BYTES
from persist_cache.blobs.layout import Layout, RowGeometry, encode_layout, layout_leaves
from persist_cache.codec import Blob
from persist_cache.errors import CorruptBlobError, UnsupportedCacheError
from persist_cache.tensors import pool
from persist_cache.tensors._mlx import mlx_cache
from persist_cache.tensors.empty import empty
from persist_cache.tensors.layers import (
    DTYPES,
    ArraysKind,
    RowKind,
    decode_layout,
    describe,
    kind_named,
)

_TYPES = frozenset(DTYPES.values())
_ALONE_BYTES = 1 << 20
"""A tensor of this size is a task of its own. Smaller ones that lie side by side make up one."""
_GROUP_BYTES = (2 << 20, 8 << 20)
"""Least and most of what such a task reads. With each the threads take turns holding Python's
lock, so there should be few; but enough to keep all threads busy until the end."""


class _Detail(msgspec.Struct):
    """A checkpoint's note: which layers it holds, and the numbers that go with each."""

    states: dict[str, dict[str, int]]


class _Fill(NamedTuple):
    """The leading rows of one stored tensor, and where they go.

    Attributes:
        first: Row of the buffer where they begin.
        used: Rows that are wanted.
        total: Rows that are stored; all are read, because the checksum is over all.
    """

    reader: Blob
    name: str
    first: int
    used: int
    total: int


class _Buffer:
    """One array to be made: rows of one or more stored tensors, then zeros.

    Attributes:
        spec: safetensors name of its type, shape, bytes.
        fills: Its stored rows, end to end from row 0 on.
        array: The evaluated array, once the buffer is allocated.
    """

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        fills: Sequence[_Fill],
        *,
        heads: int = 1,
        num_rows: int = 1,
    ) -> None:
        """Plan an array that consists of `heads` blocks of `num_rows` rows of equal size."""
        self.spec = (dtype, shape, prod(shape) * DTYPE_BYTES[dtype])
        self.fills = fills
        self.array: Any = None
        self._heads = heads
        self._per_head = self.spec[2] // heads if heads else 0
        self._per_row = self._per_head // num_rows if num_rows else 0
        self._flat = memoryview(b"")

    def allocate(self, array: Any) -> None:
        """Take the memory to fill; what it holds is not defined."""
        self.array = array
        if array.nbytes:
            self._flat = memoryview(array).cast("B")

    def clear_rest(self) -> None:
        """Write zeros behind the rows."""
        filled = sum(fill.used for fill in self.fills) * self._per_row
        zeros = bytes(self._per_head - filled)
        if zeros:
            for start in range(0, len(self._flat), self._per_head):
                self._flat[start + filled : start + self._per_head] = zeros

    def places(self, fill: _Fill) -> list[memoryview]:
        """Per head: the rows' place, then scratch for those that are not wanted."""
        flat, per_row = self._flat, self._per_row
        if not flat:
            return []
        used, unused = fill.used * per_row, (fill.total - fill.used) * per_row
        first = fill.first * per_row
        starts = range(first, first + len(flat), self._per_head)
        if not unused:
            return [flat[start : start + used] for start in starts]
        scratch = memoryview(bytearray(unused * self._heads))
        places = []
        for head, start in enumerate(starts):
            places.append(flat[start : start + used])
            places.append(scratch[head * unused : (head + 1) * unused])
        return places

    def release(self) -> None:
        """Let go of the memory: while a view of it exists, MLX could not write in place."""
        self._flat = memoryview(b"")


class _Plan:
    """The layers to be built, and the buffers they need."""

    def __init__(
        self,
        runs: Sequence[tuple[Blob, int]],
        checkpoint: Blob | None,
        num_tokens: int,
    ) -> None:
        self.runs = runs
        self.checkpoint = checkpoint
        self.num_tokens = num_tokens
        self.path = self._check_path()
        self.layouts = self._check_layouts()
        self.states = self._check_checkpoint()
        self._spans: dict[int, list[tuple[int, int, int]]] = {}
        self.buffers: dict[str, dict[str, _Buffer]] = {}
        for place, layout in layout_leaves(self.layouts):
            if place in self.states:
                self.buffers[place] = self._state_buffers(place, layout)
            elif layout.rows:
                self.buffers[place] = self._row_buffers(place, layout)

    def _check_path(self) -> Path:
        """Check that the runs lie end to end; returns the blob to blame for what is no one's."""
        position = 0
        for reader, used in self.runs:
            header = reader.header
            if header.start != position or not 0 < used <= header.end - header.start:
                raise CorruptBlobError(
                    reader.path,
                    f"holds tokens [{header.start}, {header.end}), not {used} from {position} on",
                )
            position += used
        if self.runs and position != self.num_tokens:
            raise CorruptBlobError(
                self.runs[-1][0].path, f"ends at token {position} instead of {self.num_tokens}"
            )
        if self.checkpoint is not None:
            return self.checkpoint.path
        if not self.runs:
            raise ValueError("neither runs nor a checkpoint to restore from")
        return self.runs[-1][0].path

    def _check_layouts(self) -> list[Layout]:
        readers = [reader for reader, _ in self.runs]
        if self.checkpoint is not None:
            readers.append(self.checkpoint)
        text = readers[0].header.layout
        for reader in readers:
            if reader.header.layout != text:
                raise CorruptBlobError(reader.path, "its cache layout is not that of the others")
        try:
            return decode_layout(text)
        except (ValueError, msgspec.DecodeError) as error:
            raise CorruptBlobError(self.path, f"its cache layout is malformed ({error})") from None

    def _check_checkpoint(self) -> dict[str, dict[str, int]]:
        if self.checkpoint is None:
            return {}
        if self.checkpoint.header.end != self.num_tokens:
            raise CorruptBlobError(
                self.path, f"is the state at another token than {self.num_tokens}"
            )
        try:
            states = msgspec.json.decode(self.checkpoint.header.detail, type=_Detail).states
        except msgspec.DecodeError as error:
            raise CorruptBlobError(self.path, f"its detail is malformed ({error})") from None
        stateful = {
            place
            for place, layout in layout_leaves(self.layouts)
            if not kind_named(layout.class_name).always_rows
        }
        if not states.keys() <= stateful:
            raise CorruptBlobError(self.path, "holds the state of a layer that has none")
        return states

    def _row_buffers(self, place: str, layout: Layout) -> dict[str, _Buffer]:
        kind = kind_named(layout.class_name)
        assert isinstance(kind, RowKind)
        if not self.runs and self.num_tokens:
            raise CorruptBlobError(self.path, f"lacks the state of layer {place}")
        num_rows = max(self.num_tokens - layout.lag, 0)
        capacity = kind.buffer_rows(layout.scalars, num_rows)
        if layout.lag not in self._spans:
            self._spans[layout.lag] = self._rows_of_runs(layout.lag)
        spans = self._spans[layout.lag]
        buffers = {}
        for key, geometry in layout.rows.items():
            name = f"layers.{place}.{key}"
            fills = []
            for (reader, _), (first, used, total) in zip(self.runs, spans, strict=True):
                _check_stored(reader, name, geometry, total)
                fills.append(_Fill(reader, name, first, used, total))
            buffers[key] = _row_buffer(geometry, capacity, fills)
        return buffers

    def _rows_of_runs(self, lag: int) -> list[tuple[int, int, int]]:
        """Per run: first row, rows to use, rows stored; of a layer that is `lag` tokens behind."""
        spans = []
        for reader, used in self.runs:
            start, end = reader.header.start, reader.header.end
            first = max(start - lag, 0)
            spans.append((first, max(start + used - lag, 0) - first, max(end - lag, 0) - first))
        return spans

    def _state_buffers(self, place: str, layout: Layout) -> dict[str, _Buffer]:
        reader = self.checkpoint
        assert reader is not None
        kind = kind_named(layout.class_name)
        prefix = f"layers.{place}.state."
        buffers = {}
        if isinstance(kind, RowKind):
            num_rows = _num_state_rows(reader, place, layout)
            for key, geometry in layout.rows.items():
                _check_stored(reader, prefix + key, geometry, num_rows)
                fill = _Fill(reader, prefix + key, 0, num_rows, num_rows)
                capacity = kind.state_buffer_rows(layout.scalars, num_rows)
                buffers[key] = _row_buffer(geometry, capacity, [fill])
            return buffers
        slots = {str(slot) for slot in range(layout.scalars["slots"])} | set(ArraysKind.extras)
        for name, info in reader.header.tensors.items():
            if name.startswith(prefix):
                key = name.removeprefix(prefix)
                if key not in slots or info.dtype not in _TYPES:
                    raise CorruptBlobError(reader.path, f"tensor {name!r} is not a state")
                buffers[key] = _Buffer(info.dtype, info.shape, [_Fill(reader, name, 0, 1, 1)])
        return buffers

    def build(self) -> list[Any]:
        """The cache, once all buffers are loaded."""
        return [self._build(f"{index}", layout) for index, layout in enumerate(self.layouts)]

    def _build(self, place: str, layout: Layout) -> Any:
        if layout.class_name == mlx_cache.CacheList.__name__:
            members = (self._build(f"{place}.{i}", m) for i, m in enumerate(layout.members))
            return mlx_cache.CacheList(*members)
        kind = kind_named(layout.class_name)
        layer = kind.new(layout.scalars)
        buffers = self.buffers.get(place)
        if buffers is None:
            return layer
        kind.assign(layer, {key: buffer.array for key, buffer in buffers.items()})
        if not isinstance(kind, RowKind):
            return layer
        if place not in self.states:
            kind.resume(layer, max(self.num_tokens - layout.lag, 0))
            return layer
        assert self.checkpoint is not None
        num_rows = _num_state_rows(self.checkpoint, place, layout)
        try:
            kind.resume_state(layer, self.states[place], num_rows)
        except (KeyError, ValueError) as error:
            raise CorruptBlobError(self.path, f"its detail is malformed ({error})") from None
        return layer


def restore(
    runs: Sequence[tuple[Blob, int]],
    checkpoint: Blob | None,
    num_tokens: int,
    *,
    threads: int | None = None,
) -> list[Any]:
    """Build a cache for tokens `[0, num_tokens)` from verified bytes.

    Its arrays are evaluated and nobody else's: any thread may use them.

    Args:
        runs: Each with the number of its leading tokens to use; end to end from token 0 on. May
            be empty when the checkpoint holds every layer.
        checkpoint: The state at `num_tokens`, if some layer needs one.
        num_tokens: Tokens the cache shall stand for.
        threads: Threads that read at the same time; 1 or 2 leave a decode loop beside them
            undisturbed. By default 4, or 2 on a small machine.

    Returns:
        New layers; the buffers have room for the next tokens.

    Raises:
        CorruptBlobError: The bytes are not those that were written, or do not fit together.
            Nothing of this load is used, and no thread writes to its buffers any more.
        OSError: A file could not be read.
    """
    if threads is None:
        threads = 4 if (os.cpu_count() or 1) >= 4 else 2
    plan = _Plan(runs, checkpoint, num_tokens)
    buffers = [buffer for named in plan.buffers.values() for buffer in named.values()]
    try:
        pool.run_mlx(partial(_allocate, buffers))
        pool.run(_tasks(buffers, threads), threads)
        for buffer in buffers:
            buffer.release()
        cache = plan.build()
        _check_built(cache, plan)
    except BaseException:
        for buffer in buffers:
            buffer.release()
            buffer.array = None  # the traceback may outlive this load; what it read must not
        raise
    return cache


def _allocate(buffers: Sequence[_Buffer]) -> None:
    arrays = empty({str(index): buffer.spec for index, buffer in enumerate(buffers)})
    for index, buffer in enumerate(buffers):
        buffer.allocate(arrays[str(index)])


def _tasks(buffers: Sequence[_Buffer], threads: int) -> Iterator[Callable[[], None]]:
    """What fills allocated buffers: every byte is written once, by rows or by zeros."""
    wanted: dict[Blob, list[tuple[_Buffer, _Fill]]] = {}
    for buffer in buffers:
        yield buffer.clear_rest
        for fill in buffer.fills:
            if fill.used:
                wanted.setdefault(fill.reader, []).append((buffer, fill))
    least, most = _GROUP_BYTES
    share = sum(buffer.spec[2] for buffer in buffers) // (4 * threads)
    group_bytes = min(max(share, least), most)
    for reader, parts in wanted.items():
        infos = reader.header.tensors
        parts.sort(key=lambda part: infos[part[1].name].offset)
        group: list[tuple[_Buffer, _Fill]] = []
        room = end = 0
        for part in parts:
            info = infos[part[1].name]
            if info.offset != end or info.nbytes > room:
                if group:
                    yield partial(_read, reader, group)
                group = []
                room = group_bytes if info.nbytes < _ALONE_BYTES else 0
            group.append(part)
            room -= info.nbytes
            end = info.offset + info.nbytes
        yield partial(_read, reader, group)


def _read(reader: Blob, group: Sequence[tuple[_Buffer, _Fill]]) -> None:
    reader.read_adjacent([(fill.name, buffer.places(fill)) for buffer, fill in group])


def _check_built(cache: list[Any], plan: _Plan) -> None:
    """Compare what was built with what was saved: classes, layers, shapes, types, offsets."""
    expected = [_at(plan.num_tokens, layout) for layout in plan.layouts]
    try:
        same = encode_layout(describe(cache, plan.num_tokens)) == encode_layout(expected)
    except UnsupportedCacheError as error:
        raise CorruptBlobError(plan.path, f"does not fit its layout ({error})") from None
    if not same:
        raise CorruptBlobError(plan.path, "does not fit its layout")


def _at(num_tokens: int, layout: Layout) -> Layout:
    """How a layer looks in a cache of `num_tokens`: it cannot be behind by more than there are."""
    members = tuple(_at(num_tokens, member) for member in layout.members)
    return msgspec.structs.replace(layout, lag=min(layout.lag, num_tokens), members=members)


def _row_buffer(geometry: RowGeometry, capacity: int, fills: list[_Fill]) -> _Buffer:
    shape = (geometry.batch, geometry.heads, capacity, geometry.dim)
    heads = geometry.batch * geometry.heads
    return _Buffer(geometry.dtype, shape, fills, heads=heads, num_rows=capacity)


def _check_stored(reader: Blob, name: str, geometry: RowGeometry, num_rows: int) -> None:
    """Check that `reader` holds `num_rows` rows of `geometry` under `name`."""
    info = reader.header.tensors.get(name)
    if info is None:
        raise CorruptBlobError(reader.path, f"lacks tensor {name!r}")
    shape = (geometry.batch, geometry.heads, num_rows, geometry.dim)
    if info.shape != shape or info.dtype != geometry.dtype:
        raise CorruptBlobError(
            reader.path,
            f"tensor {name!r} is {info.dtype} {info.shape} instead of {geometry.dtype} {shape}",
        )


def _num_state_rows(reader: Blob, place: str, layout: Layout) -> int:
    info = reader.header.tensors.get(f"layers.{place}.state.keys")
    if info is None or len(info.shape) != 4:
        raise CorruptBlobError(reader.path, f"lacks the state of layer {place}")
    return info.shape[2]
