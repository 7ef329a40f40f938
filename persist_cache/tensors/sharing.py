"""A layer's rows in several buffers, so that caches share those of the tokens they have in common.

A server's batch goes on writing into its buffers, so what is kept of it must be copied, on the
thread that decodes. Most of it was copied before: for the system part of the prompt, or for the
turn before. `gather` copies the rows that are new and refers to the others; `join` makes one cache
of all of them, to decode on.

Rows are shared only where they come from one computation. Tokens alone do not prove that: the same
prompt computed in another batch differs in its last bits. So some rows of each shared piece are
compared with those of the batch, in every layer, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from persist_cache.tensors._mlx import mlx_cache, mx
from persist_cache.tensors.layers import leaves
from persist_cache.tensors.pieced import Piece, Pieced

_SIDES = ("keys", "values")
_MOST_PIECES = 8
"""Beyond so many, the pieces of a cache that is used are put into one buffer."""
_COMPARED_ROWS = 4
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}

Known = Mapping[str, Sequence[Piece]]
"""The pieces of a prompt's first tokens, of each layer that has some, by place."""


class BatchRows(mlx_cache.KVCache):  # type: ignore[misc]
    """One sequence of a batch: unevaluated views of the buffers that the batch writes into.

    It works as a `KVCache` does. While it lives, the batch's next token copies the whole buffer,
    so hand it to `gather` at once, or drop it.
    """


class _Layer(Struct):
    """A layer to be gathered, and what is known of its first rows."""

    rows: BatchRows
    pieces: list[Piece]


def extract(batch: Sequence[Any], index: int) -> list[Any]:
    """Take one sequence out of a batch's layers, as their `extract` does.

    Rows of plain KV caches are not copied, but left to `gather`.

    Args:
        batch: The layers of the batch.
        index: Which of its sequences.
    """
    return [_extract(layer, index) for layer in batch]


def _extract(layer: Any, index: int) -> Any:
    if type(layer) is mlx_cache.CacheList:
        return mlx_cache.CacheList(*extract(layer.caches, index))
    if type(layer) is not mlx_cache.BatchKVCache or layer.empty():
        return layer.extract(index)
    mx.eval(layer.left_padding)
    padding, end = layer.left_padding.tolist()[index], layer.size()
    rows = BatchRows()
    rows.keys = layer.keys[index : index + 1, :, padding:end]
    rows.values = layer.values[index : index + 1, :, padding:end]
    rows.offset = end - padding
    return rows


def known_rows(cache: Sequence[Any], num_tokens: int) -> Known:
    """Refer to the rows of a kept cache's first tokens, for a longer prompt's.

    Nothing is copied. While the answer lives, a write to the cache copies the buffer first.

    Args:
        cache: A prepared cache.
        num_tokens: How many of its tokens the other prompt has, too.
    """
    known: dict[str, Sequence[Piece]] = {}
    for place, layer in leaves(cache):
        if type(layer) is Pieced:
            pieces = list(layer.first(num_tokens))
        elif type(layer) is mlx_cache.KVCache and not layer.empty():
            arrays = {side: copy.copy(getattr(layer, side)) for side in _SIDES}
            pieces = [Piece(arrays, min(num_tokens, layer.offset))]
        else:
            continue
        if pieces and pieces[-1].wastes:
            pieces.pop()
        known[place] = pieces
    return known


def gather(cache: Any, find_known: Callable[[], Known | None] | None) -> None:
    """Let a cache that was taken out of a batch own its rows; copies those that are not known.

    Does nothing to layers that do not come from `extract`. On the thread of the batch.

    Args:
        cache: Its layers; those from `extract` are replaced by `Pieced` ones.
        find_known: Gives rows of the prompt's first tokens; asked only if there is use for them.
    """
    places = {place: layer for place, layer in leaves(cache) if type(layer) is BatchRows}
    if not places:
        return
    known = (find_known() if find_known is not None else None) or {}
    layers = {
        place: _Layer(rows, _fitting(rows, known.get(place, ()))) for place, rows in places.items()
    }
    made: dict[str, Pieced] = {}
    copied: list[Any] = []
    try:
        num_pieces = _num_equal(list(layers.values()))
        for place, layer in layers.items():
            pieces = layer.pieces[:num_pieces]
            start = sum(piece.num_rows for piece in pieces)
            # A copy, unless these rows are all that there is in the batch's buffer.
            new = {side: mx.contiguous(getattr(layer.rows, side)[:, :, start:]) for side in _SIDES}
            made[place] = Pieced([*pieces, Piece(new, layer.rows.offset - start)])
            copied += new.values()
        mx.eval(copied)
    finally:
        for rows in places.values():
            rows.keys = rows.values = None  # else the batch's next token would copy its buffer
            rows.offset = 0
    cache[:] = _replaced(cache, made)


