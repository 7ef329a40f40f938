"""Metrics say what the statistics say, in few series, whatever was counted."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.cache.stats import PromptCacheStats
from persist_cache.index.transaction import Reader
from persist_cache.remote import COUNTERS, RemoteStatus
from persist_cache.server.metrics import CacheCollector, exposition
from persist_cache.sharing.as_json import remote_json
from persist_cache.store.reasons import reason_of
from persist_cache.store.store import Store
from tests.bulk_store import conversations, fill
from tests.fakes import Clock, blob_files, fetched, fingerprint, put

EMPTY = PromptCacheStats({}, {}, {}, {}, 0.0, 0, 0, 0, 0, 0, 0, {}, "", "", None)


def samples(stats: PromptCacheStats, healthy: bool = True) -> dict[tuple[str, ...], float]:
    """Values by name and label values, read back by Prometheus' own parser."""
    text = exposition(CacheCollector(lambda: stats, lambda: healthy)).decode()
    return {
        (sample.name.removeprefix("persist_cache_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_of_the_process_are_reported() -> None:
    stats = replace(
        EMPTY,
        memory={"system": {"n_sequences": 2, "n_bytes": 300}},
        hits={"memory": 3, "disk": 2},
        misses={"nothing is stored for this model": 4},
        tokens={"memory": 30, "disk": 20},
        restore_s=1.5,
        restored_bytes=1000,
        read_ahead_bytes=900,
        saves=6,
        written_bytes=600,
        queued_jobs=1,
        queued_bytes=100,
        problems={"disk:StoreFullError": 2, "disk:StoreError": 1},
        disk_off="the disk is full",
        disk_error="StoreFullError",
        shared=5,
        shared_tokens=4000,
    )

    found = samples(stats, healthy=False)

    expected = {
        ("hits_total", "memory"): 3,
        ("hits_total", "disk"): 2,
        ("misses_total", "nothing_stored"): 4,
        ("tokens_saved_total", "disk"): 20,
        ("restore_seconds_total",): 1.5,
        ("restored_bytes_total",): 1000,
        ("read_ahead_bytes_total",): 900,
        ("shared_requests_total",): 5,
        ("shared_tokens_total",): 4000,
        ("writes_total",): 6,
        ("written_bytes_total",): 600,
        ("queue_jobs",): 1,
        ("queue_bytes",): 100,
        ("problems_total", "disk"): 3,
        ("memory_entries", "system"): 2,
        ("memory_bytes", "system"): 300,
        ("disk_off", "full"): 1,
        ("disk_off", "memory_only"): 0,
        ("model_up",): 0,
    }
    assert {key: found[key] for key in expected} == expected


def test_the_remote_is_reported_with_all_of_its_counters() -> None:
    status = RemoteStatus(
        url="s3://team/prompts",
        breaker="open",
        retry_in_s=30.0,
        last_error="It does not answer.",
        bytes_per_s=1e6,
        publishes=True,
        queued=3,
        counters={"hits": 2, "saved_ms": 1500, "misses:not_found": 4, "errors:timeout": 5},
    )
    text = exposition(
        CacheCollector(lambda: EMPTY, lambda: True, remote=lambda: remote_json(status, ""))
    ).decode()
    families = {one.name: one for one in text_string_to_metric_families(text)}

    def value(name: str, **labels: str) -> float:
        (found,) = [one for one in families[name].samples if one.labels == labels]
        return found.value

    assert value("persist_cache_remote_hits") == 2
    assert value("persist_cache_remote_saved_seconds") == 1.5
    assert value("persist_cache_remote_misses", reason="not_found") == 4
    assert value("persist_cache_remote_misses", reason="too_slow") == 0
    assert value("persist_cache_remote_errors", reason="timeout") == 5
    assert value("persist_cache_remote_breaker", state="open") == 1
    assert value("persist_cache_remote_queue_jobs") == 3
    for name in set(COUNTERS) - {"saved_ms"}:
        assert f"persist_cache_remote_{name}" in families
    assert "team/prompts" not in text


def test_totals_of_the_store_are_reported(store: Store, clock: Clock) -> None:
    put(store, [1, 2, 3], tier="system")
    first = put(store, [4, 5, 6], tier="user")
    put(store, [7, 8, 9], expires=clock() + 1)
    store.evict([first])
    clock.advance(2)
    store.gc()
    store.count("bad_reads", 2)
    totals = store.stats()

    found = samples(replace(EMPTY, store=totals))

    assert found[("disk_entries",)] == 1
    assert found[("disk_used_bytes",)] == totals.usage.total
    assert found["disk_bytes", "blobs"] == totals.usage.blobs
    assert found[("disk_budget_bytes",)] == totals.max_bytes
    assert found[("disk_free_bytes",)] == totals.free_bytes
    assert found[("disk_written_today_bytes",)] == totals.written_today > 0
    assert found["evictions_total", "evicted", "user"] == 1
    assert found["evictions_total", "evicted", "assistant"] == 0
    assert found["evictions_total", "expired", "assistant"] == 1
    assert found[("disk_min_free_bytes",)] == totals.min_free_bytes
    assert found[("stale_rejected_total",)] == 2
    assert found[("quarantined_total",)] == 0
    assert ("disk_daily_write_budget_bytes",) not in found
    budget = msgspec.structs.replace(totals, daily_write_bytes=7)
    assert samples(replace(EMPTY, store=budget))[("disk_daily_write_budget_bytes",)] == 7


def test_damaged_blob_is_counted_as_rejected_and_as_quarantined(store: Store) -> None:
    put(store, [1, 2, 3])
    (path,) = blob_files(store.root)
    path.write_bytes(path.read_bytes()[:-1])
    assert fetched(store, [1, 2, 3]) == 0

    found = samples(replace(EMPTY, store=store.stats()))

    assert found[("stale_rejected_total",)] == 1
    assert found[("quarantined_total",)] == 1
    assert found["disk_bytes", "quarantine"] > 0


def test_statistics_read_no_table(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are scraped every few seconds, beside a decode loop, whatever the store holds."""
    fill(store, conversations(fingerprint(), 100))

    def forbidden(self: Reader, database: bytes) -> None:
        raise AssertionError(f"all of {database!r} was read")

    monkeypatch.setattr(Reader, "_table", forbidden)
    with PromptCache(store=store) as cache:
        found = samples(cache.stats())
        assert cache.disk_off == ""

    assert found[("disk_entries",)] == 100


def test_labels_stay_few_whatever_the_reasons_are() -> None:
    few = samples(EMPTY)
    reasons = {f"the disk failed while it read {number}": 1 for number in range(1000)}

    many = samples(replace(EMPTY, misses=reasons))

    assert many["misses_total", "disk_error"] == 1000
    assert len(many) == len(few) + 1


@pytest.mark.parametrize("words", [(), ("a", "b")])
def test_reasons_that_the_store_gives_have_labels(store: Store, words: tuple[str, ...]) -> None:
    if words:
        put(store, [1, 2, 3])
    match = store.match(fingerprint(), [9, 9])

    assert match.why is not None
    assert reason_of(match.reason) is match.why
    assert match.why.value == ("other_prompt" if words else "nothing_stored")
