"""Rows of stored tensors as tensors to be written: cut and joined, read only when they are needed.

A row tensor has shape `(B, H, rows, D)`. Its layer may be some tokens behind (a draft model's
layers are), so rows and tokens are told apart; how far behind follows from the shape, since only
the first runs of a path are short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from msgspec import Struct

from persist_cache.blobs.header import TOKENS, BlobHeader
from persist_cache.blobs.reader import BlobReader
from persist_cache.codec import Tensor, TensorInfo
from persist_cache.errors import CorruptBlobError

ROW_AXIS = 2


class Span(Struct, frozen=True):
    """Rows `[first, last)` of a stored tensor."""

    reader: BlobReader
    name: str
    first: int
    last: int

    @property
    def info(self) -> TensorInfo:
        return self.reader.header.tensors[self.name]


class _Lazy(Sequence[memoryview]):
    """One view that is read from disk, and verified, each time somebody looks at it.

    Kept by nobody but who looks, so a blob of any size takes the memory of one tensor.
    """

    def __init__(self, read: Callable[[], memoryview]) -> None:
        self._read = read

    def __len__(self) -> int:
        return 1

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[memoryview]: ...
    def __getitem__(self, index: int | slice) -> memoryview | Sequence[memoryview]:
        if index != 0:
            raise IndexError(index)
        return self._read()


class StoredTensor(Tensor, frozen=True):
    """A tensor whose bytes are on disk."""

    stored_bytes: int

    @property
    def nbytes(self) -> int:
        return self.stored_bytes


def rows_between(header: BlobHeader, info: TensorInfo, start: int, end: int) -> tuple[int, int]:
    """First and last row (exclusive) that a run stores for the tokens `[start, end)`."""
    num_rows = info.shape[ROW_AXIS]
    if num_rows == header.end - header.start:
        return start - header.start, end - header.start
    lag = header.end - num_rows
    return max(start - lag, 0), max(end - lag, 0)


def join(spans: Sequence[Span], on_read: Callable[[int], None] | None = None) -> StoredTensor:
    """The rows of all `spans`, which are of equal geometry, as one tensor.

    Args:
        spans: At least one, in the order of their tokens.
        on_read: Called with the bytes read, each time.
    """
    info = spans[0].info
    batch, heads, _, *rest = info.shape
    num_rows = sum(span.last - span.first for span in spans)
    nbytes = sum(_row_bytes(span) * (span.last - span.first) for span in spans) * batch * heads

    def read() -> memoryview:
        view = _read(spans, batch * heads, nbytes)
        if on_read is not None:
            on_read(nbytes)
        return view

    pieces: Sequence[memoryview] = _Lazy(read) if nbytes else ()
    shape = (batch, heads, num_rows, *rest)
    return StoredTensor(spans[0].name, info.dtype, shape, pieces, nbytes)


def copy_rows(spans: Sequence[Span]) -> Tensor:
    """The rows of all `spans`, as `join`, read at once and only they.

    The blobs were verified a moment ago: many small cuts of one blob would else read and verify
    it as often.
    """
    info = spans[0].info
    batch, heads, _, *rest = info.shape
    num_rows = sum(span.last - span.first for span in spans)
    row = max(map(_row_bytes, spans))
    out = memoryview(bytearray(row * num_rows * batch * heads))
    at = 0
    for head in range(batch * heads):
        for span in spans:
            wanted = (span.last - span.first) * row
            if wanted:
                start = (head * span.info.shape[ROW_AXIS] + span.first) * row
                span.reader.read_part(span.name, start, out[at : at + wanted])
                at += wanted
    return Tensor(spans[0].name, info.dtype, (batch, heads, num_rows, *rest), [out] if out else [])


def whole(
    reader: BlobReader, name: str, on_read: Callable[[int], None] | None = None
) -> StoredTensor:
    """A stored tensor of any shape as it is."""
    info = reader.header.tensors[name]

    def read() -> memoryview:
        view = memoryview(bytearray(info.nbytes))
        reader.read(name, [view])
        if on_read is not None:
            on_read(info.nbytes)
        return view

    pieces: Sequence[memoryview] = _Lazy(read) if info.nbytes else ()
    return StoredTensor(name, info.dtype, info.shape, pieces, info.nbytes)


class Cut(Struct, frozen=True):
    """Tokens `[start, end)` of a run.

    Attributes:
        reader: The run, as the index says.
        start: Position where it begins.
        end: Position behind the last token to be kept.
        own: The packed tokens between, as the index says.
    """

    reader: BlobReader
    start: int
    end: int
    own: memoryview


def cut_runs(cuts: Sequence[Cut], on_read: Callable[[int], None] | None = None) -> list[Tensor]:
    """What is left of runs, which lie end to end and have the same tensors, when they are cut.

    Args:
        cuts: At least one.
        on_read: Called with the bytes read, each time.

    Raises:
        CorruptBlobError: One is not what the index says; its path says which.
    """
    for cut in cuts:
        _check_run(cut)
    num_tokens = cuts[-1].end - cuts[0].start
    tensors: list[Tensor] = [Tensor(TOKENS, "I64", (num_tokens,), [cut.own for cut in cuts])]
    for name in cuts[0].reader.header.tensors:
        if name != TOKENS:
            tensors.append(join([_span(cut, name) for cut in cuts], on_read))
    return tensors


def _check_run(cut: Cut) -> None:
    reader, header = cut.reader, cut.reader.header
    if header.kind != "run" or header.start != cut.start or header.end < cut.end:
        raise CorruptBlobError(reader.path, "is another run than the index says")
    if not reader.read_bytes(TOKENS).startswith(bytes(cut.own)):
        raise CorruptBlobError(reader.path, "has other tokens than the index says")
    for name, info in header.tensors.items():
        if name == TOKENS:
            continue
        if len(info.shape) <= ROW_AXIS or info.shape[ROW_AXIS] > header.end - header.start:
            raise CorruptBlobError(reader.path, f"tensor {name!r} is not made of rows")


def _span(cut: Cut, name: str) -> Span:
    header = cut.reader.header
    return Span(cut.reader, name, *rows_between(header, header.tensors[name], cut.start, cut.end))


def _row_bytes(span: Span) -> int:
    """Bytes of one row of one head."""
    batch, heads, num_rows, *_ = span.info.shape
    count = batch * heads * num_rows
    return span.info.nbytes // count if count else 0


def _read(spans: Sequence[Span], num_heads: int, nbytes: int) -> memoryview:
    """Read the tensors of all spans whole, because a checksum is over all, and keep the rows."""
    out = memoryview(bytearray(nbytes))
    per_head = nbytes // num_heads
    at = 0
    for span in spans:
        row = _row_bytes(span)
        before, wanted = span.first * row, (span.last - span.first) * row
        behind = (span.info.shape[ROW_AXIS] - span.last) * row
        if not wanted:
            continue
        scratch = memoryview(bytearray((before + behind) * num_heads))
        buffers = []
        for head in range(num_heads):
            unused = scratch[head * (before + behind) : (head + 1) * (before + behind)]
            begin = head * per_head + at
            buffers += [unused[:before], out[begin : begin + wanted], unused[before:]]
        span.reader.read(span.name, buffers)
        at += wanted
    return out
