"""A remote that fails: requests go on, the breaker opens, and nothing wrong is stored."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from persist_cache.remote import (
    PublishOutcome,
    Remote,
    RemoteError,
    RemoteSettings,
    Why,
    bringing,
    looking,
    pulling,
    transport,
)
from persist_cache.remote import breaker as breakers
from persist_cache.remote.breaker import Breaker
from persist_cache.remote.keys import places_of_entry, places_to_ask
from persist_cache.store.store import Store
from tests.fakes import blob_files, fetched
from tests.remotes import (
    LONG,
    bring,
    folder_settings,
    machine,
    objects,
    opened,
    put_real,
    secret_file,
)
from tests.s3_like import S3Like, s3_like
from tests.waiting import until


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Like]:
    """A server of this test alone: what another one's client still asks must not count."""
    # What waits for a frozen server waits shortly here.
    monkeypatch.setattr(looking, "LOOK_S", 0.5)
    monkeypatch.setattr(transport, "STALL_S", 0.5)
    with s3_like() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def settings(server: S3Like, tmp_path: Path) -> RemoteSettings:
    return RemoteSettings(
        url="s3://bucket/prefix", secret_file=secret_file(tmp_path), publish_plain=True
    )


@pytest.fixture(scope="module")
def _objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a machine published."""
    folder = tmp_path_factory.mktemp("first")
    with machine(folder, "first", folder_settings(folder)) as (store, remote):
        assert remote.publish(put_real(store, LONG)).outcome == PublishOutcome.SENT
    return objects(folder)


@pytest.fixture
def published(server: S3Like, _objects: dict[str, bytes]) -> None:
    """An entry that another machine published."""
    server.objects.update(_objects)


@pytest.fixture(scope="module")
def _other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("second")
    with Store.open(folder, max_bytes=1 << 30, min_free_bytes=0, run_tokens=64) as store:
        yield store


@pytest.fixture
def second(_other: Store, settings: RemoteSettings) -> Iterator[tuple[Store, Remote]]:
    """Another machine, whose store is empty."""
    with opened(_other, settings) as remote:
        yield _other, remote
    _other.evict([one.id for one in _other.entries()])


def is_untouched(store: Store) -> bool:
    """Whether a store is as it was made: no entry, no file, no reservation."""
    return (
        store.entries() == []
        and blob_files(store.root) == []
        and list((store.root / "tmp").iterdir()) == []
        and pending(store) == 0
        and store.check(read_data=True) == []
    )


def pending(store: Store) -> int:
    """Reservations in the index."""
    with store.read() as txn:
        return len(txn.sized(b"pending"))


# ---- what is asked ------------------------------------------------------------------------------


def test_a_look_up_asks_for_each_anchor_once_and_lists_nothing(
    server: S3Like, second: tuple[Store, Remote]
) -> None:
    _, remote = second

    bring(remote, LONG)

    assert len(server.requests) == len(places_to_ask(0, len(LONG), [len(LONG)])) == 6
    assert {(one.method, one.query) for one in server.requests} == {("GET", "")}


def test_publishing_asks_for_each_object_once_and_lists_nothing(
    server: S3Like, store: Store, settings: RemoteSettings
) -> None:
    entry = put_real(store, LONG)

    with opened(store, settings) as remote:
        done = remote.publish(entry)

    anchors = len(places_of_entry(len(LONG)))
    asked = Counter((one.method, one.name[:5]) for one in server.requests)
    assert asked == {
        ("GET", "pc1/a"): anchors,
        ("PUT", "pc1/c"): 1,
        ("PUT", "pc1/b"): 3,
        ("PUT", "pc1/a"): anchors,
    }
    assert all(one.query == "" for one in server.requests)
    assert done.requests == len(server.requests)
    # Blobs first and the end last: what is found is whole.
    kinds = [one.name[4] for one in server.requests if one.method == "PUT"]
    assert kinds == ["c", *"b" * 3, *"a" * anchors]


@pytest.mark.usefixtures("published")
def test_twenty_requests_for_one_prompt_cost_one_pull(
    server: S3Like, second: tuple[Store, Remote]
) -> None:
    other, remote = second
    server.requests.clear()

    with ThreadPoolExecutor(20) as pool:
        brought = list(pool.map(lambda _: bring(remote, LONG), range(20)))

    reads = Counter(one.name for one in server.requests)
    assert set(reads.values()) == {1}
    assert {one.num_tokens for one in brought} == {len(LONG)}
    assert Counter(one.why for one in brought)[Why.BROUGHT] == 1
    assert fetched(other, LONG) == len(LONG)


def test_twenty_requests_for_what_is_not_there_cost_one_look_up(
    server: S3Like, second: tuple[Store, Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "LOOK_S", 60.0)
    monkeypatch.setattr(transport, "STALL_S", 60.0)
    _, remote = second
    all_wait = threading.Event()
    waiting = set()

    def pause() -> None:
        waiting.add(threading.get_ident())
        if len(waiting) == 20:
            all_wait.set()

    server.fault = lambda request: None if all_wait.wait(60) else 500
    with ThreadPoolExecutor(20) as pool:
        answers = set(pool.map(lambda _: bring(remote, LONG, pause=pause).why, range(20)))

    assert answers == {Why.NOT_FOUND}
    assert len(server.requests) == 6


# ---- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.usefixtures("published")
def test_a_blob_that_a_lifecycle_rule_deleted_is_a_miss_and_not_asked_for_at_once(
    server: S3Like, second: tuple[Store, Remote], settings: RemoteSettings
) -> None:
    other, _ = second
    now = [0.0]
    blob = max(name for name in server.objects if name.startswith("pc1/b/"))
    content = server.objects.pop(blob)
    with opened(other, settings, clock=lambda: now[0]) as remote:
        first = bring(remote, LONG)
        server.requests.clear()
        again = bring(remote, LONG)

        assert (first.why, again.why) == (Why.GONE, Why.NOT_FOUND)
        assert server.requests == []
        assert remote.status().breaker == "closed"
        assert is_untouched(other)
        server.objects[blob] = content
        now[0] += 3600
        assert bring(remote, LONG).why == Why.BROUGHT


@pytest.mark.usefixtures("published")
def test_refused_access_is_told_by_its_cause_and_opens_the_breaker(
    server: S3Like, second: tuple[Store, Remote]
) -> None:
    other, remote = second
    server.misbehave(403)

    answers = [bring(remote, LONG).why for _ in range(breakers.FAILURES + 1)]

    assert answers == [Why.FAILED] * breakers.FAILURES + [Why.BREAKER_OPEN]
    status = remote.status()
    assert (status.breaker, status.counters["errors:denied"]) == ("open", breakers.FAILURES)
    assert "credentials" in status.last_error
    assert "403" in status.last_error
    assert is_untouched(other)


def test_a_clock_that_is_wrong_is_told(server: S3Like, second: tuple[Store, Remote]) -> None:
    _, remote = second
    server.misbehave(403)
    server.error = "RequestTimeTooSkewed"

    assert bring(remote, LONG).why == Why.FAILED
    assert "clock" in remote.status().last_error


def test_a_fault_of_the_room_costs_no_answer(
    second: tuple[Store, Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, remote = second

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(looking.Looker, "look", fail)

    assert bring(remote, LONG).why == Why.FAILED


@pytest.mark.usefixtures("published")
def test_a_bucket_that_denies_what_is_missing_still_gives_what_is_there(
    server: S3Like, second: tuple[Store, Remote]
) -> None:
    _, remote = second
    server.fault = lambda request: None if request.name in server.objects else 403

    brought = bring(remote, [*LONG[:700], *range(5000, 5600)])

    assert brought.num_tokens == 700
    assert remote.status().breaker == "closed"


@pytest.mark.usefixtures("published")
def test_a_frozen_server_costs_one_request_its_time_limit(
    server: S3Like, second: tuple[Store, Remote]
) -> None:
    other, remote = second
    server.misbehave("freeze")

    first = bring(remote, LONG)
    server.requests.clear()
    again = bring(remote, LONG)

    assert (first.why, again.why) == (Why.TIMED_OUT, Why.BREAKER_OPEN)
    assert server.requests == []
    assert is_untouched(other)


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("freeze", Why.TIMED_OUT),
        ("trickle", Why.TIMED_OUT),
        ("reset", Why.FAILED),
        ("short", Why.REFUSED),
        (500, Why.FAILED),
        (503, Why.FAILED),
        (403, Why.FAILED),
    ],
)
def test_a_pull_that_fails_leaves_nothing_behind(
    server: S3Like, second: tuple[Store, Remote], fault: Any, why: Why
) -> None:
    other, remote = second
    server.misbehave(fault, "b")

    brought = bring(remote, LONG)

    assert (brought.why, brought.num_tokens) == (why, 0)
    assert is_untouched(other)


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("fault", ["short", "reset", 500])
def test_a_look_up_that_fails_is_a_miss(
    server: S3Like, second: tuple[Store, Remote], fault: Any
) -> None:
    other, remote = second
    server.misbehave(fault, "a")

    brought = bring(remote, LONG)

    assert brought.why in (Why.FAILED, Why.REFUSED)
    assert len(server.requests) == 6  # none is tried again: a request waits
    assert is_untouched(other)


@pytest.mark.usefixtures("published")
def test_a_pull_that_is_slower_than_computing_is_given_up(
    server: S3Like, second: tuple[Store, Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, remote = second
    monkeypatch.setattr(transport, "STALL_S", 30.0)
    server.misbehave("trickle", "b")

    brought = bring(remote, LONG, prefill_s=lambda num_tokens: num_tokens / 10_000)

    assert brought.why == Why.TOO_SLOW
    assert remote.status().breaker == "closed"
    assert is_untouched(other)


def test_where_nothing_was_timed_the_publishers_figure_says_how_long_to_wait(
    server: S3Like,
    second: tuple[Store, Remote],
    settings: RemoteSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a new machine, whose first request must not wait for two minutes."""
    other, remote = second
    with machine(tmp_path, "first", settings) as (store, publisher):
        publisher.publish(put_real(store, LONG, prefill_s=0.05))
    monkeypatch.setattr(transport, "STALL_S", 30.0)
    server.misbehave("trickle", "b")

    brought = bring(remote, LONG, prefill_s=lambda num_tokens: 0.0)

    assert brought.why == Why.TOO_SLOW
    assert brought.seconds < 10
    assert is_untouched(other)


