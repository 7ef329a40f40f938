"""A prompt that is being computed can be kept on its way, for whoever waits for a part of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from persist_cache import PromptCache
from persist_cache.server.ticket import Ticket
from persist_cache.server.underway import PATIENCE_S, Underway
from tests.holding import CHAT, STEP, WAYS, held_up, models_in
from tests.loops import Loop
from tests.waiting import until

PLACE = 83


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return models_in(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["plain", "sliding", "hybrid"])
def test_prompt_is_kept_at_a_place_that_somebody_waits_for(
    model: Callable[[str], Path], kind: str, way: str
) -> None:
    """While the rest of it is computed; what was computed is not computed again."""
    ticket = Ticket()
    ticket.keep_at(PLACE)
    with Loop(model(kind), prefill_step_size=STEP) as loop:
        with held_up(loop, PLACE, ticket, **WAYS[way]) as asked:
            is_told = ticket.wait_kept(PLACE, 60)
            prompt = list(ticket.prompt.tokens) if ticket.prompt is not None else []
            known = loop.cache.known_tokens(loop.provider.model_key, prompt[:PLACE] + [3] * 9)
            assert not ticket.underway.has_ended
        answered = asked.result()
        computed = loop.prefilled()

        assert is_told
        assert known == PLACE
        assert computed == len(answered.prompt) - 1
        assert answered.cached == 0
        again = loop.ask(CHAT, **WAYS[way])
        assert again.reply == answered.reply


def with_reply(loop: Loop) -> dict[str, set[int]]:
    """The lengths of all entries by tier; nothing before the reply is among them."""
    loop.cache.flush()
    assert loop.cache.store is not None
    lengths: dict[str, set[int]] = {}
    for entry in loop.cache.store.entries():
        lengths.setdefault(entry.tier.label, set()).add(entry.num_tokens)
    return lengths if "assistant" in lengths else {}


@pytest.mark.parametrize("way", WAYS)
def test_kept_place_leaves_the_pieces_of_a_prompt_their_names(
    model: Callable[[str], Path], way: str, tmp_path: Path
) -> None:
    """A cut of our own must not be taken for the end of the system part, say."""
    tickets = [Ticket(), Ticket()]
    for place in (20, PLACE):
        tickets[1].keep_at(place)
    kept: list[dict[str, set[int]]] = []
    for number, ticket in enumerate(tickets):
        store = tmp_path / str(number)
        with Loop(model("hybrid"), store, prefill_step_size=STEP) as loop:
            loop.ask(CHAT, ticket=ticket, **WAYS[way])
            # The reply is kept after it was read.
            kept.append(until(partial(with_reply, loop)))

    assert {tier: one - {20, PLACE} for tier, one in kept[1].items()} == kept[0]


def test_whoever_waits_is_told_of_a_place_that_was_passed_already(
    model: Callable[[str], Path],
) -> None:
    """A state cannot be kept there any more; waiting for it would be in vain."""
    ticket = Ticket()
    with Loop(model("hybrid"), prefill_step_size=STEP) as loop:
        with held_up(loop, 3 * STEP, ticket):
            ticket.keep_at(20)

            assert ticket.wait_kept(20, 0)
            assert not ticket.wait_kept(4 * STEP, 0)
        assert ticket.wait_kept(10 * STEP, 60)


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_were_passed_already_are_kept_with_the_next_chunk(
    model: Callable[[str], Path], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes later waits for a part that is computed, but was not kept."""
    ticket = Ticket()
    insert_cache, lengths = PromptCache.insert_cache, []

    def noted(self: PromptCache, key: Any, tokens: Any, *arguments: Any, **options: Any) -> None:
        lengths.append(len(tokens))
        insert_cache(self, key, tokens, *arguments, **options)

    with Loop(model("plain"), prefill_step_size=STEP) as loop:
        with held_up(loop, 4 * STEP, ticket, **WAYS[way]) as asked:
            ticket.keep_at(2 * STEP)
            assert not ticket.wait_kept(2 * STEP, 0)
            monkeypatch.setattr(PromptCache, "insert_cache", noted)
        asked.result()

    assert 4 * STEP <= lengths[0] <= 6 * STEP


@pytest.mark.parametrize("way", WAYS)
def test_whoever_waits_is_told_when_a_request_fails(model: Callable[[str], Path], way: str) -> None:
    ticket = Ticket()
    ticket.keep_at(PLACE)
    ticket.drop()
    with Loop(model("plain")) as loop:
        loop.ask(text="w1 w2")
        with pytest.raises(ConnectionAbortedError):
            loop.ask(CHAT, ticket=ticket, **WAYS[way])

        assert ticket.wait_kept(PLACE, 60)


def test_prefill_is_given_up_when_its_client_is_gone_for_long_and_nobody_else_waits() -> None:
    now = 0.0
    underway = Underway(lambda: now)
    underway.begin(0)

    assert not underway.is_given_up()
    assert underway.leave()
    now = PATIENCE_S - 1
    assert not underway.is_given_up()
    now = PATIENCE_S + 1
    with underway.followed(0.0):
        assert underway.followers == 1
        assert not underway.is_given_up()
    assert underway.is_given_up()
    assert underway.end()
    assert not underway.is_given_up()


def test_prefill_that_is_in_the_way_ends_when_its_client_is_gone() -> None:
    underway = Underway()
    underway.begin(0)

    underway.hurry(5.0)
    with underway.followed(4.0):
        assert not underway.is_given_up()
        underway.leave()
        assert not underway.is_given_up()
    assert underway.is_given_up()
    with underway.followed(6.0):
        assert underway.is_given_up(), "it came later than the one that waits for the end"


def test_prefill_is_saved_at_growing_distances() -> None:
    """A file for each eighth of a long one, and none that its header would outweigh."""
    now = 0.0
    underway = Underway(lambda: now)
    underway.begin(0)
    saved = []
    for second in range(1, 1001):
        now = float(second)
        if underway.claims_saving(second * 100, second * 10_000_000):
            underway.kept(second * 100)
            saved.append(second)

    assert saved[:4] == [2, 4, 6, 8]
    assert len(saved) < 48, "so many files on one way would be merged"
    assert all(b - a <= max(2, b / 8 + 1) for a, b in pairwise(saved))
    now = 2000.0
    assert not underway.claims_saving(100_100, 100_100)


def test_states_are_saved_on_the_way_while_they_are_little_beside_the_rows() -> None:
    now = 0.0
    underway = Underway(lambda: now)
    underway.begin(0)
    saved = []
    for second in range(1, 101):
        now = float(second)
        rows, states = second * 2_000_000, 3_000_000
        if underway.claims_saving(second * 100, rows + states, states):
            underway.kept(second * 100)
            saved.append(second)

    assert saved[0] >= 15
    assert all(b - a >= 10 for a, b in pairwise(saved))
    assert all(number * 3 <= 0.1 * 2 * at + 1e-9 for number, at in enumerate(saved, 1))
    assert len(saved) >= 4
