"""Live caches that are lists of tokens, and the codec for them: no MLX, all decisions visible."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from persist_cache import UnsupportedCacheError
from persist_cache.codec import Blob, Source
from tests.fakes import FakeSource, restore

MODEL = ("model", None, None)


class FakeLayer:
    """Stands for a KV cache that has seen `tokens`, computed by `weights`."""

    def __init__(self, tokens: Sequence[int], trimmable: bool = True, weights: str = "w0") -> None:
        self.tokens = list(tokens)
        self.trimmable = trimmable
        self.weights = weights


@dataclass(frozen=True)
class FakeWitness:
    """Remembers the tokens, as `tensors.Witness` remembers the buffers."""

    tokens: tuple[int, ...]

    def fits(self, cache: Sequence[Any]) -> bool:
        return tuple(cache[0].tokens) == self.tokens


class FakeCodec:
    """The contract of `persist_cache.tensors`, for `FakeLayer`."""

    def __init__(self) -> None:
        self.copies = 0
        self.unsupported = False
        self.ranks = 1

    def group_size(self) -> int:
        return self.ranks

    def prepare(self, cache: Sequence[Any], num_tokens: int) -> int:
        if self.unsupported:
            raise UnsupportedCacheError("LayerCache")
        return min(num_tokens, len(cache[0].tokens))

    def source(self, cache: Sequence[Any], num_tokens: int) -> Source:
        layer = cache[0]
        return FakeSource(
            layer.tokens[:num_tokens],
            complete=layer.trimmable,
            layout=json.dumps({"weights": layer.weights}),
        )

    def restore(
        self,
        runs: Sequence[tuple[Blob, int]],
        checkpoint: Blob | None,
        num_tokens: int,
    ) -> list[FakeLayer]:
        restored = restore(runs, checkpoint, num_tokens)
        # Row i is the sum of the tokens up to i, so the tokens can be had back from the rows.
        sums = [int(row) for row in restored.rows[0, 0, :, 0]]
        tokens = [b - a for a, b in zip([0, *sums], sums, strict=False)]
        weights = json.loads(runs[0][0].header.layout)["weights"]
        return [FakeLayer(tokens, trimmable=checkpoint is None, weights=weights)]

    def can_trim(self, cache: Sequence[Any]) -> bool:
        return bool(cache[0].trimmable)

    def trim(self, cache: Sequence[Any], num_tokens: int) -> int:
        cache[0].tokens = cache[0].tokens[: len(cache[0].tokens) - num_tokens]
        return num_tokens

    def nbytes(self, cache: Sequence[Any]) -> int:
        return 64 * len(cache[0].tokens)

    def copy_cache(self, cache: Any) -> Any:
        self.copies += 1
        return [FakeLayer(cache[0].tokens, cache[0].trimmable, cache[0].weights)]

    def num_tokens(self, cache: Sequence[Any]) -> int | None:
        return len(cache[0].tokens)

    def witness(self, cache: Sequence[Any]) -> FakeWitness:
        return FakeWitness(tuple(cache[0].tokens))


class TokenCodec(FakeCodec):
    """Restores what `tests.fakes.put` stored, whose layout names no weights."""

    def source(self, cache: Sequence[Any], num_tokens: int) -> FakeSource:
        return FakeSource(cache[0].tokens[:num_tokens])

    def restore(
        self, runs: Sequence[tuple[Blob, int]], checkpoint: Blob | None, num_tokens: int
    ) -> list[FakeLayer]:
        return [FakeLayer(range(num_tokens))]
