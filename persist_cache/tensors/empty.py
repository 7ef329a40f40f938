"""New arrays whose memory nobody has written yet.

MLX has no `empty`: `mx.zeros` writes every byte, which costs as much as reading the bytes that
then replace the zeros. `mx.load` from a file-like object, however, allocates the arrays and hands
their memory to the object's `readinto` to be filled. The file made up here has a header and then
leaves the memory as it is.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from persist_cache.tensors._mlx import mx

_turn = threading.Lock()


def _after_fork() -> None:
    global _turn
    _turn = threading.Lock()  # whoever held it does not exist here


os.register_at_fork(after_in_child=_after_fork)


def _in_turn(clear: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(clear)
    def clear_cache() -> None:
        with _turn:
            clear()

    return clear_cache


mx.clear_cache = _in_turn(mx.clear_cache)


class _MadeUpFile:
    """A safetensors file of which there is just the header."""

    closed = False

    def __init__(self, specs: Mapping[str, tuple[str, tuple[int, ...], int]]) -> None:
        table = {}
        offset = 0
        for name, (dtype, shape, nbytes) in specs.items():
            end = offset + nbytes
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        header = json.dumps(table).encode()
        self._head = len(header).to_bytes(8, "little") + header
        self._size = len(self._head) + offset
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._size)[whence]
        self._position = base + offset
        return self._position

    def readinto(self, memory: Any) -> int:
        """Write what belongs to the header; runs on a thread of MLX, so it never raises."""
        count: int = memory.nbytes
        head = self._head[self._position : self._position + count]
        if head:
            memory.cast("B")[: len(head)] = head
        self._position += count
        return count


def empty(specs: Mapping[str, tuple[str, tuple[int, ...], int]]) -> dict[str, Any]:
    """Make arrays with whatever the memory held before: the caller writes every byte.

    They are evaluated, and each is the only user of its buffer.

    Args:
        specs: By name: safetensors name of the type, shape, bytes.
    """
    with _turn:
        arrays = _evaluated(specs)
        # Until then its thread may still hold the file, and needs the GIL to let go of it.
        mx.synchronize(mx.default_stream(mx.cpu))
    return arrays


def _evaluated(specs: Mapping[str, tuple[str, tuple[int, ...], int]]) -> dict[str, Any]:
    loadable = {name: spec for name, spec in specs.items() if spec[0] != "F64"}
    arrays = {
        name: mx.zeros(spec[1], mx.float64, stream=mx.cpu)  # `mx.load` does not know this type
        for name, spec in specs.items()
        if name not in loadable
    }
    if loadable:
        file: Any = _MadeUpFile(loadable)
        loaded: Any = mx.load(file, format="safetensors", stream=mx.cpu)
        arrays.update(loaded)
    mx.eval(list(arrays.values()))
    return arrays
