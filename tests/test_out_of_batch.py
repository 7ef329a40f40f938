"""Caches that come out of a server's batch: only what is new is copied, and nothing is mixed up.

The batch is the server's own, with tiny random models. What it keeps is held against the same
requests in mlx-lm's batch, whose caches are copied whole: bit for bit.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import BatchKVCache, CacheList, KVCache, RotatingKVCache

from persist_cache import PromptCache, Store, tensors
from persist_cache.prefill.clock import PrefillClock
from persist_cache.server.upstream.batch import Batch
from tests import tiny_caches
from tests.fakes import fingerprint

MODEL = ("model", None, None)
LAYOUTS = [name for name in tiny_caches.MODELS if name != "llama4"]  # which cannot be batched
ROW_BYTES = 2 * 2 * 16 * 2
"""Of one token of the model `llama`: keys and values of two layers, 16 numbers in bfloat16."""


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    """Compiling for the CPU starts a C++ compiler for every function."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def tokens_of(seed: int, num_tokens: int) -> list[int]:
    return [(7 * i + i * i * seed + 3 * seed) % 60 for i in range(num_tokens)]


def bits(cache: Sequence[Any]) -> list[bytes]:
    """What a cache holds of its tokens, whatever buffers it is in."""
    found = []
    for layer in cache:
        for member in layer.caches if isinstance(layer, CacheList) else [layer]:
            for _, array in tree_flatten(member.state):
                if not isinstance(array, mx.array):
                    continue
                if type(member) is KVCache:
                    array = array[:, :, : member.offset]
                elif type(member) is RotatingKVCache:
                    array = array[:, :, -member.max_size :]  # what a prefill leaves is longer
                whole: Any = mx.contiguous(array + 0)
                found.append(bytes(memoryview(whole)))
    return found


@dataclass
class Request:
    """A prompt in segments, and what became of it."""

    segments: list[list[int]]
    max_tokens: int = 6
    reused: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        return [token for segment in self.segments for token in segment]


class Loop:
    """What `mlx_lm.server` does with a batch and its cache, step by step."""

    def __init__(self, model: Any, cache: PromptCache, *, ours: bool = True) -> None:
        self.cache = cache
        options: dict[str, Any] = {"stop_tokens": None, "prefill_step_size": 32}
        self.batch: Any = (
            Batch(PrefillClock(), model, **options) if ours else BatchGenerator(model, **options)
        )
        self.running: dict[int, tuple[Request, list[str]]] = {}

    def submit(self, request: Request) -> None:
        kv, rest, _ = self.cache.look_up(MODEL, request.prompt, to_copy=True)
        request.reused = len(request.prompt) - len(rest)
        left, segments, tiers = request.reused, [], []
        for segment, tier in zip(request.segments, ("system", "user", "assistant"), strict=False):
            if len(segment) > left:
                segments.append(segment[left:])
                tiers.append(tier)
            left = max(0, left - len(segment))
        (uid,) = self.batch.insert_segments(
            [segments],
            max_tokens=[request.max_tokens],
            caches=[kv],
            all_tokens=[request.prompt[: request.reused]],
        )
        self.running[uid] = (request, tiers)

    def step(self) -> None:
        prompts, tokens = self.batch.next()
        ended = [
            one.uid
            for one in prompts
            if one.end_of_segment and not one.end_of_prompt and self.running[one.uid][1]
        ]
        for uid, (kv, key) in self.batch.extract_cache(ended).items():
            self.cache.insert_cache(MODEL, key[:], kv, cache_type=self.running[uid][1].pop(0))
        for one in tokens:
            request, _ = self.running[one.uid]
            request.tokens.append(one.token)
            request.logprobs.append(np.array(one.logprobs.astype(mx.float32)).tobytes())
            if one.finish_reason is not None:
                self.cache.insert_cache(MODEL, one.all_tokens[:], one.prompt_cache)
                del self.running[one.uid]

    def run(self, *requests: Request) -> None:
        for request in requests:
            self.submit(request)
        while self.running:
            self.step()


def in_memory(**options: Any) -> PromptCache:
    return PromptCache(100, identify=lambda model: fingerprint(), leave_tokens=1, **options)


def talk(model: Any, cache: PromptCache, *, ours: bool) -> list[Request]:
    """Two conversations under one system prompt, at once and in turns, and one that branches."""
    loop = Loop(model, cache, ours=ours)
    system = tokens_of(1, 70)
    said = []
    histories = [tokens_of(seed, 9 + seed) for seed in (2, 3)]
    for _ in range(3):
        turn = [Request([system, [*history], [5]]) for history in histories]
        loop.run(*turn)
        said += turn
        for history, request in zip(histories, turn, strict=True):
            history += [5, *request.tokens, *tokens_of(len(history), 6)]
    # Leaves the first conversation within a turn, and within the system prompt.
    branches = [
        Request([system, [*histories[0][:12], 9, 8, 7], [5]]),
        Request([[*system[:50], 1, 2], [3, 4], [5]]),
    ]
    loop.run(*branches)
    return [*said, *branches]


