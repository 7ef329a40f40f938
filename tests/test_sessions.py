"""An agent's session over Messages or Responses: its prefix holds, also after a restart."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store
from persist_cache.entry import Tier
from persist_cache.queries.details import tokens_of
from persist_cache.server.form import Form
from persist_cache.server.protocols.anthropic_request import read_messages
from persist_cache.server.ticket import Ticket
from persist_cache.server.translated import usage_of
from persist_cache.stability import repairs
from persist_cache.tokens import common_prefix_tokens, pack_tokens
from tests import responses_bodies
from tests.anthropic_bodies import EPHEMERAL, agent_body, as_messages
from tests.loops import Loop, text_of, words
from tests.sessions import SERVER, ask, converse, converse_until_killed, session
from tests.tiny_models import build_model_dir
from tests.torture.tiny import KINDS, write_model
from tests.waiting import until

RECORDED = [
    path
    for path in sorted((Path(__file__).parent / "requests").glob("*.json"))
    if path.stem != "llm-07"  # which has an image
]
NARROW: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 1, "head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": NARROW,
    "sliding": {
        **NARROW,
        "model_type": "gemma3_text",
        "sliding_window": 64,
        "sliding_window_pattern": 2,
    },
}
SMALL: dict[str, Any] = {"user_turns": 2, "tool_turns": 4, "tools": 4, "words": 30}


ONE = [pytest.param("llama"), pytest.param("sliding", marks=pytest.mark.long)]
OTHER = [pytest.param("llama", marks=pytest.mark.long), pytest.param("sliding")]
"""For what takes long: the other model comes with `scripts/test --all`."""


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    return build_model_dir(tmp_path_factory.mktemp(name) / "model", **MODELS[name])


@pytest.mark.parametrize("model", ONE, indirect=True)
def test_what_could_be_reused_is_reused_before_and_after_a_kill(
    model: Path, tmp_path: Path
) -> None:
    bodies, store = list(session(**SMALL)), tmp_path / "store"
    half = len(bodies) // 2
    first, prompts = converse_until_killed(tmp_path, model, store, SMALL, half)
    with Loop(model, store, **SERVER) as loop:
        second = converse(loop, bodies[half:], prompts)

    for found in (first, second):
        assert found.common > 0.7 * found.total, "the session has a prefix that holds"
        assert found.share >= 0.99
        assert found.read == found.total - found.computed


@pytest.mark.parametrize("model", OTHER, indirect=True)
def test_session_over_responses_is_reused_before_and_after_a_restart(
    model: Path, tmp_path: Path
) -> None:
    bodies, prompts = list(responses_bodies.session(**SMALL)), list[bytes]()
    half = len(bodies) // 2
    for part in (bodies[:half], bodies[half:]):
        with (
            Store.open(tmp_path / "store", min_free_bytes=0) as store,
            Loop(model, store, **SERVER) as loop,
        ):
            found = converse(loop, part, prompts)

        assert found.common > 0.7 * found.total, "the session has a prefix that holds"
        assert found.share >= 0.99
        assert found.read == found.total - found.computed


def rows_of_prompts(store: Store) -> int:
    """Tokens that the store has rows of, in the tiers of prompts."""
    prompts = sorted(
        tokens_of(store, one.id) for one in store.entries() if one.tier != Tier.ASSISTANT
    )
    before: list[int] = []
    rows = 0
    for tokens in prompts:
        rows += len(tokens) - common_prefix_tokens(pack_tokens(before), pack_tokens(tokens))
        before = tokens
    return rows


@pytest.mark.parametrize("model", OTHER, indirect=True)
def test_what_was_said_to_be_written_is_what_the_store_gained(model: Path, tmp_path: Path) -> None:
    bodies = list(session(**SMALL))
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        before = 0
        for part in (bodies[:8], bodies[8:12], bodies[12:]):
            with Loop(model, store, **SERVER) as loop:
                written = converse(loop, part).written
                loop.cache.flush()

            assert written == rows_of_prompts(store) - before
            before += written


@pytest.mark.parametrize("kind", ["plain", "thinking", "sliding", "hybrid"])
def test_replies_that_come_back_are_not_said_to_be_written(kind: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", KINDS[kind], 0)
    messages = [{"role": "system", "content": words(0, 40)}]
    written = replied = length = 0
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        with Loop(folder, store) as loop:
            for turn in range(4):
                messages.append({"role": "user", "content": words(turn + 1, 30)})
                ticket = Ticket()
                ticket.origin.counts_written = True
                answered = loop.ask(messages, ticket=ticket, max_tokens=6)
                written += answered.ticket.written_tokens
                replied += max(0, answered.cached - length) if turn else 0
                length = len(answered.prompt)
                messages.append({"role": "assistant", "content": text_of(answered)})
            loop.cache.flush()

        assert rows_of_prompts(store) == written + replied


def test_requests_that_are_answered_together_say_once_what_they_share(
    model: Path, tmp_path: Path
) -> None:
    bodies = list(session(**SMALL))[1:2] * 4
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        with Loop(model, store, **SERVER) as loop:
            until(lambda: loop.provider.model is not None, "no model was loaded")
            with ThreadPoolExecutor(len(bodies)) as clients:
                tickets = list(clients.map(partial(ask, loop), bodies))
            loop.cache.flush()

        assert sum(one.written_tokens for one in tickets) == rows_of_prompts(store)


def test_nothing_is_said_to_be_written_without_a_disk(model: Path) -> None:
    with Loop(model, **SERVER) as loop:
        assert converse(loop, list(session(**SMALL))[:3]).written == 0


def test_counted_is_what_is_read_written_and_left_of_every_body(tmp_path: Path) -> None:
    recorded = [json.loads(path.read_text())["body"] for path in RECORDED]
    bodies = [as_messages(body) for body in recorded]
    bodies += [{**agent_body(), "max_tokens": 1, "thinking": None}, *session(**SMALL)]
    small = build_model_dir(
        tmp_path / "model",
        vocab_size=4096,
        corpus=[path.read_text() for path in RECORDED],
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=65_536,
    )
    with Loop(small, tmp_path / "store", **SERVER) as loop:
        until(lambda: loop.provider.model is not None, "no model was loaded")
        for body in bodies:
            counting = read_messages({**body, "max_tokens": None}, counting=True)
            form = Form(counting, loop.generator.templates, {})
            counted = loop.generator.count_tokens(counting, Ticket(form=form))

            usage = usage_of(ask(loop, body))

            assert usage.input + usage.read + usage.written == counted


@pytest.mark.long
def test_billing_line_and_countdown_would_cost_the_whole_prefix(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = list(session(**{**SMALL, "user_turns": 1}))
    with Loop(model, **SERVER) as loop:
        repaired = converse(loop, bodies)
    monkeypatch.setattr(repairs, "without_billing", lambda text: text)
    monkeypatch.setattr(repairs, "without_countdown", lambda text: text)
    with Loop(model, **SERVER) as loop:
        plain = converse(loop, bodies)

    assert repaired.read > 0.6 * repaired.total
    assert plain.read < 0.1 * plain.total


def test_what_is_marked_is_kept_for_as_long_as_the_mark_says(model: Path, tmp_path: Path) -> None:
    hour = {"type": "ephemeral", "ttl": "1h"}
    system = [{"type": "text", "text": "Be brief. " * 20, "cache_control": hour}]
    text = [{"type": "text", "text": "What is it?", "cache_control": EPHEMERAL}]
    plain = [{"role": "user", "content": "Who is it?"}]
    common: dict[str, Any] = {"model": "m", "max_tokens": 1}
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        with Loop(model, store, **SERVER) as loop:
            ask(loop, {**common, "system": "Be kind. " * 20, "messages": plain})
            ask(loop, {**common, "system": system, "messages": plain})
            ask(
                loop,
                {**common, "system": system, "messages": [{"role": "user", "content": text}]},
            )
            loop.cache.flush()

        found = sorted((entry.tier, entry.keep_s) for entry in store.entries())
    replies, prompts = found[:-5], found[-5:]
    assert prompts == [
        (Tier.USER, 0),
        (Tier.USER, 0),
        (Tier.USER, 300),
        (Tier.SYSTEM, 0),
        (Tier.SYSTEM, 3600),
    ]
    assert {keep_s for _, keep_s in replies} == {0}
