"""Requests that are served alone are computed and kept in pieces, as those of a batch are.

What was computed is counted at the model's calls. Tokens of these models are words, so a reply
that is sent back is the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import server as upstream
from mlx_lm.models.cache import LRUPromptCache

from persist_cache import Store
from persist_cache.errors import ModelError
from persist_cache.prefill import loading
from persist_cache.prefill.run import Computation, new_cache, prefill
from persist_cache.server import underway
from persist_cache.server.ticket import Ticket
from persist_cache.server.validation import RefusedError
from tests.computed import Call, count_calls
from tests.loops import (
    Loop,
    arguments,
    computed_of_new,
    make_provider,
    text_of,
    words,
    write_thinking_model,
)
from tests.torture.tiny import KINDS, write_model
from tests.waiting import until

SYSTEM = {"role": "system", "content": words(7, 40)}
SHORT: dict[str, Any] = {"turns": 4, "turn_words": 60, "system_words": 40}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny models by the name of their kind; the same for the same name."""
    folder = tmp_path_factory.mktemp("models")

    def made(name: str, seed: int = 0, *, thinks: bool = False) -> Path:
        path = folder / f"{name}-{seed}-{thinks}"
        if not path.exists():
            (write_thinking_model if thinks else write_model)(path, KINDS[name], seed)
        return path

    return made