@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_and_kept_caches_have_the_bits_of_copies_made_whole(
    name: str, tmp_path: Path
) -> None:
    model = tiny_caches.model(name)
    with (
        Store.open(tmp_path / "ours", min_free_bytes=0) as store,
        Store.open(tmp_path / "whole", min_free_bytes=0) as other,
        in_memory(store=store, idle_s=60) as ours,
        in_memory(store=other, idle_s=60) as whole,
    ):
        got = talk(model, ours, ours=True)
        right = talk(model, whole, ours=False)

        assert [one.reused for one in got] == [one.reused for one in right]
        assert [one.tokens for one in got] == [one.tokens for one in right]
        assert [one.logprobs for one in got] == [one.logprobs for one in right]
        assert ours.stats().problems == {}
        assert ours.flush()
        assert whole.flush()
        for source in ("memory", "disk"):
            for request in right:
                if source == "disk":
                    ours.trim_to(n_sequences=0)
                    whole.trim_to(n_sequences=0)
                asked = [*request.prompt, *request.tokens, 1]
                expected, rest, _ = whole.look_up(MODEL, asked, to_copy=True)
                found, left, fetch = ours.look_up(MODEL, asked, to_copy=True)
                assert expected is not None
                assert found is not None
                assert (fetch.source, list(left)) == (source, list(rest)) == (source, [1])
                assert bits(found) == bits(expected)


def sequence(seed: int, num_tokens: int, *, heads: int = 2) -> list[Any]:
    """Two layers of random rows, as if they had been computed."""
    mx.random.seed(seed)
    layers = []
    for _ in range(2):
        layer = KVCache()
        rows = [mx.random.normal((1, heads, num_tokens, 8)).astype(mx.bfloat16) for _ in range(2)]
        layer.update_and_fetch(*rows)
        mx.eval(layer.keys, layer.values)
        layers.append(layer)
    return layers


def batch_of(*sequences: list[Any]) -> list[Any]:
    layers = [BatchKVCache.merge(list(parts)) for parts in zip(*sequences, strict=True)]
    mx.eval([layer.state for layer in layers])
    return layers


def grow(batch: list[Any], num_tokens: int, seed: int = 0) -> None:
    mx.random.seed(seed)
    for layer in batch:
        size, heads, _, dim = layer.keys.shape
        rows = [mx.random.normal((size, heads, num_tokens, dim)) for _ in range(2)]
        layer.update_and_fetch(*[row.astype(mx.bfloat16) for row in rows])
    mx.eval([layer.state for layer in batch])


def kept(cache: PromptCache, tokens: Sequence[int]) -> list[bytes]:
    found, rest = cache.fetch_nearest_cache(MODEL, [*tokens, 1])
    assert found is not None
    assert list(rest) == [1]
    return bits(found)


def insert(cache: PromptCache, tokens: Sequence[int], batch: list[Any], index: int) -> None:
    cache.insert_cache(MODEL, tokens, tensors.extract(batch, index), cache_type="user")
    assert cache.stats().problems == {}


@pytest.mark.parametrize("num_before", [64, 2_048])
def test_insert_takes_memory_for_the_new_rows_alone(num_before: int) -> None:
    cache = in_memory()
    batch = batch_of(sequence(1, num_before), sequence(2, num_before - 7))
    tokens = tokens_of(1, num_before + 60)
    insert(cache, tokens[:num_before], batch, 0)
    before = cache.nbytes

    grow(batch, 60)
    insert(cache, tokens, batch, 0)

    row_bytes = 2 * 2 * 2 * 8 * 2
    assert before == num_before * row_bytes
    assert cache.nbytes - before == 60 * row_bytes
    assert len(cache) == 1
    assert kept(cache, tokens) == bits([layer.extract(0) for layer in batch])


def test_rows_in_memory_of_another_computation_are_not_mixed_in() -> None:
    """The same prompt in another batch differs in its last bits, or a test makes up all of them."""
    cache = in_memory()
    tokens = tokens_of(1, 300)
    insert(cache, tokens[:200], batch_of(sequence(1, 200), sequence(2, 90)), 0)

    other = batch_of(sequence(3, 300), sequence(4, 300))
    insert(cache, tokens, other, 0)

    assert kept(cache, tokens) == bits([layer.extract(0) for layer in other])


