"""Prometheus metrics of a running cache, read when they are scraped.

Nothing is counted here: the numbers are those of `PromptCache.stats()`, in whose store counters
live on over restarts. Labels take few values, whatever prompts and errors come along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from persist_cache.cache.stats import PromptCacheStats
from persist_cache.entry import SOURCES, TIER_LABELS, MissReason
from persist_cache.remote import COUNTERS, Why
from persist_cache.sharing.as_json import RemoteJson, by_reason
from persist_cache.stability.names import REPAIRS
from persist_cache.store.catalog import StoreStats
from persist_cache.store.reasons import reason_of

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TROUBLES = {"StoreFullError": "full", "StoreAccessError": "not_writable"}

_HITS = (Why.BROUGHT, Why.SHARED)
_BY_REASON: Mapping[str, tuple[str, ...]] = {
    "misses": tuple(why.value for why in Why if why not in _HITS),
    "refused": (),
    "errors": (),
}
"""Counters of a remote that have a reason, with those that are known beforehand."""


class CacheCollector(Collector):
    """Turns the statistics of a cache into metrics.

    Thread safety: as `stats`, which is called once for each scrape.
    """

    def __init__(
        self,
        stats: Callable[[], PromptCacheStats],
        healthy: Callable[[], bool] | None = None,
        *,
        remote: Callable[[], RemoteJson | None] = lambda: None,
    ) -> None:
        """Read nothing yet.

        Args:
            stats: `PromptCache.stats`.
            healthy: Whether the model answers, if that is known.
            remote: The state of the remote, if there is one.
        """
        self._remote = remote
        self._stats = stats
        self._healthy = healthy

    def describe(self) -> list[CounterMetricFamily]:
        # Without this, registering would read the statistics once to learn the names.
        return []

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        stats = self._stats()
        yield from _requests(stats)
        yield from _saving(stats)
        yield from _memory(stats)
        if self._healthy is not None:
            yield _gauge("model_up", "1 while the model can answer.", int(self._healthy()))
        yield _disk_off(stats)
        if (remote := self._remote()) is not None:
            yield from _of_remote(remote)
        if stats.store is not None:
            yield from _store(stats.store)


def exposition(collector: Collector) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry)


def _requests(stats: PromptCacheStats) -> Iterator[CounterMetricFamily]:
    yield _by(
        "hits",
        "Requests that found a prefix.",
        "source",
        {source: stats.hits.get(source, 0) for source in SOURCES},
    )
    yield _by("misses", "Requests that found nothing.", "reason", _by_label(stats.misses))
    yield _by(
        "partial_hits",
        "Hits that left more than the last token to compute.",
        "reason",
        _by_label(stats.partial),
    )
    yield _by(
        "tokens_saved",
        "Prompt tokens that were not computed.",
        "source",
        {source: stats.tokens.get(source, 0) for source in SOURCES},
    )
    yield _by(
        "repaired_requests",
        "Requests that were changed before they were rendered.",
        "repair",
        {**dict.fromkeys(REPAIRS, 0), **stats.repaired},
    )
    yield _counter(
        "shared_requests", "Requests that waited for what another one computed.", stats.shared
    )
    yield _counter(
        "shared_tokens", "Prompt tokens that they need not compute for that.", stats.shared_tokens
    )
    yield _counter("tokens_asked", "Tokens of all prompts.", stats.asked)
    yield _counter("restore_seconds", "Seconds spent in loading from disk.", stats.restore_s)
    yield _counter("restored_bytes", "Bytes loaded from disk.", stats.restored_bytes)
    yield _counter(
        "read_ahead_bytes", "Bytes read ahead for waiting requests.", stats.read_ahead_bytes
    )


def _by_label(reasons: Mapping[str, int]) -> Counter[str]:
    known = (one.value for one in MissReason if one is not MissReason.DISK_ERROR)
    counts: Counter[str] = Counter(dict.fromkeys(known, 0))
    for reason, count in reasons.items():
        counts[reason_of(reason).value] += count
    return counts


def _saving(stats: PromptCacheStats) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
    yield _counter("writes", "Entries written by this process.", stats.saves)
    yield _counter("written_bytes", "Bytes written by this process.", stats.written_bytes)
    yield _gauge("queue_jobs", "Saves that wait.", stats.queued_jobs)
    yield _gauge("queue_bytes", "Memory that waiting saves keep alive.", stats.queued_bytes)
    problems: Counter[str] = Counter()
    for name, count in stats.problems.items():
        # Behind the colon is the name of a class, which says too little to be worth a series.
        problems[name.partition(":")[0]] += count
    yield _by("problems", "Things that went wrong or were refused.", "problem", problems)


def _memory(stats: PromptCacheStats) -> Iterator[GaugeMetricFamily]:
    entries = {tier: stats.memory.get(tier, {}).get("n_sequences", 0) for tier in TIER_LABELS}
    nbytes = {tier: stats.memory.get(tier, {}).get("n_bytes", 0) for tier in TIER_LABELS}
    yield _gauge_by("memory_entries", "Caches in memory.", "tier", entries)
    yield _gauge_by("memory_bytes", "Bytes of the caches in memory.", "tier", nbytes)


def _disk_off(stats: PromptCacheStats) -> GaugeMetricFamily:
    reason = ""
    if stats.disk_error:
        reason = _TROUBLES.get(stats.disk_error, "failed")
    elif stats.disk_off:
        reason = "memory_only"
    return _gauge_by(
        "disk_off",
        "1 while nothing is kept on disk for this reason; GET /v1/cache/stats has the sentence.",
        "reason",
        {one: int(one == reason) for one in ("memory_only", "failed", *_TROUBLES.values())},
    )


def _of_remote(remote: RemoteJson) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
    states = ("closed", "open", "half-open", "off")
    yield _gauge_by(
        "remote_breaker",
        "1 for the state of the remote: in use, left alone after failures, probed, or unusable.",
        "state",
        {one: int(one == remote.breaker) for one in states},
    )
    yield _gauge("remote_queue_jobs", "Entries that wait to be published.", remote.queued)
    yield _gauge("remote_bytes_per_second", "Measured speed of pulls.", remote.bytes_per_s)
    counts = remote.counters
    for name, said in COUNTERS.items():
        if name in _BY_REASON:
            reasons = dict.fromkeys(_BY_REASON[name], 0) | by_reason(counts, name)
            yield _by(f"remote_{name}", said, "reason", reasons)
        elif name == "saved_ms":
            saved_s = counts.get(name, 0) / 1000
            yield _counter("remote_saved_seconds", said.replace("Milliseconds", "Seconds"), saved_s)
        else:
            yield _counter(f"remote_{name}", said, counts.get(name, 0))


def _store(store: StoreStats) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
    yield _gauge("disk_entries", "Entries on disk.", store.entries)
    usage = store.usage
    kinds = ("blobs", "index", "pending", "trash", "quarantine", "folders", "ballast")
    yield _gauge_by(
        "disk_bytes",
        "Bytes on disk, by what they are for.",
        "kind",
        {kind: getattr(usage, kind) for kind in kinds},
    )
    yield _gauge("disk_used_bytes", "Bytes on disk, all told.", usage.total)
    yield _gauge("disk_budget_bytes", "Bytes that the store may take.", store.max_bytes)
    yield _gauge("disk_free_bytes", "Bytes free on the file system.", store.free_bytes)
    yield _gauge("disk_min_free_bytes", "Bytes that are left free.", store.min_free_bytes)
    yield _gauge("disk_blobs", "Files with KV.", store.blobs)
    yield _gauge("disk_written_today_bytes", "Bytes written this UTC day.", store.written_today)
    if store.daily_write_bytes is not None:
        yield _gauge(
            "disk_daily_write_budget_bytes",
            "Bytes that may be written in a UTC day.",
            store.daily_write_bytes,
        )
    shares: dict[str, float] = {"model": 0.0, "salt": 0.0}
    near: dict[str, float] = {"model": 0, "salt": 0}
    for one in store.quotas:
        shares[one.kind] = max(shares[one.kind], one.nbytes / (one.max_bytes or 1))
        near[one.kind] += one.is_near
    yield _gauge_by("quota_used_ratio", "Share of the fullest quota.", "kind", shares)
    yield _gauge_by("quotas_near", "Quotas that are nearly used up.", "kind", near)
    counters = store.counters
    yield _counter(
        "disk_written_bytes", "Bytes written in the life of the store.", store.written_bytes
    )
    evictions = CounterMetricFamily(
        "persist_cache_evictions",
        "Entries removed in the life of the store.",
        labels=["cause", "tier"],
    )
    for cause in ("evicted", "expired"):
        for tier in TIER_LABELS:
            evictions.add_metric([cause, tier], counters.get(f"{cause}:{tier}", 0))
    yield evictions
    yield _counter("quarantined", "Damaged blobs put aside.", counters.get("quarantined", 0))
    yield _counter(
        "stale_rejected",
        "Reads refused because the bytes were not those written.",
        counters.get("bad_reads", 0),
    )
    yield _counter("read_errors", "Reads that failed.", counters.get("read_errors", 0))


def _counter(name: str, help_: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"persist_cache_{name}", help_, value=value)


def _gauge(name: str, help_: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"persist_cache_{name}", help_, value=value)


def _by(name: str, help_: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"persist_cache_{name}", help_, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([key], value)
    return family


def _gauge_by(name: str, help_: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"persist_cache_{name}", help_, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([key], value)
    return family
