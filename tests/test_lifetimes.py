"""Default lifetimes: what goes so long after it was stored, by tier, model and salt."""

from __future__ import annotations

from pathlib import Path

import pytest

from persist_cache import Store
from persist_cache.fingerprint.value import salt_digest
from persist_cache.queries.explain import explain
from tests.fakes import Clock
from tests.test_quotas import identity, put

DAY = 86400


def test_an_entry_goes_when_its_time_is_over_however_often_it_is_used(tmp_path: Path) -> None:
    clock = Clock()
    with Store.open(
        tmp_path / "store", min_free_bytes=0, clock=clock, ttl={"assistant": 7 * DAY}
    ) as store:
        put(store, "a", "", [1, 2, 3])
        put(store, "a", "", [4, 5, 6], tier="system")
        for _ in range(6):
            clock.advance(DAY)
            store.touch(store.match(identity("a"), [1, 2, 3]))
            store.tidy()
        assert len(store.entries()) == 2
        clock.advance(DAY + 60)

        store.tidy()

        (left,) = store.entries()
        assert left.tier.label == "system"


def test_the_shortest_lifetime_that_is_said_counts(tmp_path: Path) -> None:
    clock = Clock()
    rules = {
        "assistant": 10 * DAY,
        "model:a": 6 * DAY,
        "salt": 4 * DAY,
        f"salt:{salt_digest('x')}": 2 * DAY,
    }
    with Store.open(tmp_path / "store", min_free_bytes=0, clock=clock, ttl=rules) as store:
        for model in ("a", "b"):
            for salt in ("", "x", "y"):
                put(store, model, salt, [1, 2, 3])

        told = {one.fingerprint: one.expires for one in store.entries()}

        for model, salt, days in (
            ("a", "", 6),
            ("b", "", 10),
            ("a", "x", 2),
            ("b", "x", 2),
            ("a", "y", 4),
        ):
            assert told[identity(model, salt).hex] == pytest.approx(clock() + days * DAY)
            assert store.get(
                next(
                    one.id
                    for one in store.entries()
                    if one.fingerprint == identity(model, salt).hex
                )
            ).expires == pytest.approx(clock() + days * DAY)


def test_a_date_of_its_own_takes_its_place_and_what_is_pinned_stays(tmp_path: Path) -> None:
    clock = Clock()
    with Store.open(
        tmp_path / "store", min_free_bytes=0, clock=clock, ttl={"assistant": DAY}
    ) as store:
        put(store, "a", "", [1], expires=clock() + 9 * DAY)
        put(store, "a", "", [2], pinned=True)
        put(store, "a", "", [3])
        clock.advance(2 * DAY)

        store.tidy()

        assert [one.num_tokens for one in store.entries()] == [1, 1]
        assert {one.pinned for one in store.entries()} == {True, False}


def test_the_next_put_applies_it_in_a_store_that_is_never_idle(tmp_path: Path) -> None:
    clock = Clock()
    with Store.open(
        tmp_path / "store", min_free_bytes=0, clock=clock, ttl={"assistant": DAY}
    ) as store:
        put(store, "a", "", [1])
        clock.advance(2 * DAY)

        put(store, "a", "", [2])

        assert len(store.entries()) == 1


def test_memory_lets_go_of_it_as_well(tmp_path: Path) -> None:
    from persist_cache import PromptCache
    from tests.live_fakes import FakeCodec, FakeLayer
    from tests.waiting import until

    with (
        Store.open(tmp_path / "store", min_free_bytes=0, ttl={"user": 1}) as store,
        PromptCache(
            store=store, identify=lambda _: identity("a"), codec=FakeCodec(), idle_s=0.05
        ) as cache,
    ):
        for tier, tokens in (("user", [1, 2]), ("system", [3, 4])):
            cache.look_up("m", tokens)
            cache.insert_cache("m", tokens, [FakeLayer(tokens)], cache_type=tier)

        until(lambda: len(cache) == 1)

        assert cache.known_tokens("m", [3, 4]) == 2


def test_explain_says_when_it_expires(tmp_path: Path) -> None:
    clock = Clock()
    with Store.open(
        tmp_path / "store", min_free_bytes=0, clock=clock, ttl={"assistant": 3 * DAY}
    ) as store:
        put(store, "a", "", [1, 2, 3, 4])
        clock.advance(DAY / 2)

        said = explain(store, identity("a"), [1, 2, 3, 4, 5])

        assert said.message.endswith("Its entry expires in 2 days.")
        assert said.expires == pytest.approx(clock() + 2.5 * DAY)


def test_what_a_wrong_clock_dated_ahead_is_kept_no_longer_for_being_used(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "store"
    with Store.open(path, min_free_bytes=0, clock=clock, ttl={"assistant": DAY}) as store:
        clock.advance(365 * DAY)
        put(store, "a", "", [1, 2, 3])
        clock.advance(-365 * DAY)
        store.touch(store.match(identity("a"), [1, 2, 3]))
        store.flush()
    clock.advance(DAY + 60)

    with Store.open(path, min_free_bytes=0, clock=clock) as store:
        store.tidy()

        assert store.entries() == []
