"""PromptCache with real cache classes and tiny real models: what only shows with arrays."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from persist_cache import PromptCache, Store, tensors
from persist_cache.prefill.run import prefill, snapshot
from tests import tiny_caches
from tests.fakes import fingerprint

MODEL = ("model", None, None)


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    """Compiling for the CPU starts a C++ compiler for every function."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def open_cache(store: Store) -> PromptCache:
    return PromptCache(store=store, identify=lambda model: fingerprint(), leave_tokens=1, idle_s=60)


def compute(model: Any, tokens: Sequence[int]) -> list[Any]:
    kv = list(model.make_cache()) if hasattr(model, "make_cache") else []
    kv = kv or [KVCache() for _ in model.layers]
    prefill(model, kv, tokens, step_tokens=16)
    return kv


def logits(model: Any, kv: list[Any], tokens: Sequence[int]) -> mx.array:
    out: mx.array = model(mx.array([list(tokens)]), cache=kv)
    mx.eval(out)
    return out


def test_short_prompt_below_a_longer_one_of_a_sliding_model(tmp_path: Path) -> None:
    """The longer one has dropped the rows that the short one still has: it brings its state."""
    model = tiny_caches.model("gemma3_text")
    long_prompt = [7 * i % 60 for i in range(120)]
    short = long_prompt[:10]
    right = logits(model, compute(model, short), [3, 4, 5])
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        with open_cache(store) as cache:
            cache.insert_cache(MODEL, long_prompt, compute(model, long_prompt), cache_type="user")
            cache.flush()
            cache.insert_cache(MODEL, short, compute(model, short), cache_type="system")
            assert cache.flush()
            assert cache.stats().problems == {}

        again = open_cache(store)
        kv, rest = again.fetch_nearest_cache(MODEL, [*short, 3, 4, 5])

        assert kv is not None
        assert list(rest) == [3, 4, 5]
        assert again.last_fetch.source == "disk"
        assert mx.array_equal(logits(model, kv, rest), right)
        again.close()


def test_decoding_on_a_cache_that_waits_for_its_save_changes_nothing_on_disk(
    tmp_path: Path,
) -> None:
    model = tiny_caches.model("llama")
    prompt = [5 * i % 60 for i in range(40)]
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        with open_cache(store) as cache:
            kv = compute(model, prompt)
            cache.insert_cache(MODEL, prompt, kv, cache_type="assistant")
            fetched, rest = cache.fetch_nearest_cache(MODEL, [*prompt, 1, 2])
            assert fetched is not None
            logits(model, fetched, rest)  # a copy, since nothing is on disk yet
            cache.flush()

        again = open_cache(store)
        restored, _ = again.fetch_nearest_cache(MODEL, [*prompt, 1])
        assert restored is not None
        right = compute(model, prompt)
        assert mx.array_equal(logits(model, restored, [1]), logits(model, right, [1]))
        again.close()


def test_insert_on_the_generation_thread_saves_on_another(tmp_path: Path) -> None:
    """MLX streams are thread-local: a lazy array that reaches the writer would raise there."""
    model = tiny_caches.model("llama")
    prompt = list(range(30))
    problems: list[Any] = []
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        cache = open_cache(store)

        def generate() -> None:
            with mx.stream(mx.new_stream(mx.default_device())):
                kv = compute(model, prompt)
                for layer in kv:  # lazy, and a view of a larger buffer, as upstream hands over
                    layer.keys, layer.values = layer.keys * 1, layer.values * 1
                cache.insert_cache(MODEL, prompt, snapshot(kv), cache_type="system")
                problems.append(cache.stats().problems)

        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
        cache.close()

        assert problems == [{}]
        assert [entry.num_tokens for entry in store.entries()] == [30]
        assert store.check(read_data=True) == []


def test_no_thread_is_left_behind_by_many_requests(tmp_path: Path) -> None:
    """Every Python thread that runs an MLX operation leaves an OS thread behind for ever."""
    model = tiny_caches.model("llama")
    with Store.open(tmp_path / "store", min_free_bytes=0) as store, open_cache(store) as cache:

        def request(base: int) -> None:
            prompt = [base, *range(30)]
            cache.insert_cache(MODEL, prompt, compute(model, prompt), cache_type="user")
            cache.flush()
            cache.trim_to(n_sequences=0)
            kv, _ = cache.fetch_nearest_cache(MODEL, [*prompt, 1])
            assert kv is not None

        request(0)
        before = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else 0
        for base in range(1, 30):
            request(base)
        after = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else 0

        assert after == before


def test_kv_that_is_cut_by_the_key_stores_no_row_of_the_rest(tmp_path: Path) -> None:
    """Rows of trimmed tokens are another conversation's text."""
    rows = mx.random.normal((1, 2, 300, 8))
    layer = KVCache()
    layer.update_and_fetch(rows, rows)
    tensors.trim([layer], 100)
    with Store.open(tmp_path / "store", min_free_bytes=0) as store, open_cache(store) as cache:
        cache.insert_cache(MODEL, list(range(200)), [layer], cache_type="system")
        cache.flush()

        (blob,) = (tmp_path / "store" / "blobs").rglob("*.safetensors")
        secret, kept = np.array(rows[0, 0, 250]).tobytes(), np.array(rows[0, 0, 150]).tobytes()
        assert secret not in blob.read_bytes()
        assert kept in blob.read_bytes()
