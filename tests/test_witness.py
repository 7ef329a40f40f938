"""A cache that its former owner changed is noticed, whatever its class."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from persist_cache import PromptCache, Store, tensors
from persist_cache.tensors.layers import leaves
from tests import tiny_caches
from tests.fakes import fingerprint

MODEL = ("model", None, None)


def made(name: str) -> tuple[list[Any], int]:
    """A prepared cache of a kind, and its length."""
    specs, chunks = tiny_caches.CACHES[name]
    cache = tiny_caches.new_cache(specs)
    for seed, chunk in enumerate(chunks):
        tiny_caches.feed(cache, specs, chunk, seed)
    return cache, tensors.prepare(cache, sum(chunks))


def arrays(cache: list[Any]) -> Iterator[Any]:
    for _, layer in leaves(cache):
        for _, value in tree_flatten(vars(layer)):
            if isinstance(value, mx.array):
                yield value


@pytest.mark.parametrize("is_evaluated", [True, False])
@pytest.mark.parametrize("name", tiny_caches.CACHES)
def test_write_to_any_buffer_of_any_class_is_noticed(name: str, is_evaluated: bool) -> None:
    """The array object and all lengths stay what they are."""
    for place in range(len(list(arrays(made(name)[0])))):
        cache, _ = made(name)
        witness = tensors.witness(cache)
        assert witness.fits(cache)
        array = list(arrays(cache))[place]
        if not array.nbytes:
            continue

        array[...] = array * 0 + 3
        if is_evaluated:
            mx.eval(array)

        assert not witness.fits(cache)


@pytest.mark.parametrize("name", tiny_caches.CACHES)
def test_copy_that_is_decoded_on_changes_nothing_for_the_witness(name: str) -> None:
    cache, _ = made(name)
    witness = tensors.witness(cache)

    tiny_caches.feed(tensors.copy_cache(cache), tiny_caches.CACHES[name][0], 1, seed=9)

    assert witness.fits(cache)


@pytest.mark.parametrize("name", tiny_caches.CACHES)
def test_token_appended_and_taken_back_is_noticed(name: str) -> None:
    cache, _ = made(name)
    witness = tensors.witness(cache)

    tiny_caches.feed(cache, tiny_caches.CACHES[name][0], 1, seed=9)
    tensors.trim(cache, 1)

    assert not witness.fits(cache)


def kv_of(seed: int, num_tokens: int) -> tuple[Any, Any]:
    mx.random.seed(seed)
    keys, values = mx.random.normal((1, 2, num_tokens, 8)), mx.random.normal((1, 2, num_tokens, 8))
    mx.eval(keys, values)
    return keys, values


def refill(layer: KVCache, num_tokens: int, seed: int) -> None:
    layer.trim(num_tokens)
    layer.update_and_fetch(*kv_of(seed, num_tokens))


@pytest.mark.parametrize("tier", ["system", "user", "assistant"])
@pytest.mark.parametrize("persist", [True, False])
def test_cache_trimmed_and_refilled_to_its_length_is_let_go_and_its_rows_are_not_stored(
    tmp_path: Path, tier: str, persist: bool
) -> None:
    layer = KVCache()
    keys, values = kv_of(1, 40)
    layer.update_and_fetch(keys, values)
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        options: dict[str, Any] = {"identify": lambda model: fingerprint(), "idle_s": 60}
        with PromptCache(store=store if persist else None, **options) as cache:
            cache.insert_cache(MODEL, list(range(40)), [layer], cache_type=tier)

            refill(layer, 10, seed=2)
            cache.flush()
            cache.trim_to(n_sequences=0)
            found, rest = cache.fetch_nearest_cache(MODEL, list(range(50)))

            queued = persist and tier != "assistant"  # its bytes were taken before the change
            assert (found is not None) == queued
            assert len(rest) == (10 if queued else 50)
            assert len(cache) == 0
            if found is not None:
                assert mx.array_equal(found[0].keys[..., :40, :], keys)
                assert mx.array_equal(found[0].values[..., :40, :], values)


@pytest.mark.parametrize("tier", ["system", "user", "assistant"])
def test_changed_cache_is_counted_and_not_given(tier: str) -> None:
    layer = KVCache()
    layer.update_and_fetch(*kv_of(1, 40))
    with PromptCache() as cache:
        cache.insert_cache(MODEL, list(range(40)), [layer], cache_type=tier)

        refill(layer, 10, seed=2)

        assert cache.fetch_nearest_cache(MODEL, list(range(50)))[0] is None
        assert cache.stats().problems == {"changed_after_insert": 1}
        assert (len(cache), cache.nbytes) == (0, 0)


def test_changed_cache_that_other_threads_may_not_evaluate_is_let_go_by_the_writer(
    tmp_path: Path,
) -> None:
    """What was computed lazily on this thread cannot be looked at on the writer's."""
    layer = KVCache()
    layer.update_and_fetch(*kv_of(1, 40))
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        options: dict[str, Any] = {"identify": lambda model: fingerprint(), "idle_s": 0.02}
        with PromptCache(store=store, **options) as cache, mx.stream(mx.new_stream(mx.cpu)):
            cache.insert_cache(MODEL, list(range(40)), [layer])
            refill(layer, 10, seed=2)  # lazy
            cache.flush()

        assert store.entries() == []
        assert cache.stats().problems == {"changed_after_insert": 1}


def test_lent_cache_takes_the_next_token_in_place(tmp_path: Path) -> None:
    """A reference that is still held would copy the whole cache, once for every answer."""
    layer = KVCache()
    layer.update_and_fetch(*kv_of(1, 40))
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        options: dict[str, Any] = {"identify": lambda model: fingerprint(), "idle_s": 60}
        with PromptCache(store=store, **options) as cache:
            cache.insert_cache(MODEL, list(range(40)), [layer])
            cache.flush()
            del layer
            lent, _ = cache.fetch_nearest_cache(MODEL, list(range(50)))
            assert lent is not None
            assert (cache.last_fetch.source, len(cache)) == ("memory", 0)

            before = address(lent[0].keys)
            lent[0].update_and_fetch(*kv_of(3, 1))
            mx.eval(lent[0].keys, lent[0].values)

            assert address(lent[0].keys) == before


def address(array: Any) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(array)))
