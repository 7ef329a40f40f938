"""What an entry costs and what a hit saves: told by what was timed, with clocks under control."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from persist_cache import PromptCache, Store
from persist_cache.doctor.facts import DiskSpeed, break_even
from persist_cache.entry import Tier
from persist_cache.prefill.clock import PrefillClock, Prefills, Rate
from persist_cache.queries.totals import Survey
from persist_cache.tokens import pack_tokens
from tests.fakes import Clock, fingerprint, put
from tests.live_fakes import MODEL, FakeCodec
from tests.test_cache import fetch, insert
from tests.tiny_caches import model as tiny_model

FAST_DISK = DiskSpeed(1, 1e12, 1e12, 0.0)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        yield store


@pytest.fixture
def make(disk: Store, clock: Clock) -> Iterator[Callable[..., PromptCache]]:
    """Make caches over one store, as processes one after the other would; `clock` times them."""
    made: list[PromptCache] = []

    def build(**options: Any) -> PromptCache:
        cache = PromptCache(
            store=disk,
            identify=lambda model: fingerprint(),
            idle_s=60,
            codec=FakeCodec(),
            prefill_clock=clock,
            **options,
        )
        made.append(cache)
        return cache

    yield build
    for cache in made:
        cache.close()


def costs(disk: Store) -> dict[int, float]:
    """Per entry's length what computing it took."""
    return {entry.num_tokens: round(entry.prefill_s, 6) for entry in disk.entries()}


def saved(disk: Store) -> float:
    disk.flush()
    return sum(entry.saved_s for entry in disk.entries())


def answer(
    cache: PromptCache, clock: Clock, prompt: Sequence[int], *pieces: tuple[int, float, str]
) -> None:
    """Look up a prompt; then for each piece let the seconds pass and insert the prompt so far."""
    fetch(cache, prompt)
    for end, seconds, tier in pieces:
        clock.advance(seconds)
        insert(cache, prompt[:end], tier)


def test_entry_a_little_longer_than_its_parent_costs_a_little_more(
    make: Callable[..., PromptCache], disk: Store, clock: Clock
) -> None:
    prompt = list(range(1100))
    with make() as cache:
        answer(cache, clock, prompt, (1000, 22.0, "system"), (1014, 0.8, "user"))

    assert costs(disk) == {1000: 22.0, 1014: 22.8}


def test_costs_add_up_over_processes(
    make: Callable[..., PromptCache], disk: Store, clock: Clock
) -> None:
    prompt = list(range(1100))
    with make() as cache:
        answer(cache, clock, prompt, (1000, 22.0, "system"))
    with make() as cache:
        answer(cache, clock, prompt, (1014, 0.8, "user"))
    with make() as cache:
        answer(cache, clock, prompt, (1028, 0.9, "user"))

    assert costs(disk) == {1000: 22.0, 1014: 22.8, 1028: 23.7}


def test_costs_add_up_over_hits_in_memory(
    make: Callable[..., PromptCache], disk: Store, clock: Clock
) -> None:
    prompt = list(range(1100))
    with make() as cache:
        answer(cache, clock, prompt, (1000, 22.0, "system"))
        clock.advance(500)
        answer(cache, clock, prompt, (1014, 0.8, "user"))

    assert costs(disk) == {1000: 22.0, 1014: 22.8}


def test_time_between_requests_is_nobodys_prefill(
    make: Callable[..., PromptCache], disk: Store, clock: Clock
) -> None:
    with make() as cache:
        for first in (1, 2, 3):
            answer(cache, clock, [first] * 120, (100, 2.0, "user"))
            clock.advance(1000)

    assert [entry.prefill_s for entry in disk.entries()] == [2.0] * 3


def test_reply_is_valued_by_the_speed_of_prefill_and_not_of_decoding(
    make: Callable[..., PromptCache], disk: Store, clock: Clock
) -> None:
    prompt = list(range(100))
    with make() as cache:
        answer(cache, clock, [*prompt, *range(500, 550)], (100, 2.0, "user"))
        clock.advance(300)
        insert(cache, [*prompt, *range(500, 550)], "assistant")

    assert costs(disk) == {100: 2.0, 150: 3.0}