@pytest.mark.parametrize(
    ("sampling", "role"),
    [
        pytest.param({}, "user", id="batched-user"),
        pytest.param({"seed": 1}, "tool", id="seed-tool"),
        pytest.param({}, "tool", id="batched-tool", marks=pytest.mark.long),
        pytest.param({"seed": 1}, "user", id="seed-user", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "sliding", "hybrid"])
def test_a_turn_computes_what_is_new_in_it(
    model: Callable[..., Path],
    kind: str,
    sampling: dict[str, Any],
    role: str,
) -> None:
    """Also where a template ends prompts in an open thought, which the history leaves out."""
    with Loop(model(kind, thinks=True)) as loop:
        loop.ask(text="w1 w2")

        assert computed_of_new(loop, role, **SHORT, **sampling) <= 1.05


@pytest.mark.parametrize("mode", ["kv_bits", "draft"])
@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_turn_that_cannot_be_batched_computes_what_is_new_in_it(
    model: Callable[..., Path], mode: str, role: str
) -> None:
    with served(model, mode) as loop:
        loop.ask(text="w1 w2")

        assert computed_of_new(loop, role, **SHORT) <= 1.05


def served(model: Callable[..., Path], mode: str, **more: Any) -> Loop:
    if mode == "kv_bits":
        return Loop(model("quantized"), kv_bits=8, **more)
    return Loop(model("plain"), draft=model("plain", 1) if mode == "draft" else None, **more)


@pytest.mark.parametrize("mode", ["batched", "seed", "kv_bits", "draft"])
def test_all_ways_leave_the_same_entries(
    model: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    """A chat, a tool's result and a text: on disk at once, but for the replies."""
    sampling: dict[str, Any] = {"seed": 1} if mode == "seed" else {}
    chat = [SYSTEM, {"role": "user", "content": words(1, 60)}]
    tool = [
        *chat,
        {"role": "assistant", "content": "w1"},
        {"role": "tool", "content": words(2, 60)},
    ]
    with (
        Store.open(tmp_path / "store", min_free_bytes=0) as store,
        served(model, mode, store=store) as loop,
    ):
        lengths = [
            len(answered.prompt)
            for answered in (
                loop.ask(chat, **sampling),
                loop.ask(tool, **sampling),
                loop.ask(text=words(3, 60), **sampling),
            )
        ]
        until(lambda: len(store.entries()) >= 4, "not all prompts are on disk")
        kept = {(entry.tier.label, entry.num_tokens) for entry in store.entries()}

    assert kept >= {("system", 45), *(("user", length - 1) for length in lengths)}


def test_rows_of_a_draft_model_are_stored_once(model: Callable[..., Path], tmp_path: Path) -> None:
    """Replies leave them a token behind those of the model; prompts have to do so, too."""
    messages: list[dict[str, str]] = [SYSTEM]
    with (
        Store.open(tmp_path / "store", min_free_bytes=0) as store,
        served(model, "draft", store=store) as loop,
    ):
        for turn in range(4):
            messages.append({"role": "user", "content": words(turn, 60)})
            answered = loop.ask(messages, max_tokens=5 + turn)
            messages.append({"role": "assistant", "content": text_of(answered)})
            loop.cache.flush()
        trees = len(store.catalog().namespaces)
        assert store.check(read_data=True) == []

    assert trees == 1


@pytest.mark.parametrize("behind", [0, 1, 2])
def test_draft_model_has_seen_all_that_the_model_has(
    model: Callable[..., Path], behind: int
) -> None:
    """Whatever the cache that was found: else it would draft without a token in between."""
    target, _ = loading.load(str(model("plain")))
    draft, _ = loading.load(str(model("plain", 1)))
    prompt = [10 + number % 60 for number in range(50)]
    cache = [*new_cache(target), *new_cache(draft)]
    split = len(target.layers)
    prefill(target, cache[:split], prompt[:20])
    prefill(draft, cache[split:], prompt[: 20 - behind])
    alone = new_cache(draft)
    prefill(draft, alone, prompt[:40])

    work = Computation(target, draft, cache, 20, step_tokens=8)
    work.advance(prompt, 40, lambda: None)
    kept = work.snapshot()
    handed = work.finish(prompt)

    assert [layer.offset for layer in kept] == [40] * split + [39] * len(draft.layers)
    assert [layer.offset for layer in handed] == [40] * len(handed)
    for layer, right in zip(handed[split:], alone, strict=True):
        keys, expected = layer.keys_and_values()[0], right.keys_and_values()[0]
        assert mx.allclose(keys, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["sliding", "hybrid", "convolutions", "chunked"])
def test_draft_model_is_refused_where_its_guesses_cannot_be_taken_back(
    model: Callable[..., Path], kind: str
) -> None:
    provider = make_provider(model(kind), model("plain", 1))

    with pytest.raises(ModelError, match=r"cannot have a draft model: .*Cache.* leave the draft"):
        provider.load("default_model", None, "default_model")

    assert provider.model_key is None


def test_client_that_leaves_ends_a_prefill_between_two_calls(
    model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was computed until then is not computed again."""
    monkeypatch.setattr(underway, "PATIENCE_S", 0.0)
    chat = [{"role": "user", "content": words(1, 200)}]
    with Loop(model("plain"), prefill_step_size=32) as loop:
        loop.ask(text="w1 w2")
        loop.count()
        loop.prefilled()
        ticket = Ticket()
        ticket.has_left = lambda: sum(not call.sampling for call in loop.calls) >= 3

        with pytest.raises(ConnectionAbortedError):
            loop.ask(chat, ticket=ticket, seed=1)
        cut = loop.prefilled()
        again = loop.ask(chat, seed=1)

        assert cut == 96
        assert again.cached == 96
        assert cut + loop.prefilled() == len(again.prompt) - 1


def test_server_that_ends_cuts_a_prefill_between_two_calls(model: Callable[..., Path]) -> None:
    with Loop(model("plain"), prefill_step_size=32) as loop:
        loop.ask(text="w1 w2")
        loop.count()
        loop.prefilled()

        def end(call: Call) -> None:
            loop.generator._stop = len(loop.calls) >= 1

        count_calls(loop.provider.model, "end", end)
        with pytest.raises(RefusedError, match="The server is stopping"):
            loop.ask([{"role": "user", "content": words(1, 200)}], seed=1)

        assert loop.prefilled() == 64


def test_server_that_ends_cuts_a_reply(model: Callable[..., Path]) -> None:
    """Upstream's loop would go on to its last token, and the end of the server would wait."""
    seen: list[Any] = []

    with Loop(model("plain")) as loop:

        def end_after_two(answer: Iterator[Any]) -> list[Any]:
            for one in answer:
                seen.append(one)
                loop.generator._stop = len(seen) >= 2
            return seen

        with pytest.raises(RefusedError, match="The server is stopping"):
            loop.ask(text="w1 w2", seed=1, max_tokens=100_000, read=end_after_two)

    assert 2 <= len(seen) < 1000


@pytest.mark.parametrize("sampling", [{"seed": 3}, {}], ids=["alone", "batched"])
def test_penalties_see_the_prompt_however_much_of_it_is_known(
    model: Callable[..., Path], sampling: dict[str, Any]
) -> None:
    """Upstream's sampler sees only what its own loop has computed when a request is alone."""
    sampling = {**sampling, "repetition_penalty": 4.0, "max_tokens": 8}
    chat = [SYSTEM, {"role": "user", "content": words(5, 60)}]
    folder = model("plain")
    with Loop(folder) as loop:
        loop.ask(text="w1 w2")
        cold = loop.ask(chat, **sampling)
        warm = loop.ask(chat, **sampling)

    assert warm.cached > 50
    assert cold.reply == warm.reply == stock(folder, chat, **sampling)


def stock(folder: Path, chat: Sequence[dict[str, str]], **sampling: Any) -> list[int]:
    """What upstream's own generator answers."""
    generator = upstream.ResponseGenerator(make_provider(folder), LRUPromptCache(4))
    try:
        request = upstream.CompletionRequest("chat", "", [*map(dict, chat)], None, None)
        _, responses = generator.generate(request, arguments(**sampling))
        return [int(one.token) for one in responses]
    finally:
        generator.stop_and_join()


def test_progress_of_a_prefill_is_told_from_its_start_to_its_end(
    model: Callable[..., Path],
) -> None:
    with Loop(model("plain"), prefill_step_size=32) as loop:
        answered = loop.ask([SYSTEM, {"role": "user", "content": words(1, 100)}], seed=1)

    length = len(answered.prompt)
    assert answered.progress[0] == (0, length)
    assert answered.progress[-1] == (length, length)
    assert answered.progress == sorted(answered.progress)
    assert {total for _, total in answered.progress} == {length}


def test_cache_that_cannot_be_quantized_is_said_in_a_sentence(model: Callable[..., Path]) -> None:
    with Loop(model("sliding"), kv_bits=8) as loop:
        for text in ("w1 w2", words(1, 60)):
            with pytest.raises(ModelError, match=r"cannot be quantized .*without --kv-bits"):
                loop.ask([SYSTEM, {"role": "user", "content": text}])