def test_last_row_that_differs_in_one_bit_is_noticed_in_any_layer() -> None:
    tokens = tokens_of(1, 40)
    for place in range(2):
        cache = in_memory()
        batch = batch_of(sequence(1, 30), sequence(2, 30))
        insert(cache, tokens[:30], batch, 0)
        rows = batch[place].values.view(mx.uint16)
        rows[0, 0, 29, 0] = rows[0, 0, 29, 0] ^ 1
        batch[place].values = rows.view(mx.bfloat16)
        grow(batch, 10)

        insert(cache, tokens, batch, 0)

        assert kept(cache, tokens) == bits([layer.extract(0) for layer in batch])


def test_batch_goes_on_writing_in_place_and_what_was_kept_stays_as_it_was() -> None:
    cache = in_memory()
    batch = batch_of(sequence(1, 100), sequence(2, 80))
    grow(batch, 1)  # makes room for the next 255
    tokens = tokens_of(1, 101)
    places = [tensors.address_of(layer.keys) for layer in batch]

    insert(cache, tokens, batch, 0)
    was = kept(cache, tokens)
    grow(batch, 1, seed=1)
    grow(batch, 1, seed=2)

    assert [tensors.address_of(layer.keys) for layer in batch] == places
    assert kept(cache, tokens) == was


def test_caller_that_holds_what_it_handed_over_does_not_hold_the_batch() -> None:
    cache = in_memory()
    batch = batch_of(sequence(1, 100), sequence(2, 80))
    grow(batch, 1)
    places = [tensors.address_of(layer.keys) for layer in batch]

    handed = tensors.extract(batch, 0)
    layers = list(handed)
    cache.insert_cache(MODEL, tokens_of(1, 101), handed)
    grow(batch, 1)

    assert [tensors.address_of(layer.keys) for layer in batch] == places
    assert layers[0].keys is None


def unique_bytes(cache: PromptCache, prompts: Sequence[Sequence[int]]) -> int:
    """Bytes of the buffers behind caches in memory, found by address."""
    found: dict[int, int] = {}
    for tokens in prompts:
        kv, rest, _ = cache.look_up(MODEL, [*tokens, 59], to_copy=True)
        assert kv is not None
        assert list(rest) == [59]
        found |= {
            tensors.address_of(array): array.nbytes
            for layer in kv
            for array in (layer.keys, layer.values)
        }
    return sum(found.values())


def test_prompts_under_one_system_prompt_keep_its_rows_once_and_memory_counts_them_once() -> None:
    row_bytes = 2 * 2 * 2 * 8 * 2
    system = tokens_of(1, 200)
    cache = in_memory()
    base = sequence(1, 200)
    insert(cache, system, batch_of(base, sequence(2, 10)), 0)
    for number in range(3):
        batch = batch_of(base, sequence(2, 10))
        grow(batch, 20, seed=number)
        insert(cache, [*system, *tokens_of(10 + number, 20)], batch, 0)

    assert len(cache) == 3
    assert cache.nbytes == (200 + 3 * 20) * row_bytes
    cache.trim_to(n_sequences=2)
    assert cache.nbytes == (200 + 2 * 20) * row_bytes
    cache.trim_to(n_bytes=(200 + 2 * 20) * row_bytes - 1)
    assert len(cache) == 1
    assert cache.nbytes == (200 + 20) * row_bytes
    assert sum(tier["n_bytes"] for tier in cache.stats_by_type().values()) == cache.nbytes
    cache.trim_to(n_sequences=0)
    assert cache.nbytes == 0


def test_memory_that_is_counted_is_the_memory_that_is_held() -> None:
    cache = in_memory()
    gc.collect()
    held_before = mx.get_active_memory()
    batch = batch_of(sequence(1, 400), sequence(2, 300))
    tokens = tokens_of(1, 400)
    for number in range(14):
        insert(cache, tokens, batch, 0)
        if number % 3 == 0:
            cache.look_up(MODEL, [*tokens, 1], to_copy=True)
        grow(batch, 40, seed=number)
        tokens += tokens_of(number, 40)
    insert(cache, tokens, batch, 0)
    del batch
    gc.collect()

    held = mx.get_active_memory() - held_before
    assert cache.nbytes <= held <= cache.nbytes + 64 * 1024
    cache.trim_to(n_sequences=0)
    assert mx.get_active_memory() - held_before < 64 * 1024