def test_short_tail_does_not_value_a_beginning_that_nobody_timed(
    make: Callable[..., PromptCache], disk: Store, clock: Clock
) -> None:
    prompt = list(range(1100))
    with make() as cache:
        answer(cache, clock, prompt, (1000, 0.0, "system"))
    with make() as cache:
        answer(cache, clock, prompt, (1014, 14.0, "user"))

    assert costs(disk) == {1000: 0.0, 1014: 0.0}


def test_beginning_that_nobody_timed_is_valued_by_enough_that_was(
    make: Callable[..., PromptCache], disk: Store, clock: Clock
) -> None:
    prompt = list(range(1100))
    with make() as cache:
        answer(cache, clock, prompt, (1000, 0.0, "system"))
    with make() as cache:
        answer(cache, clock, [7] * 600, (500, 10.0, "user"))
        answer(cache, clock, prompt, (1014, 0.5, "user"))

    found = costs(disk)
    assert found[1000] == 0.0
    assert found[1014] == pytest.approx(20.5, rel=0.01)


def test_prompts_computed_at_once_are_timed_each_for_itself(
    make: Callable[..., PromptCache], disk: Store, clock: Clock
) -> None:
    one, two = [1] * 110, [2] * 110
    with make() as cache:
        fetch(cache, one)
        clock.advance(1)
        fetch(cache, two)
        clock.advance(2)
        insert(cache, one[:100], "user")
        clock.advance(4)
        insert(cache, two[:100], "user")

    assert sorted(entry.prefill_s for entry in disk.entries()) == [3.0, 6.0]


def test_hit_saves_what_computing_its_tokens_took_whoever_hangs_below(disk: Store) -> None:
    prompt = list(range(1014))
    put(disk, prompt[:1000], prefill_s=22.0)
    put(disk, prompt, prefill_s=60.0)

    def saves(tokens: int) -> float:
        return disk.match(fingerprint(), [*prompt[:tokens], 7777]).saved_s

    assert saves(1000) == 22.0
    assert saves(500) == pytest.approx(11.0)
    assert saves(1007) == pytest.approx(41.0)
    assert saves(1014) == 60.0


def test_entries_that_nobody_timed_do_not_hide_those_above(disk: Store) -> None:
    prompt = list(range(120))
    put(disk, prompt[:100], prefill_s=22.0)
    put(disk, prompt[:110])
    put(disk, prompt)

    assert disk.match(fingerprint(), prompt).saved_s == 22.0


def test_hit_in_memory_is_credited_with_the_tokens_it_reused(
    make: Callable[..., PromptCache], disk: Store, clock: Clock
) -> None:
    prompt = list(range(140))
    cache = make()
    answer(cache, clock, prompt, (100, 10.0, "user"))
    cache.flush()
    put(disk, prompt[:120], prefill_s=30.0)

    fetch(cache, prompt)

    assert cache.last_fetch.source == "memory"
    assert cache.last_fetch.num_tokens == 100
    assert saved(disk) == pytest.approx(25.0), "100 of the 120 tokens on disk were of use"


def test_time_that_reading_takes_is_not_saved(disk: Store) -> None:
    put(disk, [1, 2, 3], prefill_s=6.0)
    match = disk.match(fingerprint(), [1, 2, 3])

    disk.touch(match, spent_s=2.0)
    assert saved(disk) == 4.0
    disk.touch(match, spent_s=7.0)
    assert saved(disk) == 4.0, "a slow disk saves nothing, and takes nothing back"


def test_rate_of_a_model_does_not_drift_with_short_tails(disk: Store) -> None:
    prompt = list(range(1000 + 60 * 14))
    put(disk, prompt[:1000], prefill_s=1000 / 36)
    for turn in range(1, 61):
        seconds = 1000 / 36 + turn * 4.0
        put(disk, prompt[: 1000 + 14 * turn], prefill_s=seconds)

    (found,) = break_even(disk, Survey(disk), FAST_DISK)

    assert found.prefill_tokens_per_s == pytest.approx(36, rel=0.2)


