"""Requests of Anthropic's Messages before templates that do not take all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persist_cache.errors import PersistCacheError
from persist_cache.server.form import Form
from persist_cache.server.protocols.anthropic_request import read_messages
from persist_cache.server.ticket import Ticket
from persist_cache.server.validation import RefusedError
from tests.anthropic_bodies import EPHEMERAL
from tests.loops import Loop
from tests.sessions import SERVER
from tests.test_templates import HEAD_ONLY, HOISTING, NINE, REFUSING_SYSTEM
from tests.tiny_models import CHAT_TEMPLATE, build_model_dir

TEMPLATES = {
    "own": CHAT_TEMPLATE,
    "refuses-system": REFUSING_SYSTEM,
    "head-only": HEAD_ONLY,
    "hoists": HOISTING,
    "nine": NINE,
}
CLOCK: dict[str, Any] = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}
BODY: dict[str, Any] = {
    "model": "m",
    "max_tokens": 1,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": EPHEMERAL}],
    "tools": [CLOCK],
    "output_config": {"effort": "low"},
    "messages": [
        {"role": "user", "content": "What time is it?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "clock", "input": {"at": "Bern"}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "Six."}],
        },
        {"role": "system", "content": "Plan mode."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Go on.", "cache_control": EPHEMERAL}],
        },
    ],
}
SAID = ["Be brief.", "What time", "I look.", "clock", "Bern", "Six.", "Plan mode.", "Go on."]


@pytest.fixture(scope="module", params=TEMPLATES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Loop]]:
    name = request.param
    model = build_model_dir(tmp_path_factory.mktemp(name) / "model")
    (model / "chat_template.jinja").write_text(TEMPLATES[name])
    with Loop(model, **SERVER) as loop:
        loop.ask(text="Hello")
        yield name, loop


def ask(loop: Loop, body: dict[str, Any]) -> tuple[Ticket, Form]:
    """Have a request answered."""
    request = read_messages(body)
    form = Form(request, loop.generator.templates, {})
    ticket = Ticket(form=form)
    with loop.generator.in_flight():
        context, pieces = loop.generator.answer(request, ticket)
        list(pieces)
        context.stop()
    return ticket, form


def test_nothing_that_was_said_is_lost_or_moved_whatever_the_template_takes(
    served: tuple[str, Loop],
) -> None:
    name, loop = served

    ticket, form = ask(loop, BODY)

    assert ticket.prompt is not None
    text = loop.provider.tokenizer.decode(list(ticket.prompt.tokens))
    text = text[text.index("Be brief.") :]
    places = [text.index(word) for word in SAID if word != "clock"]
    assert places == sorted(places)
    assert "clock" in text
    told = {
        "own": (),
        "refuses-system": ("inline-system", "system-role", "tool-calls", "turns"),
        "head-only": ("inline-system", "tool-calls"),
        "hoists": ("inline-system", "tool-calls"),
        "nine": (),
    }
    assert form.repaired == told[name]
    assert ("tools" in form.ignored) == (name not in ("own", "nine"))
    assert ("output_config.effort" in form.ignored) == (name != "head-only")


def test_strict_server_refuses_what_only_the_template_lacks(
    served: tuple[str, Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, loop = served
    monkeypatch.setattr(loop.generator, "strict", True)
    lacks: dict[str, list[str]] = {
        "own": ["output_config.effort"],
        "refuses-system": ["a system prompt", "tools"],
        "head-only": ["system messages in mid-conversation", "tools"],
        "hoists": ["system messages in mid-conversation", "tools"],
        "nine": ["output_config.effort"],
    }
    plain = {"model": "m", "max_tokens": 1, "messages": BODY["messages"][:1]}

    with pytest.raises(RefusedError, match="--strict") as refused:
        ask(loop, BODY)
    counting = read_messages({**BODY, "max_tokens": None}, counting=True)
    with pytest.raises(RefusedError, match="--strict"):
        loop.generator.count_tokens(
            counting, Ticket(form=Form(counting, loop.generator.templates, {}))
        )

    assert refused.value.status == 400
    assert all(what in str(refused.value) for what in lacks[name])
    # What the template has is served, and so are messages of one role in a row.
    ask(loop, plain)
    _, form = ask(loop, {**plain, "messages": BODY["messages"][:1] * 2})
    assert set(form.repaired) <= {"turns"}


def test_counted_is_what_is_asked(served: tuple[str, Loop]) -> None:
    _, loop = served
    request = read_messages({**BODY, "max_tokens": None}, counting=True)
    ticket = Ticket(form=Form(request, loop.generator.templates, {}))

    counted = loop.generator.count_tokens(request, ticket)

    asked, _ = ask(loop, BODY)
    assert asked.prompt is not None
    assert counted == len(asked.prompt.tokens)


def test_what_a_template_refuses_altogether_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = build_model_dir(tmp_path / "model")
    refusing = "{%- if messages | length > 1 %}{{ raise_exception('One only') }}{% endif -%}"
    (model / "chat_template.jinja").write_text(refusing + CHAT_TEMPLATE)
    with Loop(model, **SERVER) as loop:
        loop.ask(text="Hello")
        with pytest.raises((RefusedError, PersistCacheError), match="One only"):
            ask(loop, BODY)
        assert loop.generator.generation_available()
