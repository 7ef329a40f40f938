"""What is known of each mlx-lm cache class; a class not named here is refused.

Knowledge of attributes, of which rows are valid, and of what a class does when it grows lives
here and nowhere else. Exact types only: a subclass may keep state that nobody here knows of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from persist_cache.blobs.layout import MAX_LAG, Layout, RowGeometry, layout_leaves
from persist_cache.errors import UnsupportedCacheError
from persist_cache.tensors._mlx import mlx_cache, mx
from persist_cache.tensors.pieced import Pieced

DTYPES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
    mx.float64: "F64",
    mx.complex64: "C64",
}
"""safetensors name of each MLX type."""


def decode_layout(text: str) -> list[Layout]:
    """Decode what `encode_layout` made.

    Raises:
        ValueError: It is something else, or names a class that is not known.
    """
    layouts = msgspec.json.decode(text, type=list[Layout])
    if not layouts:
        raise ValueError("no layers")
    for _, layout in layout_leaves(layouts):
        kind = _BY_NAME.get(layout.class_name)
        if kind is None:
            raise ValueError(f"unknown cache class {layout.class_name!r}")
        try:
            scalars = kind.scalars(kind.new(layout.scalars))
        except (KeyError, TypeError):
            scalars = {}
        dtypes = {geometry.dtype for geometry in layout.rows.values()}
        if scalars != layout.scalars or not dtypes <= set(DTYPES.values()):
            raise ValueError(f"not a layout of {layout.class_name}")
    return layouts


def leaves(cache: Sequence[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every layer of a live cache that is not a `CacheList`, with its place."""
    for index, layer in enumerate(cache):
        if type(layer) is mlx_cache.CacheList:
            yield from leaves(layer.caches, f"{prefix}{index}.")
        else:
            yield f"{prefix}{index}", layer


class LayerKind(ABC):
    """One cache class. Has no state of its own; every method is given the layer."""

    cls: ClassVar[type]
    attributes: ClassVar[frozenset[str]]
    has_offset: ClassVar[bool] = True
    always_rows: ClassVar[bool] = False
    """Rows can be cut out of the layer whatever happened to it."""

    @abstractmethod
    def scalars(self, layer: Any) -> dict[str, int]:
        """The numbers that never change during a conversation."""

    @abstractmethod
    def arrays(self, layer: Any) -> dict[str, Any]:
        """The layer's arrays by name; empty while it has no state."""

    @abstractmethod
    def assign(self, layer: Any, arrays: Mapping[str, Any]) -> None:
        """Put `arrays`, named as by `arrays()`, into the layer."""

    @abstractmethod
    def new(self, scalars: Mapping[str, int]) -> Any:
        """A layer without state."""

    @property
    def class_name(self) -> str:
        """Of the class that is restored: the one in a layout."""
        return self.cls.__name__

    def buffers(self, layer: Any) -> dict[str, list[tuple[Any, int]]]:
        """As `arrays`, each as the buffers that make it up, and how many rows of each count."""
        arrays = self.arrays(layer).items()
        return {name: [(array, array.shape[-2] if array.ndim > 1 else 0)] for name, array in arrays}

    def has_rows(self, layer: Any) -> bool:
        """Whether row `i` of every buffer is that of the layer's token `i`, from 0 on."""
        return self.always_rows

    def settle(self, layer: Any) -> None:
        """Drop rows that the layer still holds, but no longer counts, where that matters."""
        return

    def can_trim(self, layer: Any) -> bool:
        """Whether tokens can be taken back as if they had never been there."""
        return bool(layer.is_trimmable())

    def trim(self, layer: Any, num_tokens: int) -> int:
        """Take back `num_tokens`; returns how many it were."""
        return int(layer.trim(num_tokens))