def test_rate_of_a_model_takes_prompts_whose_beginning_is_stored_by_their_own_part(
    disk: Store,
) -> None:
    prompt = list(range(3000))
    put(disk, prompt[:1000], prefill_s=10.0)
    put(disk, prompt[:3000], prefill_s=50.0)

    (found,) = break_even(disk, Survey(disk), FAST_DISK)

    assert found.prefill_tokens_per_s == pytest.approx(1 / ((10e3 + 80e3) / 5e6))


def test_long_pieces_count_for_more_than_short_ones() -> None:
    rate = Rate()
    rate.add(1000, 10.0)
    for _ in range(100):
        rate.add(10, 5.0)

    assert rate.token_s == pytest.approx(0.01, rel=0.6)
    assert rate.value(5) > 0
    assert Rate().value(5) == 0.0


def test_clock_of_prefill_charges_prompts_that_are_computed_together_an_equal_part() -> None:
    now = Clock(0.0)
    clock = PrefillClock(now)

    with clock.running():
        now.advance(3)
    now.advance(100)
    clock.add(8.0, prompts=4)

    assert clock() == 5.0


def test_measuring_keeps_no_prompt() -> None:
    prefills = Prefills()
    packed = pack_tokens(range(30_000))
    before = sys.getrefcount(packed)

    prefills.begun(MODEL, packed, 0, 0.0)

    assert sys.getrefcount(packed) == before
    assert prefills.ended(MODEL, packed[:-8], Tier.USER) > 0


def test_prefill_that_is_named_is_timed_whoever_computes_the_same_prompt() -> None:
    now = Clock(0.0)
    prefills = Prefills(now)
    packed = pack_tokens(range(100))
    first = prefills.begun(MODEL, packed, 0, 0.0, remember=False)
    now.advance(3)
    second = prefills.begun(MODEL, packed, 0, 0.0, remember=False)
    now.advance(2)

    assert prefills.ended(MODEL, packed, Tier.USER, first) == 5.0
    assert prefills.ended(MODEL, packed, Tier.USER, second) == 2.0
    assert prefills.ended(MODEL, packed, Tier.USER) == 0.0


def test_warm_times_prefill_alone_and_adds_it_to_what_was_found(
    disk: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from persist_cache import warm
    from persist_cache.prefill.run import prefill as compute

    def prefill(model: Any, cache: Any, tokens: Sequence[int], **options: Any) -> None:
        compute(model, cache, tokens, **options)
        clock.advance(len(tokens) * (0.02 if len(tokens) > 14 else 0.1))

    monkeypatch.setattr(warm, "prefill", prefill)
    put_in = disk.put

    def put(*args: Any, **options: Any) -> Any:
        clock.advance(1000)
        return put_in(*args, **options)

    monkeypatch.setattr(disk, "put", put)
    model = tiny_model("llama")
    prompt = [token % 50 for token in range(114)]

    first = warm.warm(disk, fingerprint(), model, prompt[:100], step_tokens=50, clock=clock)
    second = warm.warm(disk, fingerprint(), model, prompt, step_tokens=50, clock=clock)

    assert costs(disk) == {100: pytest.approx(2.0), 114: pytest.approx(3.4)}
    assert first.seconds == pytest.approx(2.0)
    assert second.seconds == pytest.approx(1.4)


def test_clock_of_a_batch_stands_still_while_it_decodes() -> None:
    from persist_cache.server.upstream.batch import Batch

    clock = PrefillClock()
    batch = Batch(clock, tiny_model("llama"), prefill_step_size=8, max_tokens=100)
    batch.insert([[token % 50 for token in range(40)]])
    while not batch.next()[1]:
        pass
    after_prefill = clock()
    for _ in range(20):
        assert batch.next()[1]

    assert clock() == after_prefill > 0
