"""A layer whose rows lie in several buffers, which other caches may share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

_LEAST_USED = 2


class Piece(Struct, frozen=True, eq=False):
    """Consecutive rows of one layer, in evaluated buffers that nobody writes to.

    Attributes:
        arrays: `keys` and `values`, `(B, H, rows, D)`.
        num_rows: How many of the rows count, from the first on.
    """

    arrays: Mapping[str, Any]
    num_rows: int

    def cut(self, num_rows: int) -> Piece:
        """Its first rows, in the same buffers."""
        return self if num_rows == self.num_rows else Piece(self.arrays, num_rows)

    @property
    def wastes(self) -> bool:
        """Most of its rows do not count, so that a copy would take less memory."""
        num_rows: int = self.arrays["keys"].shape[2]
        return self.num_rows * _LEAST_USED < num_rows


class Pieced:
    """Stands for a `KVCache` whose rows are in several buffers. It is kept, not decoded on.

    Attributes:
        pieces: Its rows, end to end.
        offset: Tokens that it holds.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(piece for piece in pieces if piece.num_rows)
        self.offset = sum(piece.num_rows for piece in self.pieces)

    def __deepcopy__(self, memo: Any) -> Pieced:
        return Pieced(self.pieces)

    def is_trimmable(self) -> bool:
        return True

    def trim(self, num_tokens: int) -> int:
        num_tokens = min(num_tokens, self.offset)
        self.offset -= num_tokens
        self.pieces = self.first(self.offset)
        return num_tokens

    def first(self, num_rows: int) -> tuple[Piece, ...]:
        """The pieces of its first rows."""
        found: list[Piece] = []
        for piece in self.pieces:
            if num_rows <= 0:
                break
            found.append(piece.cut(min(num_rows, piece.num_rows)))
            num_rows -= piece.num_rows
        return tuple(found)
