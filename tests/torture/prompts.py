"""What the workers store: conversations that share system prompts, known from two numbers.

So a worker, and the judge after it, can tell what any prefix must hold without having been told.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

CONVERSATIONS = 30
TURNS = 6
_SYSTEMS = 5


@dataclass(frozen=True, slots=True, order=True)
class Prompt:
    """Turn `turn` of conversation `number`; turn 0 is the system prompt alone."""

    number: int
    turn: int

    @property
    def tokens(self) -> list[int]:
        system = self.number % _SYSTEMS
        opening = [1000 + system, *range(2, 14 + 5 * system)]
        rest = [
            (self.number * 131 + place * 17) % 40_000 - 20_000 for place in range(self.turn * 6)
        ]
        return [*opening, *rest]

    @property
    def complete(self) -> bool:
        """Whether its model keeps all rows; others can be resumed only where a state is."""
        return self.number % 3 > 0

    @property
    def model(self) -> str:
        return "w0" if self.complete else "w1"

    @property
    def tier(self) -> str:
        return "system" if self.turn == 0 else ("user", "assistant")[self.turn % 2]

    @property
    def pinned(self) -> bool:
        return self.number == 7 and self.turn == 0

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        return self.model, tuple(self.tokens)


def any_prompt(dice: random.Random) -> Prompt:
    return Prompt(dice.randrange(CONVERSATIONS), dice.randrange(TURNS))