def test_short_beginning_of_a_long_prompt_does_not_keep_all_of_it_alive() -> None:
    row_bytes = 2 * 2 * 2 * 8 * 2
    cache = in_memory()
    base = sequence(1, 1_000)
    tokens = tokens_of(1, 1_000)
    insert(cache, tokens, batch_of(base, sequence(2, 10)), 0)
    for layer in base:
        layer.trim(850)
    batch = batch_of(base, sequence(2, 10))
    grow(batch, 5, seed=1)

    insert(cache, [*tokens[:150], *tokens_of(7, 5)], batch, 0)

    assert cache.nbytes == (1_000 + 155) * row_bytes
    cache.trim_to(n_sequences=1)
    assert cache.nbytes == 155 * row_bytes


def test_cache_of_many_pieces_is_put_together_when_it_is_used() -> None:
    row_bytes = 2 * 2 * 2 * 8 * 2
    cache = in_memory()
    batch = batch_of(sequence(1, 50), sequence(2, 30))
    tokens = tokens_of(1, 50)
    first = list(tokens)
    for number in range(12):
        insert(cache, tokens, batch, 0)
        grow(batch, 3, seed=number)
        tokens = [*tokens, *tokens_of(number, 3)]
    insert(cache, tokens, batch, 0)
    right = bits([layer.extract(0) for layer in batch])

    assert kept(cache, tokens) == right
    assert cache.nbytes == len(tokens) * row_bytes == unique_bytes(cache, [tokens])
    assert kept(cache, tokens) == right
    assert kept(cache, first) == bits([layer.extract(0) for layer in batch_of(sequence(1, 50))])


def test_cache_read_from_the_disk_for_a_batch_stays_and_only_new_rows_are_copied(
    tmp_path: Path,
) -> None:
    model = tiny_caches.model("llama")
    prompt = tokens_of(1, 300)
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        with in_memory(store=store, idle_s=60) as cache:
            Loop(model, cache).run(Request([prompt[:290], prompt[290:]]))
        cache = in_memory(store=store, idle_s=60)

        request = Request([[*prompt, 1, 2], [3]])
        loop = Loop(model, cache)
        loop.submit(request)
        restored = cache.nbytes
        assert request.reused == 300
        assert cache.last_fetch.source == "disk"
        loop.run()

        assert restored >= 300 * ROW_BYTES
        assert cache.nbytes - restored <= 20 * ROW_BYTES
        asked = [*request.prompt, *request.tokens, 1]
        again, rest, fetch = cache.look_up(MODEL, asked, to_copy=True)
        assert fetch.source == "memory"
        assert list(rest) == [1]
        assert again is not None
        cache.close()


def test_decoding_on_a_cache_that_another_shares_changes_neither() -> None:
    """One that was computed outside of a batch may be lent, and is written to in place then."""
    cache = in_memory()
    base = sequence(1, 200)
    tokens = tokens_of(1, 230)
    batch = batch_of(base, sequence(2, 10))
    grow(batch, 30, seed=1)
    cache.insert_cache(MODEL, tokens[:200], base, cache_type="user")
    insert(cache, tokens, batch, 0)
    right = bits([layer.extract(0) for layer in batch])

    for layer in base:  # its former owner, who should not
        layer.trim(50)
    grow(base, 80, seed=2)
    found, _, _ = cache.look_up(MODEL, [*tokens[:210], 1], to_copy=False)
    assert found is not None
    grow(list(found), 80, seed=3)

    assert kept(cache, tokens) == right


@pytest.mark.parametrize("source", ["memory", "disk"])
def test_what_a_batch_was_given_stays_only_while_its_room_is_not_needed(
    source: str, tmp_path: Path
) -> None:
    """Without a batch it would be lent, and leave memory: it must not crowd out another one."""
    prompts = [tokens_of(seed, 300) for seed in (1, 2)]
    with (
        Store.open(tmp_path / "store", min_free_bytes=0) as store,
        PromptCache(2, store=store, identify=lambda model: fingerprint(), idle_s=60) as cache,
    ):
        for seed, tokens in enumerate(prompts):
            insert(cache, tokens, batch_of(sequence(seed, 300), sequence(9, 10)), 0)
        assert cache.flush()
        if source == "disk":
            cache.trim_to(n_sequences=0)
            insert(cache, prompts[1], batch_of(sequence(1, 300), sequence(9, 10)), 0)

        _, _, fetch = cache.look_up(MODEL, [*prompts[0], 1], to_copy=True)
        assert fetch.source == source
        assert len(cache) == 2
        insert(cache, tokens_of(3, 100), batch_of(sequence(5, 100), sequence(9, 10)), 0)

        assert cache.outlook(MODEL, [*prompts[0], 1])[1] < 300
        assert cache.outlook(MODEL, [*prompts[1], 1])[1] == 300