def _fitting(rows: BatchRows, pieces: Sequence[Piece]) -> list[Piece]:
    """The leading pieces that can be this layer's, by shape and type."""
    fitting = []
    left = rows.offset
    for piece in pieces:
        left -= piece.num_rows
        if left < 0 or any(
            _geometry(piece.arrays[side]) != _geometry(getattr(rows, side)) for side in _SIDES
        ):
            break
        fitting.append(piece)
    return fitting


def _geometry(array: Any) -> tuple[Any, ...]:
    return (*array.shape[:2], array.shape[3], array.dtype)


def _num_equal(layers: Sequence[_Layer]) -> int:
    """How many leading pieces hold the rows of the batch, in all layers."""
    ends = [[piece.num_rows for piece in layer.pieces] for layer in layers]
    num_pieces = next(
        (number for number, column in enumerate(zip(*ends, strict=False)) if len({*column}) > 1),
        min(map(len, ends)),
    )
    if not num_pieces:
        return 0
    equal = []
    start = 0
    for number in range(num_pieces):
        end = start + ends[0][number]
        in_all = [
            _same_bits(getattr(layer.rows, side), layer.pieces[number].arrays[side], start, end)
            for layer in layers
            for side in _SIDES
        ]
        equal.append(mx.all(mx.stack(in_all)))
        start = end
    said: Any = mx.stack(equal).tolist()
    return next((number for number, is_equal in enumerate(said) if not is_equal), num_pieces)


def _same_bits(rows: Any, kept: Any, start: int, end: int) -> Any:
    """Whether some rows of `[start, end)`, the last among them, are the first ones of `kept`."""
    num_rows = end - start
    step = max(1, num_rows // _COMPARED_ROWS)
    first = (num_rows - 1) % step
    unsigned = _UNSIGNED[rows.dtype.size]
    return mx.array_equal(
        rows[:, :, start + first : end : step].view(unsigned),
        kept[:, :, first:num_rows:step].view(unsigned),
    )


def _replaced(layers: Sequence[Any], made: Mapping[str, Any], prefix: str = "") -> list[Any]:
    replaced = []
    for index, layer in enumerate(layers):
        place = f"{prefix}{index}"
        if type(layer) is mlx_cache.CacheList:
            layer = mlx_cache.CacheList(*_replaced(layer.caches, made, f"{place}."))
        replaced.append(made.get(place, layer))
    return replaced


def is_pieced(cache: Sequence[Any]) -> bool:
    """Whether a kept cache was gathered: the next one of the same conversation shares its rows."""
    return any(type(layer) is Pieced for _, layer in leaves(cache))


def join(cache: Sequence[Any]) -> list[Any]:
    """Make a cache to decode on of one that may be in pieces, which stays as it is.

    Its arrays are unevaluated where there are several pieces: for the calling thread.
    """
    places = {place: layer for place, layer in leaves(cache) if type(layer) is Pieced}
    return _replaced(cache, {place: _joined(layer) for place, layer in places.items()})


def _joined(layer: Pieced) -> Any:
    joined = mlx_cache.KVCache()
    if not layer.pieces:
        return joined
    if len(layer.pieces) == 1:
        arrays = layer.pieces[0].arrays
        joined.keys, joined.values = (copy.copy(arrays[side]) for side in _SIDES)
    else:
        joined.keys, joined.values = (_concatenated(layer, side, joined.step) for side in _SIDES)
    joined.offset = layer.offset
    return joined


def _concatenated(layer: Pieced, side: str, step: int = 0) -> Any:
    """All rows in one array, with room up to a multiple of `step` if it is given."""
    rows = [piece.arrays[side][:, :, : piece.num_rows] for piece in layer.pieces]
    if step:
        batch, heads, _, dim = rows[0].shape
        rows.append(mx.zeros((batch, heads, step - layer.offset % step, dim), rows[0].dtype))
    return mx.concatenate(rows, axis=2)


def condense(cache: Sequence[Any]) -> bool:
    """Put the rows of a kept cache into one buffer for each layer, if they are in many pieces.

    Layer by layer, so that it takes the memory of one layer more. Nothing it holds changes.

    Returns:
        Whether anything was done.
    """
    layers = [layer for _, layer in leaves(cache) if type(layer) is Pieced]
    if max((len(layer.pieces) for layer in layers), default=0) <= _MOST_PIECES:
        return False
    for layer in layers:
        arrays = {side: _concatenated(layer, side) for side in _SIDES}
        mx.eval(list(arrays.values()))
        layer.pieces = (Piece(arrays, layer.offset),)
    return True
