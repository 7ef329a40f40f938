"""Sums of requests over the last hour and day, and samples of the disk: bounded, and honest."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from persist_cache.server.history.disk import DiskHistory, DiskSample
from persist_cache.server.history.requests import DAY_S, HOUR_S, RequestHistory
from tests.fakes import Clock


@pytest.fixture
def history(clock: Clock) -> RequestHistory:
    return RequestHistory(clock)


def test_a_request_counts_in_each_window_until_it_is_too_long_ago(
    history: RequestHistory, clock: Clock
) -> None:
    history.add("done", 100, {"memory": 60}, 1.5)
    clock.now += 2 * HOUR_S
    history.add("failed", 10, {}, None)

    hour, day, all_ = history.over(HOUR_S), history.over(DAY_S), history.over()

    assert (hour.requests, hour.failed, hour.asked_tokens) == (1, 1, 10)
    assert (day.requests, day.asked_tokens, day.reused_tokens) == (2, 110, {"memory": 60})
    assert day.saved_s == all_.saved_s == 1.5
    clock.now += DAY_S + 60
    assert history.over(DAY_S).requests == 0
    assert history.over().requests == 2


def test_the_figures_say_since_when_they_hold(history: RequestHistory, clock: Clock) -> None:
    started = clock.now
    clock.now += 120

    assert history.over(HOUR_S).since == history.over().since == started
    clock.now += DAY_S
    assert clock.now - HOUR_S - 60 <= history.over(HOUR_S).since <= clock.now - HOUR_S
    assert history.over().since == started


def test_a_hit_that_nobody_measured_is_told_apart(history: RequestHistory) -> None:
    history.add("done", 100, {"disk": 60}, None)
    history.add("done", 100, {}, None)

    assert history.over().unmeasured == 1


def test_a_clock_that_is_set_back_loses_nothing(history: RequestHistory, clock: Clock) -> None:
    for step in (0, -7200, 30, 60):
        clock.now += step
        history.add("done", 1, {}, None)

    assert history.over().requests == 4
    assert history.over(DAY_S).requests == 4


def test_a_clock_that_is_set_back_keeps_nothing_in_the_last_hour_for_longer(
    history: RequestHistory, clock: Clock
) -> None:
    history.add("done", 100, {"memory": 60}, 1.5)
    clock.now -= 5 * HOUR_S

    assert history.over(HOUR_S).since == history.over().since == clock.now
    assert history.over(HOUR_S).requests == 1
    history.add("done", 1, {}, None)
    clock.now += HOUR_S + 60
    assert history.over(HOUR_S).requests == 0
    assert history.over(DAY_S).requests == history.over().requests == 2


def test_a_year_of_requests_takes_no_more_than_a_day(history: RequestHistory, clock: Clock) -> None:
    drawn = random.Random(1)
    for _ in range(6000):
        clock.now += drawn.randrange(10_000)
        history.add("done", 1, {}, None)

    assert len(history) <= 24 * 60 + 1


def test_samples_of_the_disk_are_thinned_and_end_now(clock: Clock) -> None:
    disk = DiskHistory(lambda at: DiskSample(at, int(at)), clock)
    for _ in range(1000):
        disk.take()
        clock.now += 60

    found = disk.samples(240)

    assert len(found) <= 240
    assert found[-1].at == clock.now
    steps = {later.at - earlier.at for earlier, later in pairwise(found)}
    assert len(steps) == 1
    assert [one.at for one in found] == sorted(one.at for one in found)


def test_samples_are_of_the_last_day_and_in_order_whatever_the_clock_did(clock: Clock) -> None:
    disk = DiskHistory(lambda at: DiskSample(at, int(at)), clock)
    for step in (0, 3 * DAY_S, 60, -7200, 60, 10_000):  # it slept, and was set back
        clock.now += step
        disk.take()
        clock.now += 1

        ats = [one.at for one in disk.samples(240)]
        assert ats == sorted(ats)
        assert ats[0] >= clock.now - DAY_S

    assert len(ats) == 4


def test_a_disk_that_is_off_is_a_gap(clock: Clock) -> None:
    disk = DiskHistory(lambda at: DiskSample(at, None), clock)
    disk.take()
    clock.now += 60

    assert [one.total for one in disk.samples(10)] == [None, None]
