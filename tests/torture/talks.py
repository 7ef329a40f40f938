"""Random conversations: they go on, branch, are edited, cut, sent again and left in the middle."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.torture.serving import Answer, Ask
from tests.torture.tiny import WORDS

Message = dict[str, str]
_LONGEST = 24
"""Messages; a longer conversation is begun again."""


@dataclass
class Talks:
    """The conversations of one store's life, so many that beginnings meet again.

    Attributes:
        known: Their messages, by number.
    """

    dice: random.Random
    systems: list[str]
    known: dict[int, list[Message]] = field(default_factory=dict)

    @classmethod
    def begun(cls, seed: int) -> Talks:
        """Conversations under a few system prompts, one of which is another with a changed word."""
        dice = random.Random(seed)
        first = _words(dice, 70)
        second = list(first)
        second[dice.randrange(70)] = dice.choice(WORDS)
        systems = [first, second, first[:40], _words(dice, 30), []]
        return cls(dice, [" ".join(words) for words in systems])

    def asks(self, dice: random.Random, models: Sequence[dict[str, Any]]) -> list[tuple[int, Ask]]:
        """One to four requests to be sent at once; no two of the same conversation."""
        taken: set[int] = set()
        asks: list[tuple[int, Ask]] = []
        for _ in range(dice.choice((1, 1, 1, 2, 3, 4))):
            number, ask = self._one(dice)
            if number in taken:
                continue
            taken.add(number)
            asks.append((number, _with(ask, **dice.choice(models))))
        if dice.random() < 0.1:
            asks.append((-1, asks[0][1]))  # the same one twice
        return asks

    def answered(self, number: int, answer: Answer) -> None:
        """Keep the reply, if the client stayed and it belongs to a conversation."""
        if number < 0 or answer.error or not answer.ask.messages:
            return
        talk = [dict(message) for message in answer.ask.messages]
        if answer.ask.leave_after is None:
            talk.append({"role": "assistant", "content": answer.text})
        self.known[number] = talk

    # ---- what is asked -----------------------------------------------------------------------

    def _one(self, dice: random.Random) -> tuple[int, Ask]:
        number = dice.randrange(8)
        talk = list(self.known.get(number, ()))
        if not talk or len(talk) > _LONGEST or dice.random() < 0.05:
            return number, self._sized(dice, self._opening(dice))
        what = dice.choice(
            ("go on",) * 6 + ("tool", "tool", "edit", "branch", "resend", "back", "raw")
        )
        if what == "raw":
            return -2 - number, Ask(prompt=self._raw(dice, talk), max_tokens=dice.randrange(1, 8))
        if what == "branch":
            number = 8 + dice.randrange(4)
        if what in ("branch", "back", "resend"):
            # Back to an earlier turn: to say something else, or the same again.
            ends = [place for place, one in enumerate(talk) if one["role"] != "assistant"]
            end = dice.choice(ends) if what != "resend" else ends[-1]
            talk = talk[: end + (what != "branch")]
            if what != "branch" and talk[-1]["role"] in ("user", "tool"):
                return number, self._sized(dice, talk)
        if what == "edit":
            place = dice.randrange(len(talk))
            words = talk[place]["content"].split() or ["w0"]
            words[dice.randrange(len(words))] = dice.choice(WORDS)
            talk[place] = {**talk[place], "content": " ".join(words)}
        role = "tool" if what == "tool" and talk and talk[-1]["role"] == "assistant" else "user"
        said = " ".join(_words(dice, dice.choice((1, 5, 15, 40))))
        return number, self._sized(dice, [*talk, {"role": role, "content": said}])

    def _opening(self, dice: random.Random) -> list[Message]:
        system = dice.choice(self.systems)
        said: list[Message] = [{"role": "system", "content": system}] if system else []
        # Few first questions, so that conversations part late as well.
        question = " ".join(_words(random.Random(dice.randrange(6)), 12))
        return [*said, {"role": "user", "content": question}]

    def _sized(self, dice: random.Random, messages: list[Message]) -> Ask:
        gone = dice.choice((0, 1, 3)) if dice.random() < 0.08 else None
        return Ask(messages, max_tokens=dice.choice((1, 2, 4, 8, 16)), leave_after=gone)

    def _raw(self, dice: random.Random, talk: Sequence[Message]) -> str:
        """The beginning of a conversation as a text, cut at any token."""
        pieces = [f"<|start|> {one['role']} {one['content']} <|end|>" for one in talk]
        tokens = " ".join(pieces).split()
        return " ".join(tokens[: dice.randrange(1, len(tokens) + 1)])


def _words(dice: random.Random, count: int) -> list[str]:
    return [dice.choice(WORDS) for _ in range(count)]


def _with(ask: Ask, **changes: Any) -> Ask:
    from dataclasses import replace

    return replace(ask, **changes)
