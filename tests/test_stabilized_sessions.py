"""Whole sessions with repairs: they cost no reuse, and a new date costs one turn at most."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from persist_cache.server.form import Form
from persist_cache.server.protocols.anthropic_request import read_messages
from persist_cache.server.rendering import read_request, render
from persist_cache.server.ticket import Ticket
from persist_cache.stability.names import DEFAULTS, REPAIRS
from persist_cache.tokens import common_prefix_tokens, pack_tokens
from tests.loops import Loop
from tests.prompt_shapes import CLAUDE_CODE_ENV
from tests.repair_pairs import THINKING_TEMPLATE
from tests.sessions import SERVER, ask, session
from tests.test_sessions import MODELS
from tests.tiny_models import build_model_dir
from tests.waiting import until

ALL = frozenset(REPAIRS)
SHORT, LONG = (2, 4), (3, 10)
"""Turns of the user, and of tools in each."""


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose cache can be cut anywhere, and one that can be resumed where it was kept."""
    name = request.param
    return build_model_dir(tmp_path_factory.mktemp(name) / "model", **MODELS[name])


def bodies(*days: str, turns: tuple[int, int] = SHORT) -> list[dict[str, Any]]:
    """A conversation that tells its folder and the date; the last day from its middle on."""
    whole = list(session(user_turns=turns[0], tool_turns=turns[1], tools=2, words=6))
    begins = whole[1]["messages"][0]["content"][0]
    said = [one for one in whole if one["messages"][0]["content"][0] == begins]
    for place, body in enumerate(said):
        day = days[0] if place < len(said) // 2 else days[-1]
        told = CLAUDE_CODE_ENV.format(folder="/home/u/a", iso=day, day=day, file="a")
        body["system"][-1]["text"] = f"{told}\n{body['system'][-1]['text']}"
    return said


def hold(loop: Loop, said: Sequence[dict[str, Any]], names: frozenset[str]) -> tuple[int, int]:
    """Tokens of a session's prompts, and those that the model computed."""
    until(lambda: loop.provider.model is not None, "no model was loaded")
    loop.count()
    loop.prefilled()
    total = computed = 0
    for body in copy.deepcopy(list(said)):
        ticket = ask(loop, body, names)
        assert ticket.prompt is not None
        total += len(ticket.prompt.tokens)
        computed += loop.prefilled() + 1
    return total, computed


@pytest.mark.parametrize("turns", [SHORT, pytest.param(LONG, marks=pytest.mark.long)])
def test_repairs_cost_no_reuse_and_a_new_date_one_turn_at_most(
    turns: tuple[int, int], model: Path, tmp_path: Path
) -> None:
    days = ("2026-11-25", "2026-11-26")
    found = []
    for place, (names, told) in enumerate([(DEFAULTS, days[:1]), (ALL, days[:1]), (ALL, days)]):
        with Loop(model, tmp_path / f"{place}", **SERVER) as loop:
            found.append(hold(loop, bodies(*told, turns=turns), names))
    (_, plain), (_, repaired), (total, changed) = found

    requests = turns[0] * (1 + turns[1])
    assert len(bodies("", turns=turns)) == requests
    # A line is empty in front of what was moved.
    assert repaired <= plain + 4
    longest = 2 * total / requests
    assert changed - repaired <= longest / turns[0]


def test_first_requests_of_two_sessions_part_behind_tools(model: Path) -> None:
    first, second = (bodies(day)[0] for day in ("2026-11-25", "2026-11-26"))
    with Loop(model, **SERVER) as loop:
        until(lambda: loop.provider.model is not None, "no model was loaded")
        tickets = [ask(loop, body, ALL) for body in (first, second)]

    prompts = [pack_tokens(one.prompt.tokens) for one in tickets if one.prompt is not None]
    shared = common_prefix_tokens(*prompts)
    assert tickets[1].fetch is not None
    assert tickets[1].repaired == ("billing", "countdown", "date", "env")
    # Where the whole state has to be kept, that is done at the end of the system part.
    assert tickets[1].fetch.num_tokens > 0.9 * shared


def test_chat_is_repaired_as_messages_are_and_explained_as_it_is_served(tmp_path: Path) -> None:
    folder = build_model_dir(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(THINKING_TEMPLATE)
    system = "You help.\nToday's date: 2026-11-{}\nBe brief."
    said = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi", "reasoning_content": "A greeting."},
        {"role": "system", "content": "Plan mode is on."},
        {"role": "user", "content": "Go on"},
    ]
    with Loop(folder) as loop:
        until(lambda: loop.provider.model is not None, "no model was loaded")
        for day in (25, 26):
            messages = [{"role": "system", "content": system.format(day)}, *said]
            ticket = Ticket()
            ticket.stabilize = ALL
            answered = loop.ask(messages, ticket=ticket, max_tokens=1)
            body = {"messages": messages}
            explained = render(
                loop.provider.tokenizer,
                read_request(body, "chat", stabilize=ALL),
                moves=loop.generator.moves.of(""),
            )
            assert explained.tokens == answered.prompt
            assert explained.repaired == ticket.repaired == ("date", "thinking")
            said += [{"role": "assistant", "content": "Yes"}, {"role": "user", "content": "And?"}]
        text = loop.provider.tokenizer.decode(answered.prompt)

    assert loop.cache.stats().repaired == {"date": 2, "thinking": 2}
    assert text.index("2026-11-25") < text.index("A greeting.") < text.index("2026-11-26")
    assert text.index("And?") < text.index("2026-11-26")


def test_counting_tokens_leaves_no_trace(tmp_path: Path) -> None:
    folder = build_model_dir(tmp_path / "model")
    body = bodies("2026-11-25")[0]
    with Loop(folder, **SERVER) as loop:
        until(lambda: loop.provider.spare is not None, "no tokenizer")
        counting = read_messages({**body, "max_tokens": None}, counting=True, stabilize=ALL)
        ticket = Ticket(form=Form(counting, loop.generator.templates, {}))
        ticket.stabilize = ALL
        counted = loop.generator.count_tokens(counting, ticket)
        assert len(loop.generator.moves.of("")) == 0

        asked = ask(loop, body, ALL)

    assert asked.prompt is not None
    assert counted == len(asked.prompt.tokens)
    assert ticket.repaired == asked.repaired