@pytest.mark.usefixtures("published")
def test_a_pull_in_place_of_which_nothing_is_computed_may_take_its_time(
    second: tuple[Store, Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `remote pull` of some gigabytes over a slow line."""
    _, remote = second
    monkeypatch.setattr(pulling, "_LONGEST_S", -1.0)

    assert bring(remote, LONG, prefill_s=lambda num_tokens: 0.0).why == Why.TOO_SLOW
    assert bring(remote, LONG).why == Why.BROUGHT


@pytest.mark.usefixtures("published")
def test_a_small_pull_says_nothing_of_the_speed_of_a_large_one(
    second: tuple[Store, Remote],
) -> None:
    _, remote = second

    first = bring(remote, LONG[:600], prefill_s=lambda num_tokens: 60.0)
    brought = bring(remote, LONG, known=600, prefill_s=lambda num_tokens: 60.0)

    assert first.why == brought.why == Why.BROUGHT
    assert remote.status().bytes_per_s == 0


@pytest.mark.usefixtures("published")
def test_a_slow_remote_is_not_tried_by_every_request(
    server: S3Like, second: tuple[Store, Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, remote = second
    monkeypatch.setattr(transport, "STALL_S", 30.0)
    server.misbehave("trickle", "b")
    assert bring(remote, LONG, prefill_s=lambda num_tokens: 0.3).why == Why.TOO_SLOW
    server.requests.clear()

    brought = bring(remote, LONG, prefill_s=lambda num_tokens: 0.3)

    assert brought.why == Why.NOT_WORTH_IT
    assert {one.name[4] for one in server.requests} == {"a"}


@pytest.mark.usefixtures("published")
def test_blobs_that_fail_open_the_breaker_though_manifests_do_not(
    server: S3Like, second: tuple[Store, Remote]
) -> None:
    _, remote = second
    server.misbehave(500, "b")

    answers = [bring(remote, LONG).why for _ in range(breakers.FAILURES + 1)]

    assert answers == [Why.FAILED] * breakers.FAILURES + [Why.BREAKER_OPEN]


@pytest.mark.usefixtures("published")
def test_what_is_computed_faster_is_not_fetched(
    server: S3Like, second: tuple[Store, Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bringing, "_MEASURED_BYTES", 1)
    _, remote = second
    first = bring(remote, LONG[:600])
    server.requests.clear()

    brought = bring(
        remote, LONG, known=first.num_tokens, prefill_s=lambda num_tokens: num_tokens * 1e-9
    )

    assert first.why == Why.BROUGHT
    assert brought.why == Why.NOT_WORTH_IT
    assert {one.name[4] for one in server.requests} == {"a"}


class GoneAwayError(Exception):
    """A client has left."""


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("kind", ["a", "b"])
def test_a_client_that_leaves_ends_the_pull(
    server: S3Like,
    second: tuple[Store, Remote],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    other, remote = second
    monkeypatch.setattr(looking, "LOOK_S", 30.0)
    monkeypatch.setattr(transport, "STALL_S", 30.0)
    server.misbehave("freeze", kind)

    def pause() -> None:
        if any(one.name.startswith(f"pc1/{kind}") for one in server.requests):
            raise GoneAwayError

    with pytest.raises(GoneAwayError):
        bring(remote, LONG, pause=pause)

    assert is_untouched(other)
    assert remote.status().breaker == "closed"


@pytest.mark.usefixtures("published")
def test_a_store_without_room_refuses_before_it_pulls(
    server: S3Like, settings: RemoteSettings, tmp_path: Path
) -> None:
    with Store.open(tmp_path / "small", max_bytes=1 << 20, min_free_bytes=0) as small:
        before = small.stats().usage.total
        small_bytes = before + 120_000
    with (
        Store.open(tmp_path / "small", max_bytes=small_bytes, min_free_bytes=0) as small,
        opened(small, settings) as remote,
    ):
        server.requests.clear()
        brought = bring(remote, LONG)

        assert brought.why == Why.NO_ROOM
        assert {one.name[4] for one in server.requests} == {"a"}
        assert small.stats().usage.total <= small_bytes


@pytest.mark.parametrize(
    ("fault", "said"),
    [(507, "it is full"), (403, "credentials"), (500, "status 500"), ("reset", "failed")],
)
def test_publishing_says_what_failed_and_is_taken_up_again(
    server: S3Like, store: Store, settings: RemoteSettings, fault: Any, said: str
) -> None:
    entry = put_real(store, LONG)
    with opened(store, settings) as remote:
        refused = 0 if fault == "reset" else fault
        server.fault = lambda request: (
            (refused or 502) if request.method == "PUT" and request.name[4] == "b" else None
        )
        with pytest.raises(RemoteError, match=said if refused else "502"):
            remote.publish(entry)
        assert not any(name.startswith("pc1/a") for name in server.objects)

        server.misbehave(None)

        assert remote.publish(entry).outcome == PublishOutcome.SENT


def test_a_remote_that_cannot_be_reached_is_left_alone(
    store: Store, settings: RemoteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    with opened(store, settings) as remote:
        answers = [bring(remote, LONG).why for _ in range(breakers.FAILURES + 1)]
        probed = remote.probe()

        assert answers == [Why.FAILED] * breakers.FAILURES + [Why.BREAKER_OPEN]
        assert "cannot be reached" in remote.status().last_error
        assert not probed.reachable


# ---- the breaker --------------------------------------------------------------------------------


@pytest.mark.usefixtures("published")
def test_a_remote_that_is_back_is_found_by_one_probe_beside_the_requests(
    server: S3Like, second: tuple[Store, Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, remote = second
    monkeypatch.setattr(breakers, "FIRST_RETRY_S", 0.0)
    server.misbehave("freeze")
    assert bring(remote, LONG).why == Why.TIMED_OUT
    server.misbehave(None)
    server.requests.clear()

    answers = [bring(remote, LONG).why]
    until(lambda: remote.status().breaker == "closed")
    answers.append(bring(remote, LONG).why)

    assert answers == [Why.BREAKER_OPEN, Why.BROUGHT]
    assert [one.name[:6] for one in server.requests][:1] == ["pc1/p/"]
    assert remote.status().counters["probes"] == 1


def test_the_breaker_waits_twice_as_long_after_each_probe_that_failed() -> None:
    now, probes = [0.0], [0]

    def probe() -> None:
        probes[0] += 1

    breaker = Breaker(probe, clock=lambda: now[0])
    breaker.failed("it is down", at_once=True)
    waited = []
    for _ in range(8):
        waited.append(breaker.retry_in_s)
        now[0] += breaker.retry_in_s - 0.5
        assert not breaker.allows()
        assert breaker.state == "open"
        now[0] += 0.5
        assert not breaker.allows()
        assert not breaker.allows()  # one probe at a time
        assert breaker.state == "half-open"
        breaker.failed("it is down")
    breaker.succeeded()

    assert waited == [30, 60, 120, 240, 480, 600, 600, 600]
    assert probes == [8]
    assert (breaker.state, breaker.allows()) == ("closed", True)


def test_failures_that_are_not_in_a_row_do_not_open_the_breaker() -> None:
    breaker = Breaker(lambda: None)

    for _ in range(5):
        breaker.failed("it answered with status 500")
        breaker.failed("it answered with status 500")
        breaker.succeeded()

    assert breaker.allows()


# ---- rights and races ---------------------------------------------------------------------------


def test_a_probe_tells_what_may_be_done(
    server: S3Like, store: Store, settings: RemoteSettings
) -> None:
    with opened(store, settings) as remote:
        sound = remote.probe()
        server.misbehave(403, method="PUT")
        readable = remote.probe()
        server.misbehave(403)
        closed = remote.probe()

    assert (sound.may_create, sound.create_is_exclusive, sound.message) == (True, True, "")
    assert (readable.may_read, readable.may_create) == (True, False)
    assert "credentials" in readable.message
    assert (closed.reachable, closed.may_read) == (False, False)
    assert server.objects == {}


def test_a_probe_sees_a_server_that_lets_two_create_one_object(
    server: S3Like, store: Store, settings: RemoteSettings
) -> None:
    server.fault = lambda request: 200 if request.method == "PUT" else None

    with opened(store, settings) as remote:
        probed = remote.probe()

    assert probed.create_is_exclusive is False
    assert "If-None-Match" in probed.message


@pytest.mark.usefixtures("published")
def test_a_mirror_is_read_over_http_and_never_written(
    server: S3Like, settings: RemoteSettings, tmp_path: Path
) -> None:
    mirror = RemoteSettings(
        url=f"http://127.0.0.1:{server.port}/mirror", secret_file=settings.secret_file
    )
    with machine(tmp_path, "reader", mirror) as (other, remote):
        brought = bring(remote, LONG)
        with pytest.raises(RemoteError, match="only read"):
            remote.publish(other.entries()[0].id)

    assert brought.num_tokens == len(LONG)


def test_closing_ends_what_is_under_way(
    server: S3Like, second: tuple[Store, Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "LOOK_S", 30.0)
    monkeypatch.setattr(transport, "STALL_S", 30.0)
    server.misbehave("freeze")
    _, remote = second
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(bring, remote, LONG)
        until(lambda: server.requests)
        assert remote.close(10)

        assert answer.result().why == Why.CLOSED
    assert bring(remote, LONG).why == Why.CLOSED
