"""Marks of a client are found among the tokens of its prompt, by one more rendering."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from persist_cache.server.marks import place_marks
from persist_cache.server.protocols.asked import Mark
from tests import tiny_models
from tests.test_templates import CLOCK, HOISTING, MESSAGES, render

TOOLS_FIRST = """\
{%- for tool in tools or [] %}[{{ tool | tojson }}]{% endfor -%}
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content | trim }}
{% endfor -%}
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tiny_models.build_model_dir(tmp_path_factory.mktemp("model"))
    return PreTrainedTokenizerFast.from_pretrained(folder)


class Counter:
    """Places marks as the server does, with a template of its own."""

    def __init__(self, tokenizer: Any, template: str = tiny_models.CHAT_TEMPLATE) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.renderings = 0

    def render(self, messages: Sequence[Any], tools: Any) -> str:
        self.renderings += 1
        return render(self._template, messages, tools)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        said = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return said["input_ids"], said["offset_mapping"]

    def place(
        self, messages: Sequence[Any], marks: Sequence[Mark], tools: Any = None
    ) -> tuple[list[str | None], str]:
        """The text in front of each mark, and the whole prompt."""
        text = render(self._template, messages, tools)
        prompt = self.encode(text)[0]
        found = place_marks(messages, tools, marks, prompt, render=self.render, encode=self.encode)
        return [
            None if count is None else self._tokenizer.decode(prompt[:count]) for count in found
        ], text


def test_all_marks_are_placed_by_one_rendering(tokenizer: Any) -> None:
    counter = Counter(tokenizer)
    marks = [Mark(0, 5, 300), Mark(1, 4, 300), Mark(1, 16, 300), Mark(1, None, 300)]

    found, text = counter.place(MESSAGES, marks, [CLOCK])

    assert counter.renderings == 1
    assert all(said is not None and text.startswith(said) for said in found)
    assert found[0] == text[: text.index("Be brief.") + 5]
    assert found[2] == found[3] == text[: text.index("What time") + 16]


def test_mark_is_at_most_a_token_away_from_its_text(tokenizer: Any) -> None:
    drawn = random.Random(18)
    counter = Counter(tokenizer)
    for _ in range(100):
        place = drawn.choice([0, 1, 3, 4, 5])
        content = MESSAGES[place]["content"]
        characters = drawn.randrange(1, len(content) + 1)

        (said,), text = counter.place(MESSAGES, [Mark(place, characters, 300)])

        exact = text.index(content) + characters
        assert said is not None
        assert text.startswith(said)
        longest = max(map(len, (tokenizer.decode([one]) for one in counter.encode(text)[0])))
        assert exact - longest < len(said) <= exact


def test_mark_on_tool_calls_is_where_the_next_message_begins(tokenizer: Any) -> None:
    (said,), text = Counter(tokenizer).place(MESSAGES, [Mark(2, None, 300)])

    assert said == text[: text.index("Six.")]


@pytest.mark.parametrize(
    ("template", "behind"),
    [(tiny_models.CHAT_TEMPLATE, "What time"), (TOOLS_FIRST, "Be brief.")],
)
def test_mark_on_tools_is_behind_them_wherever_they_are_printed(
    tokenizer: Any, template: str, behind: str
) -> None:
    (said,), text = Counter(tokenizer, template).place(MESSAGES, [Mark(-1, None, 300)], [CLOCK])

    assert said == text[: text.index(behind)]
    assert "clock" in said


def test_mark_on_text_that_is_not_printed_as_it_is_cannot_be_told(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello \n"}, {"role": "tool", "content": "gone"}]

    found, _ = Counter(tokenizer, TOOLS_FIRST).place(messages, [Mark(0, 6, 300), Mark(0, 5, 300)])
    lost, _ = Counter(tokenizer, HOISTING).place(messages, [Mark(1, 4, 300)])

    assert found[0] is None or found[0].endswith("Hello")
    assert lost == [None]


def test_text_that_holds_the_signs_themselves_has_no_places(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Zq5ca1x0x5ca1qZ Hello"}]

    assert Counter(tokenizer).place(messages, [Mark(0, 5, 300)])[0] == [None]
