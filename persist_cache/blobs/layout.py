"""What a cache's layout says of its blobs: which tensors they have, of which shape and type.

Knows the cache classes by their names alone, as docs/format.md lists them, so that a file can be
held against its layout where no MLX is. What the classes do is known to `tensors` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from persist_cache.blobs.header import DTYPE_BYTES, TOKENS, BlobHeader
from persist_cache.codec import TensorInfo

MAX_LAG = 16
"""Tokens by which a layer may be behind its cache's key; a draft model's layers are 1 behind."""
LIST_CLASS = "CacheList"
_DTYPES = DTYPE_BYTES.keys() - {"F8_E4M3", "F8_E5M2"}
_STATE_ROW_AXIS = 2


class RowGeometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One buffer of a layer with rows, `(batch, heads, rows, dim)`, without its length."""

    dtype: str
    batch: int
    heads: int
    dim: int


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One layer as it stays for a whole conversation.

    Attributes:
        class_name: Of the mlx-lm class.
        scalars: Its constructor's numbers.
        rows: Geometry of its buffers by name; empty while the layer has no state.
        lag: Tokens by which it is behind the cache's key.
        members: The layers of a `CacheList`.
    """

    class_name: str = msgspec.field(name="class")
    scalars: dict[str, int] = {}
    rows: dict[str, RowGeometry] = {}
    lag: int = 0
    members: tuple[Layout, ...] = ()


class _Class(msgspec.Struct, frozen=True):
    """What a class has.

    Attributes:
        scalars: Names of its numbers.
        buffers: Names of its buffers; none for a class without rows.
        keeps_rows: It never drops a row.
        moving: Names of the numbers that go with its state.
    """

    scalars: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset(("keys", "values"))
    keeps_rows: bool = False
    moving: frozenset[str] = frozenset()


_SIDES = ("keys", "values")
_CLASSES = {
    "KVCache": _Class(keeps_rows=True),
    "ConcatenateKVCache": _Class(keeps_rows=True),
    "QuantizedKVCache": _Class(
        frozenset(("bits", "group_size")),
        frozenset(f"{side}.{part}" for side in _SIDES for part in ("w", "scales", "biases")),
        keeps_rows=True,
    ),
    "RotatingKVCache": _Class(
        frozenset(("keep", "max_size")), moving=frozenset(("index", "offset"))
    ),
    "ChunkedKVCache": _Class(frozenset(("chunk_size",)), moving=frozenset(("offset", "start"))),
    "ArraysCache": _Class(frozenset(("slots",)), frozenset()),
}
_EXTRA_STATES = frozenset(("left_padding", "lengths"))


class _Detail(msgspec.Struct):
    states: dict[str, dict[str, int]]


_decode_layout = msgspec.json.Decoder(list[Layout]).decode
_decode_detail = msgspec.json.Decoder(_Detail).decode


def encode_layout(layouts: Sequence[Layout]) -> str:
    """Canonical JSON: equal for two caches exactly when they can share runs."""
    return msgspec.json.encode(layouts, order="sorted").decode()


def layout_leaves(layouts: Sequence[Layout], prefix: str = "") -> Iterator[tuple[str, Layout]]:
    """Every layer that is not a `CacheList`, with its place, such as `3` or `3.1`."""
    for index, layout in enumerate(layouts):
        if layout.class_name == LIST_CLASS:
            yield from layout_leaves(layout.members, f"{prefix}{index}.")
        else:
            yield f"{prefix}{index}", layout


class Shapes:
    """A layout, and what blobs under it must have."""

    def __init__(self, text: str) -> None:
        """Read a layout.

        Raises:
            ValueError: It is no layout, or names what is not known.
        """
        try:
            layouts = _decode_layout(text)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ValueError(f"its layout is malformed ({error})") from None
        if not layouts:
            raise ValueError("its layout has no layers")
        if encode_layout(layouts) != text:
            raise ValueError("its layout is not in its canonical form")
        _check_members(layouts)
        self._leaves = dict(layout_leaves(layouts))

    def check(self, header: BlobHeader) -> None:
        """Hold a blob's tensors against the layout.

        Raises:
            ValueError: They do not fit; which one and why, in words.
        """
        if header.kind == "run":
            self._check_run(header)
        else:
            self._check_checkpoint(header)

    def check_entry(self, runs: Sequence[BlobHeader], checkpoint: BlobHeader | None) -> None:
        """Whether a checkpoint, with the runs before it, has all that its position needs.

        Raises:
            ValueError: A layer has neither its state nor all of its rows.
        """
        states = _detail(checkpoint).states if checkpoint is not None else {}
        for place, layer in self._leaves.items():
            if not layer.rows or place in states:
                continue
            for run in runs:
                if not _has_rows(run.tensors, place, layer):
                    raise ValueError(f"layer {place} has neither a state nor all of its rows")

    def _check_run(self, header: BlobHeader) -> None:
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
        for place, layer in self._leaves.items():
            has_rows = _has_rows(header.tensors, place, layer)
            keeps = _CLASSES[layer.class_name].keeps_rows and layer.rows
            if layer.class_name == "ArraysCache" or (layer.rows and not has_rows):
                if header.complete:
                    raise ValueError(f"is said to be complete, but has no rows of layer {place}")
                if keeps:
                    raise ValueError(f"has no rows of layer {place}, which keeps all of its own")
            if has_rows:
                lag = layer.lag
                num_rows = max(header.end - lag, 0) - max(header.start - lag, 0)
                for key, one in layer.rows.items():
                    shape = (one.batch, one.heads, num_rows, one.dim)
                    wanted[f"layers.{place}.{key}"] = one.dtype, shape
        _compare(header.tensors, wanted)

    def _check_checkpoint(self, header: BlobHeader) -> None:
        states = _detail(header).states
        stateful = {
            place: layer
            for place, layer in self._leaves.items()
            if not _CLASSES[layer.class_name].keeps_rows
            and (layer.rows or layer.class_name == "ArraysCache")
        }
        for place in sorted(stateful.keys() - states.keys()):
            raise ValueError(f"lacks the state of layer {place}")
        for place in sorted(states.keys() - stateful.keys()):
            raise ValueError(f"has a state of layer {place}, which has none")
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
        for place, layer in stateful.items():
            prefix = f"layers.{place}.state."
            moving = states[place]
            if moving.keys() != _CLASSES[layer.class_name].moving:
                raise ValueError(f"its detail has other numbers than layer {place} needs")
            if layer.class_name == "ArraysCache":
                slots = set(map(str, range(layer.scalars["slots"]))) | _EXTRA_STATES
                for name, info in header.tensors.items():
                    if name.startswith(prefix) and name.removeprefix(prefix) in slots:
                        wanted[name] = info.dtype, info.shape
                continue
            num_rows = _num_rows(header.tensors, place, layer)
            for key, one in layer.rows.items():
                wanted[prefix + key] = one.dtype, (one.batch, one.heads, num_rows, one.dim)
            if moving["offset"] != header.end - layer.lag:
                raise ValueError(f"its detail puts layer {place} at another token")
            if layer.class_name == "ChunkedKVCache":
                fits = moving["offset"] - moving["start"] == num_rows and moving["start"] >= 0
            else:
                fits = 0 <= moving["index"] <= num_rows
            if not fits:
                raise ValueError(f"its detail does not fit the rows of layer {place}")
        _compare(header.tensors, wanted)


def _check_members(layouts: Sequence[Layout]) -> None:
    for layer in layouts:
        name = layer.class_name
        if name == LIST_CLASS:
            if layer.rows or layer.scalars or layer.lag:
                raise ValueError(f"its layout is not one of {name}")
            _check_members(layer.members)
            continue
        known = _CLASSES.get(name)
        if known is None:
            raise ValueError(f"its layout names the unknown cache class {name!r}")
        if layer.scalars.keys() != known.scalars or any(v < 0 for v in layer.scalars.values()):
            raise ValueError(f"its layout has other numbers than a {name}")
        if layer.members or (layer.rows and layer.rows.keys() != known.buffers):
            raise ValueError(f"its layout has other buffers than a {name}")
        if not 0 <= layer.lag <= (MAX_LAG if layer.rows else 0):
            raise ValueError(f"its layout has a {name} that is {layer.lag} tokens behind")
        for one in layer.rows.values():
            if one.dtype not in _DTYPES:
                raise ValueError(f"its layout names the unknown type {one.dtype!r}")
            if min(one.batch, one.heads, one.dim) < 0:
                raise ValueError(f"its layout has buffers of a {name} that cannot be")


def _detail(header: BlobHeader) -> _Detail:
    try:
        return _decode_detail(header.detail)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"its detail is malformed ({error})") from None


def _has_rows(tensors: Mapping[str, TensorInfo], place: str, layer: Layout) -> bool:
    return any(f"layers.{place}.{key}" in tensors for key in layer.rows)


def _num_rows(tensors: Mapping[str, TensorInfo], place: str, layer: Layout) -> int:
    info = tensors.get(f"layers.{place}.state.{min(layer.rows)}")
    if info is None or len(info.shape) <= _STATE_ROW_AXIS:
        raise ValueError(f"lacks the state of layer {place}")
    return info.shape[_STATE_ROW_AXIS]


def _compare(
    tensors: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    for name, (dtype, shape) in wanted.items():
        info = tensors.get(name)
        if info is None:
            raise ValueError(f"lacks tensor {name!r}")
        if (info.dtype, info.shape) != (dtype, shape):
            raise ValueError(
                f"tensor {name!r} is {info.dtype} {info.shape} instead of {dtype} {shape}"
            )
    for name in tensors:
        if name not in wanted and name != TOKENS:
            raise ValueError(f"has tensor {name!r}, which its layout does not")
