"""Caches of every kind of model come out of a remote as they went in: the same logits follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from persist_cache import tensors
from persist_cache.remote import Remote, Why
from persist_cache.store.store import Store
from tests import tiny_caches
from tests.fakes import fingerprint
from tests.remotes import bring, folder_settings, machine
from tests.tiny_caches import CACHES, MODELS, feed, new_cache

TOKENS = [5 * number % 61 for number in range(600)]


@pytest.fixture(scope="module")
def machines(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[tuple[Store, Remote], tuple[Store, Remote]]]:
    """A publisher and a reader."""
    folder = tmp_path_factory.mktemp("machines")
    settings = folder_settings(folder)
    with (
        machine(folder, "first", settings) as first,
        machine(folder, "second", settings) as second,
    ):
        yield first, second


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """On the CPU, `mx.compile` starts a C++ compiler for every function."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def carried(machines: Any, name: str, cache: Any, tokens: list[int]) -> Any:
    """Publish a cache on one machine, and restore it on the other."""
    (store, remote), (other, its_remote) = machines
    identity = fingerprint(weights=name)
    num_tokens = tensors.prepare(cache, len(tokens))
    assert num_tokens == len(tokens)
    entry = store.put(identity, tokens, tensors.source(cache, num_tokens)).entry
    assert entry is not None
    remote.publish(entry)
    brought = bring(its_remote, [*tokens, 1], model=name, limit=num_tokens)
    assert (brought.why, brought.num_tokens) == (Why.BROUGHT, num_tokens)
    found = other.fetch(identity, tokens, tensors.restore)
    assert found is not None
    assert found[1].num_tokens == num_tokens
    assert other.check(read_data=True) == []
    return found[0]


def bits(arrays: list[Any]) -> list[bytes]:
    return [np.array(one.astype(mx.float32)).tobytes() for one in arrays]


# The others are marked `long`: they are alike, and building each takes its time.
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("llama", "gemma3_text", "mamba2", "qwen3_next")
        else pytest.param(name, marks=pytest.mark.long)
        for name in MODELS
    ],
)
def test_a_model_goes_on_on_another_machine_as_it_would_have_here(machines: Any, name: str) -> None:
    model = tiny_caches.model(name)
    live = make_prompt_cache(model)
    for start in range(0, len(TOKENS), 200):
        mx.eval(model(mx.array([TOKENS[start : start + 200]]), cache=live))

    restored = carried(machines, name, live, TOKENS)

    for length in (1, 9, 1):
        tokens = mx.arange(length)[None]
        assert bits([model(tokens, cache=restored)]) == bits([model(tokens, cache=live)])


@pytest.mark.parametrize(
    "name",
    [
        "quantized-4",
        "rotating-and-kv",
        "rotating-wrapped-by-both",
        "chunked-slid",
        "list-of-arrays-and-wrapped",
        "draft-one-behind",
        "rotating-draft-one-behind",
        "kv-values-without-width",
    ],
)
def test_a_cache_of_every_kind_is_carried(machines: Any, name: str) -> None:
    specs, chunks = CACHES[name]
    live = new_cache(specs)
    lengths = [256, *chunks]
    for seed, length in enumerate(lengths):
        feed(live, specs, length, seed)

    restored = carried(machines, name, live, TOKENS[: sum(lengths)])

    for seed in range(3):
        assert bits(feed(restored, specs, 1, seed)) == bits(feed(live, specs, 1, seed))


def test_rows_that_one_conversation_dropped_are_carried_with_its_state(machines: Any) -> None:
    """Runs of before the window was full have rows that those after it have not."""
    specs, _ = CACHES["rotating-and-kv"]
    (store, _), _ = machines
    live = new_cache(specs)
    identity = fingerprint(weights="in pieces")
    for at, length in ((20, 20), (31, 11), (400, 369)):
        feed(live, specs, length, at)
        num_tokens = tensors.prepare(live, at)
        store.put(identity, TOKENS[:at], tensors.source(live, num_tokens))

    restored = carried(machines, "in pieces", live, TOKENS[:400])

    assert bits(feed(restored, specs, 1, 7)) == bits(feed(live, specs, 1, 7))
