"""Caches in memory: what the server hands over, cut to its key and owning its own bytes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from msgspec import Struct

from persist_cache.blobs.layout import MAX_LAG
from persist_cache.errors import UnsupportedCacheError
from persist_cache.tensors._mlx import mlx_cache, mx, tree_flatten
from persist_cache.tensors.layers import LayerKind, kind_of, leaves
from persist_cache.tensors.pieced import Pieced
from persist_cache.tensors.sharing import Known, gather
from persist_cache.tensors.witness import address_of


class LayerStatus(Struct, frozen=True):
    """How one layer can be saved.

    Attributes:
        class_name: Of its cache.
        storage: `rows`: it can be resumed at any token. `checkpoint`: only where its state was
            saved; for sliding windows and chunks this begins when the first token is dropped.
            `unsupported`: it stays in memory.
    """

    class_name: str
    storage: Literal["rows", "checkpoint", "unsupported"]


def group_size() -> int:
    """Processes that share one model (`mx.distributed`); each has a shard of every layer."""
    return int(mx.distributed.init().size())


def prepare(
    cache: Sequence[Any],
    num_tokens: int,
    find_known: Callable[[], Known | None] | None = None,
) -> int:
    """Make a cache that we now own fit to be kept, and say how many tokens it stands for.

    Evaluates every array, so that other threads may use it, and replaces views of foreign
    buffers by copies: afterwards the cache keeps no memory but its own alive. A cache that holds
    more than `num_tokens` is trimmed. Call it on the thread that computed the cache. Objects that
    are not mlx-lm caches are left alone.

    Args:
        cache: The layers; changed in place.
        num_tokens: Length of the key under which the cache was handed over.
        find_known: Finds rows of the key's first tokens that are kept already, as `known_rows`
            gives them. A cache from `extract` refers to them, instead of copying its own; it is
            asked for no other.

    Returns:
        The number of leading tokens of that key which the cache really stands for.

    Raises:
        UnsupportedCacheError: Its layers contradict the key or each other; the arrays are
            evaluated nevertheless.
    """
    gather(cache, find_known)
    try:
        return _reconcile(cache, num_tokens)
    finally:
        _own(cache)


def _reconcile(cache: Sequence[Any], num_tokens: int) -> int:
    filled = list(_filled(cache))
    offsets = [layer.offset for kind, layer in filled if kind.has_offset]
    if not offsets:
        known = [kind for _, layer in leaves(cache) if (kind := kind_of(layer)) is not None]
        nothing_yet = known and not filled and all(kind.has_offset for kind in known)
        return 0 if nothing_yet else num_tokens
    longest = max(offsets)
    if longest > num_tokens:
        if trim(cache, longest - num_tokens) != longest - num_tokens:
            raise UnsupportedCacheError(
                _class_names(cache), f"it holds {longest} tokens instead of {num_tokens}"
            )
        longest = num_tokens
    if longest - min(layer.offset for kind, layer in filled if kind.has_offset) > MAX_LAG:
        raise UnsupportedCacheError(_class_names(cache), "its layers hold different tokens")
    return int(longest)


def _own(cache: Sequence[Any]) -> None:
    arrays: list[Any] = []
    for _, layer in leaves(cache):
        if type(layer) is Pieced:
            continue  # as `gather` made it
        kind = kind_of(layer)
        if kind is None:
            # Nothing is known of it but that unevaluated arrays must not cross threads.
            state = None
            with contextlib.suppress(Exception):
                state = layer.state
            arrays += [leaf for _, leaf in tree_flatten(state) if isinstance(leaf, mx.array)]
            continue
        kind.settle(layer)
        # `mx.contiguous` copies what is strided or much smaller than its buffer, and nothing else.
        own = {name: mx.contiguous(array) for name, array in kind.arrays(layer).items()}
        if own:
            kind.assign(layer, own)
            arrays += own.values()
    mx.eval(arrays)


def can_trim(cache: Sequence[Any]) -> bool:
    """Whether tokens can be taken back from every layer."""
    for _, layer in leaves(cache):
        kind = kind_of(layer)
        if kind is None:
            is_trimmable = getattr(layer, "is_trimmable", None)
            if is_trimmable is None or not is_trimmable():
                return False
        elif not kind.can_trim(layer):
            return False
    return True


def trim(cache: Sequence[Any], num_tokens: int) -> int:
    """Take back the last `num_tokens` tokens of every layer, or of none.

    Returns:
        `num_tokens`, or 0 if a layer could not be trimmed by as many. Only layers of foreign
        classes may give less; then it is the least of all layers.
    """
    if num_tokens <= 0 or not cache or not can_trim(cache):
        return 0
    filled = list(_filled(cache))
    if any(layer.offset < num_tokens for _, layer in filled):
        return 0
    trimmed = num_tokens
    for kind, layer in filled:
        trimmed = min(trimmed, kind.trim(layer, num_tokens))
    for _, layer in leaves(cache):
        if kind_of(layer) is None:
            trimmed = min(trimmed, int(layer.trim(num_tokens)))
    return trimmed


def num_tokens(cache: Sequence[Any]) -> int | None:
    """Tokens that the longest layer holds; None if no layer counts them."""
    offsets = [getattr(layer, "offset", None) for _, layer in leaves(cache)]
    return max((offset for offset in offsets if isinstance(offset, int)), default=None)


def nbytes(cache: Sequence[Any]) -> int:
    """Bytes of all buffers, their unused rows included."""
    total = 0
    for _, layer in leaves(cache):
        kind = kind_of(layer)
        if kind is None:
            total += getattr(layer, "nbytes", 0)
        else:
            total += sum(array.nbytes for array in _buffers(kind, layer))
    return total


def buffers(cache: Sequence[Any]) -> dict[int, int]:
    """Bytes of each buffer of a prepared cache, by its address: those of several may be shared."""
    found: dict[int, int] = {}
    for _, layer in leaves(cache):
        kind = kind_of(layer)
        if kind is None:
            found[id(layer)] = getattr(layer, "nbytes", 0)
            continue
        found |= {address_of(array): array.nbytes for array in _buffers(kind, layer)}
    return found


def _buffers(kind: LayerKind, layer: Any) -> Iterator[Any]:
    for parts in kind.buffers(layer).values():
        for array, _ in parts:
            yield array


def copy_cache(cache: list[Any]) -> list[Any]:
    """A cache that may be decoded on its own.

    Costs nothing at once: buffers are shared until one of the two writes to them.
    """
    return copy.deepcopy(cache)


def supported(cache: Sequence[Any]) -> list[LayerStatus]:
    """How each layer of a cache can be saved, by its class; it may be empty yet."""
    return [_status(layer) for layer in cache]


def _status(layer: Any) -> LayerStatus:
    name = type(layer).__name__
    if type(layer) is mlx_cache.CacheList:
        members = {_status(member).storage for member in layer.caches}
        for storage in ("unsupported", "checkpoint"):
            if storage in members:
                return LayerStatus(name, storage)
        return LayerStatus(name, "rows")
    kind = kind_of(layer)
    if kind is None:
        return LayerStatus(name, "unsupported")
    return LayerStatus(name, "rows" if kind.always_rows else "checkpoint")


def _filled(cache: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Every known layer that has a state."""
    for _, layer in leaves(cache):
        kind = kind_of(layer)
        if kind is not None and kind.arrays(layer):
            yield kind, layer


def _class_names(cache: Sequence[Any]) -> str:
    return "+".join(sorted({type(layer).__name__ for _, layer in leaves(cache)}))