class RowKind(LayerKind):
    """A class with buffers `(B, H, rows, D)` and an offset."""

    attributes = frozenset({"keys", "values", "offset"})

    def scalars(self, layer: Any) -> dict[str, int]:
        return {}

    def new(self, scalars: Mapping[str, int]) -> Any:
        return self.cls(**scalars)

    def arrays(self, layer: Any) -> dict[str, Any]:
        return {} if layer.keys is None else {"keys": layer.keys, "values": layer.values}

    def assign(self, layer: Any, arrays: Mapping[str, Any]) -> None:
        layer.keys, layer.values = arrays["keys"], arrays["values"]

    def buffer_rows(self, scalars: Mapping[str, int], num_rows: int) -> int:
        """Rows of a new buffer for `num_rows` tokens, with room for the next ones."""
        step = int(self.cls.step)  # type: ignore[attr-defined]
        return (num_rows // step + 1) * step

    def resume(self, layer: Any, num_rows: int) -> None:
        """Tell a new layer whose buffers were assigned that it holds tokens `[0, num_rows)`."""
        layer.offset = num_rows

    def state_rows(self, layer: Any) -> tuple[int, int]:
        """First and last row (exclusive) that a checkpoint must hold."""
        raise NotImplementedError

    def state_buffer_rows(self, scalars: Mapping[str, int], num_rows: int) -> int:
        """Rows of a new buffer for a state that was stored with `num_rows` rows."""
        return num_rows

    def moving(self, layer: Any) -> dict[str, int]:
        """The numbers that go with a checkpoint."""
        raise NotImplementedError

    def resume_state(self, layer: Any, moving: Mapping[str, int], num_rows: int) -> None:
        """Tell a new layer whose state of `num_rows` rows was assigned where it stands.

        Raises:
            ValueError: The numbers contradict each other.
        """
        raise NotImplementedError


class _KV(RowKind):
    cls = mlx_cache.KVCache
    always_rows = True


class _Pieced(RowKind):
    """Stored, and restored, as the `KVCache` that it stands for."""

    cls = Pieced
    attributes = frozenset({"pieces", "offset"})
    always_rows = True

    @property
    def class_name(self) -> str:
        return str(_KV.cls.__name__)

    def arrays(self, layer: Any) -> dict[str, Any]:
        """Those of its first piece: all pieces are of one shape, but for their rows, and type."""
        return dict(layer.pieces[0].arrays) if layer.pieces else {}

    def assign(self, layer: Any, arrays: Mapping[str, Any]) -> None:
        """Nothing: its buffers are its own already."""

    def buffers(self, layer: Any) -> dict[str, list[tuple[Any, int]]]:
        return {
            name: [(piece.arrays[name], piece.num_rows) for piece in layer.pieces]
            for name in self.arrays(layer)
        }


class _Concatenate(RowKind):
    cls = mlx_cache.ConcatenateKVCache
    always_rows = True

    def buffer_rows(self, scalars: Mapping[str, int], num_rows: int) -> int:
        return num_rows

    def trim(self, layer: Any, num_tokens: int) -> int:
        trimmed = super().trim(layer, num_tokens)
        self.settle(layer)
        return trimmed

    def settle(self, layer: Any) -> None:
        # Upstream's `trim` moves the offset only, and the next update brings the trimmed tokens
        # back.
        if layer.keys is not None and layer.keys.shape[-2] != layer.offset:
            layer.keys = layer.keys[..., : layer.offset, :]
            layer.values = layer.values[..., : layer.offset, :]


class _Quantized(RowKind):
    cls = mlx_cache.QuantizedKVCache
    attributes = RowKind.attributes | {"group_size", "bits"}
    always_rows = True
    _parts = ("w", "scales", "biases")

    def scalars(self, layer: Any) -> dict[str, int]:
        return {"group_size": layer.group_size, "bits": layer.bits}

    def arrays(self, layer: Any) -> dict[str, Any]:
        if layer.keys is None:
            return {}
        sides = {"keys": layer.keys, "values": layer.values}
        return {
            f"{side}.{part}": array
            for side, arrays in sides.items()
            for part, array in zip(self._parts, arrays, strict=True)
        }

    def assign(self, layer: Any, arrays: Mapping[str, Any]) -> None:
        layer.keys = tuple(arrays[f"keys.{part}"] for part in self._parts)
        layer.values = tuple(arrays[f"values.{part}"] for part in self._parts)


class _Rotating(RowKind):
    cls = mlx_cache.RotatingKVCache
    attributes = RowKind.attributes | {"keep", "max_size", "_idx"}

    def scalars(self, layer: Any) -> dict[str, int]:
        return {"max_size": layer.max_size, "keep": layer.keep}

    def has_rows(self, layer: Any) -> bool:
        # Below `max_size` nothing was dropped or overwritten, and the next write goes to `offset`.
        return bool(layer.offset < layer.max_size and layer._idx == layer.offset)

    def buffer_rows(self, scalars: Mapping[str, int], num_rows: int) -> int:
        # A longer buffer than `max_size` would be trimmed as if its padding were tokens.
        return min(super().buffer_rows(scalars, num_rows), scalars["max_size"])

    def resume(self, layer: Any, num_rows: int) -> None:
        layer.offset = layer._idx = num_rows

    def state_rows(self, layer: Any) -> tuple[int, int]:
        if self.has_rows(layer):
            return 0, layer.offset  # behind it are padding and rows of trimmed tokens
        num_rows = layer.keys.shape[2]
        # After a prefill the buffer holds up to a chunk more than the window, in order. The next
        # update drops the oldest; without `keep`, whatever reads the buffer before that (a merge
        # into a batch) takes the newest `max_size` as well.
        if layer.keep == 0 and layer._idx == num_rows > layer.max_size:
            return num_rows - layer.max_size, num_rows
        return 0, num_rows

    def moving(self, layer: Any) -> dict[str, int]:
        first, _ = self.state_rows(layer)
        return {"offset": layer.offset, "index": layer._idx - first}

    def resume_state(self, layer: Any, moving: Mapping[str, int], num_rows: int) -> None:
        if not 0 <= moving["index"] <= num_rows:
            raise ValueError("a ring buffer's index is outside of it")
        layer.offset, layer._idx = moving["offset"], moving["index"]


class _Chunked(RowKind):
    cls = mlx_cache.ChunkedKVCache
    attributes = RowKind.attributes | {"chunk_size", "start_position"}

    def scalars(self, layer: Any) -> dict[str, int]:
        return {"chunk_size": layer.chunk_size}

    def has_rows(self, layer: Any) -> bool:
        # The start never goes back, so a cache that has not slid had not slid at any earlier
        # position either: cut there, it slides at the next call just as it would have.
        return bool(layer.start_position == 0)

    def can_trim(self, layer: Any) -> bool:
        # Upstream says yes always, but the chunk of an earlier token may have slid out.
        return self.has_rows(layer)

    def state_rows(self, layer: Any) -> tuple[int, int]:
        return 0, layer.offset - layer.start_position

    def state_buffer_rows(self, scalars: Mapping[str, int], num_rows: int) -> int:
        return self.buffer_rows(scalars, num_rows)

    def moving(self, layer: Any) -> dict[str, int]:
        return {"offset": layer.offset, "start": layer.start_position}

    def resume_state(self, layer: Any, moving: Mapping[str, int], num_rows: int) -> None:
        if moving["offset"] - moving["start"] != num_rows:
            raise ValueError("a chunk's rows do not span from its start to its offset")
        layer.offset, layer.start_position = moving["offset"], moving["start"]


class ArraysKind(LayerKind):
    """Recurrent state: any arrays, good at one position only."""

    cls = mlx_cache.ArraysCache
    attributes = frozenset({"cache", "left_padding", "lengths"})
    has_offset = False
    extras = ("left_padding", "lengths")

    def scalars(self, layer: Any) -> dict[str, int]:
        return {"slots": len(layer.cache)}

    def new(self, scalars: Mapping[str, int]) -> Any:
        return self.cls(scalars["slots"])

    def arrays(self, layer: Any) -> dict[str, Any]:
        named = {str(slot): array for slot, array in enumerate(layer.cache)}
        named |= {name: getattr(layer, name) for name in self.extras}
        return {name: array for name, array in named.items() if array is not None}

    def assign(self, layer: Any, arrays: Mapping[str, Any]) -> None:
        layer.cache = [arrays.get(str(slot)) for slot in range(len(layer.cache))]
        for name in self.extras:
            setattr(layer, name, arrays.get(name))


_KINDS: dict[type, LayerKind] = {
    kind.cls: kind
    for kind in (
        *(_Pieced(), _KV(), _Concatenate()),
        *(_Quantized(), _Rotating(), _Chunked(), ArraysKind()),
    )
}
_BY_NAME = {kind.class_name: kind for kind in _KINDS.values() if kind.cls is not Pieced}


def kind_of(layer: Any) -> LayerKind | None:
    """What is known of `layer`, or None if it may hold more than is known."""
    kind = _KINDS.get(type(layer))
    return kind if kind is not None and vars(layer).keys() == kind.attributes else None


def kind_named(class_name: str) -> LayerKind:
    """What is known of a class that a decoded layout names."""
    return _BY_NAME[class_name]


def require_kind(layer: Any) -> LayerKind:
    """What is known of `layer`.

    Raises:
        UnsupportedCacheError: Nothing.
    """
    kind = kind_of(layer)
    if kind is None:
        known = type(layer) in _KINDS
        reason = "it has attributes of its own" if known else "its class is not known"
        raise UnsupportedCacheError(type(layer).__name__, reason)
    return kind


def describe(cache: Sequence[Any], num_tokens: int) -> list[Layout]:
    """The layout of a cache that stands for `num_tokens` tokens.

    Raises:
        UnsupportedCacheError: A layer's class or shape is not known.
    """
    return [_describe(layer, num_tokens) for layer in cache]


def _describe(layer: Any, num_tokens: int) -> Layout:
    name = type(layer).__name__
    if type(layer) is mlx_cache.CacheList:
        return Layout(name, members=tuple(describe(layer.caches, num_tokens)))
    kind = require_kind(layer)
    name = kind.class_name
    scalars = kind.scalars(layer)
    if not all(type(value) is int for value in scalars.values()):
        raise UnsupportedCacheError(name, f"of its numbers {scalars}")
    arrays = kind.arrays(layer)
    if any(array.dtype not in DTYPES for array in arrays.values()):
        raise UnsupportedCacheError(name, "it holds a type that safetensors does not know")
    if not isinstance(kind, RowKind):
        return Layout(name, scalars)
    lag = num_tokens - layer.offset
    if not arrays:
        if layer.offset:
            raise UnsupportedCacheError(name, "it has an offset, but no keys")
        return Layout(name, scalars)
    if not 0 <= lag <= MAX_LAG:
        raise UnsupportedCacheError(name, f"it holds {layer.offset} of {num_tokens} tokens")
    return Layout(name, scalars, {key: _geometry(name, arrays[key]) for key in arrays}, lag)


def _geometry(class_name: str, array: Any) -> RowGeometry:
    if array.ndim != 4:
        raise UnsupportedCacheError(class_name, f"its buffers have {array.ndim} axes instead of 4")
    batch, heads, _, dim = array.shape
    return RowGeometry(DTYPES[array.dtype], batch, heads, dim)
