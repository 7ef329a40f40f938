"""Whether a cache is still as it was when it was handed over, told without reading it."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

from persist_cache.tensors._mlx import mx, tree_flatten
from persist_cache.tensors.layers import leaves


class Witness:
    """Remembers the buffers and the numbers of a cache.

    It holds a reference to every buffer. So a write to the cache, even one in place that keeps
    all lengths, goes to new memory, and no buffer that takes the place of one of these can have
    its address. The price is that such a write copies the whole buffer: drop the witness before
    a cache is decoded on.

    Thread safety: immutable. Asking it runs no MLX operation while the cache is unchanged.
    """

    def __init__(self, cache: Sequence[Any]) -> None:
        """Take note of a prepared cache, on the thread that computed it."""
        # An array object follows the writes to it; a copy of the object stays with the buffer.
        self._buffers = [copy.copy(array) for array in _arrays(cache)]
        self._seen = _look_at(cache)

    def fits(self, cache: Sequence[Any]) -> bool:
        """Whether nothing was written to `cache` since."""
        try:
            return self._seen == _look_at(cache)
        except Exception:
            # What lies in a cache now may be unevaluated work of another thread.
            return False


def witness(cache: Sequence[Any]) -> Witness:
    """Remember what a prepared cache is, so that a later change can be noticed."""
    return Witness(cache)


def _arrays(cache: Sequence[Any]) -> Iterator[Any]:
    for _, layer in leaves(cache):
        for _, value in _attributes(layer):
            if isinstance(value, mx.array):
                yield value


def _look_at(cache: Sequence[Any]) -> list[tuple[str, object]]:
    """The address of every array and the value of every number, by place and name."""
    seen: list[tuple[str, object]] = []
    for place, layer in leaves(cache):
        for name, value in _attributes(layer):
            if isinstance(value, mx.array):
                seen.append((f"{place}.{name}", (address_of(value), tuple(value.shape))))
            elif value is None or isinstance(value, int | float | str):
                seen.append((f"{place}.{name}", value))
    return seen


def _attributes(layer: Any) -> Iterator[tuple[str, Any]]:
    """Whatever a layer holds, also of a class that is not known."""
    for name, value in getattr(layer, "__dict__", {}).items():
        if isinstance(value, list | tuple | dict):
            yield from ((f"{name}.{path}", leaf) for path, leaf in tree_flatten(value))
        else:
            yield name, value


def address_of(array: Any) -> int:
    """Where an evaluated array's memory begins; 0 if it has none."""
    view = memoryview(array)
    if not view.nbytes:
        return 0
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
