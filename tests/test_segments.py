"""Where prompts are cut, and where their caches are kept."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from persist_cache.server.segments import checkpoints, cut_turn, thought_start

END, THINK = 800, 900


class Tokenizer:
    """Messages are a token for the role and one for each letter; an open thought ends them."""

    has_chat_template = True

    def __init__(self, tail: tuple[int, ...] = ()) -> None:
        self.has_thinking = bool(tail)
        self._tail = tail

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, **_: Any
    ) -> list[int]:
        roles = ("system", "user", "assistant", "tool")
        tokens = []
        for message in messages:
            tokens += [roles.index(message["role"]), *map(ord, message["content"]), END]
        return [*tokens, 2, *self._tail] if add_generation_prompt else tokens

    def rfind_think_start(self, tokens: list[int], start: int) -> int:
        places = [place for place in range(start, len(tokens)) if tokens[place] == THINK]
        return places[-1] if places else -1


MESSAGES = [
    {"role": "system", "content": "abc"},
    {"role": "user", "content": "de"},
    {"role": "tool", "content": "f"},
]


def cut(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[tuple[str, int]]:
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    segments, kinds = cut_turn(tokenizer, messages, None, {}, prompt)
    assert [*chain(*segments)] == prompt
    return [(kind, len(piece)) for kind, piece in zip(kinds, segments, strict=True)]


def test_open_thought_is_cut_off_a_tool_turn() -> None:
    assert cut(Tokenizer((THINK, 10)), MESSAGES) == [
        ("system", 6),
        ("user", 7),
        ("assistant", 2),
    ]


def test_tool_turn_without_thought_is_system_and_user() -> None:
    assert cut(Tokenizer(), MESSAGES) == [("system", 6), ("user", 7)]
    assert cut(Tokenizer(), MESSAGES[1:]) == [("user", 8)]


def test_text_is_one_user_piece_whatever_it_ends_with() -> None:
    prompt = [5, 6, THINK]

    assert cut_turn(Tokenizer((THINK,)), [], None, {}, prompt) == ([prompt], ["user"])


@pytest.mark.parametrize("length", [1, 5, 11, 12, 40])
def test_thought_is_looked_for_at_the_end_only(length: int) -> None:
    prompt = [1, THINK, *range(2, 2 + length)]

    assert thought_start(Tokenizer((THINK,)), prompt) == (1 if length < 11 else len(prompt))


@pytest.mark.parametrize(
    ("lengths", "leave", "expected"),
    [
        ((4, 6), 0, [(4, "system"), (9, "user")]),
        ((4, 6), 3, [(4, "system"), (7, "user")]),
        ((4, 6), 8, [(2, "system")]),
        ((4, 6), 30, []),
        ((4, 6, 2), 0, [(4, "system"), (10, "user")]),
        ((4, 6, 2), 1, [(4, "system"), (10, "user")]),
        ((4,), 0, [(3, "system")]),
    ],
)
def test_checkpoints_leave_what_the_loop_has_to_compute(
    lengths: tuple[int, ...], leave: int, expected: list[tuple[int, str]]
) -> None:
    segments = [[0] * length for length in lengths]
    kinds = ["system", "user", "assistant"][: len(lengths)]

    assert checkpoints(segments, kinds, leave) == expected
