"""Why the reuse of a prompt ends, as header, counters and `stats` say; and what it was worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persist_cache import PromptCache, Store
from persist_cache.cache.stats import Fetch
from persist_cache.entry import Match
from persist_cache.server.metrics import OTHER_REASON, CacheCollector, exposition, reason_label
from persist_cache.server.ticket import cache_header
from persist_cache.store import reasons
from persist_cache.store.kin import NOTHING_STORED
from persist_cache.store.reasons import why_no_more
from tests.cli import runner
from tests.fakes import blob_files, fingerprint
from tests.live_fakes import MODEL, FakeCodec, FakeLayer

Make = Callable[..., PromptCache]
STORED = list(range(100))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        yield store


@pytest.fixture
def make(disk: Store) -> Iterator[Make]:
    """Make caches over one store, as processes one after the other would."""
    made: list[PromptCache] = []

    def build(**options: Any) -> PromptCache:
        options = {"store": disk, "identify": lambda model: fingerprint(), "idle_s": 60, **options}
        made.append(PromptCache(codec=FakeCodec(), leave_tokens=1, **options))
        return made[-1]

    yield build
    for cache in made:
        cache.close()


def insert(cache: PromptCache, tokens: Sequence[int], *, trimmable: bool = True) -> None:
    layers = [FakeLayer(tokens, trimmable)]
    cache.insert_cache(MODEL, list(tokens), layers, cache_type="user")


def look(cache: PromptCache, tokens: Sequence[int]) -> tuple[str, int, str]:
    _, rest, fetch = cache.look_up(MODEL, list(tokens))
    assert len(rest) == len(tokens) - fetch.num_tokens
    return fetch.source, fetch.num_tokens, fetch.reason


@pytest.mark.parametrize("source", ["memory", "disk"])
def test_reuse_ends_for_the_reason_that_is_true(make: Make, source: str) -> None:
    cache = make()
    insert(cache, STORED)
    if source == "disk":
        cache.close()
        cache = make()

    assert look(cache, [*STORED[:60], 7, 7]) == (source, 60, reasons.DIVERGES)
    assert look(cache, [*STORED, 7, 7]) == (source, 100, reasons.ENDS)


@pytest.mark.parametrize("source", ["memory", "disk"])
def test_reuse_up_to_the_last_token_has_no_reason(make: Make, source: str) -> None:
    cache = make()
    insert(cache, STORED)
    if source == "disk":
        cache.close()
        cache = make()

    assert look(cache, STORED[:60]) == (source, 59, "")
    assert look(cache, [*STORED, 7]) == (source, 100, "")


@pytest.mark.parametrize("source", ["memory", "disk"])
def test_missing_checkpoint_is_the_reason_wherever_more_is_shared(make: Make, source: str) -> None:
    cache = make()
    insert(cache, STORED[:40], trimmable=False)
    insert(cache, STORED, trimmable=False)
    if source == "disk":
        cache.close()
        cache = make()

    assert look(cache, [*STORED[:60], 7, 7]) == (source, 40, reasons.NO_CHECKPOINT)


def test_memory_alone_says_why_reuse_ends_not_why_there_is_no_disk(make: Make) -> None:
    cache = make(store=None)
    insert(cache, STORED)

    assert look(cache, [*STORED[:60], 7, 7]) == ("memory", 60, reasons.DIVERGES)
    assert look(cache, [7, 7, 7])[2] == "no store was given"


def test_few_more_tokens_on_disk_are_told(make: Make) -> None:
    with make() as before:
        insert(before, STORED)
    cache = make()
    insert(cache, STORED[:90])

    assert look(cache, [*STORED, 7, 7]) == ("memory", 90, reasons.FEW_MORE)


def test_unreadable_disk_is_told_though_memory_has_a_part(make: Make, disk: Store) -> None:
    with make() as before:
        insert(before, STORED)
    cache = make(persist=())
    insert(cache, STORED[:20])
    for path in blob_files(disk.root):
        path.write_bytes(path.read_bytes()[:-1])

    assert look(cache, [*STORED, 7, 7]) == ("memory", 20, reasons.UNREADABLE)


def test_requests_partial_hits_and_tokens_are_counted_once(make: Make, disk: Store) -> None:
    cache = make()
    insert(cache, STORED)
    look(cache, [*STORED[:3], *range(200, 1123)])  # 3 of 926
    look(cache, STORED)
    look(cache, [7, 7])
    cache.look_up(MODEL, STORED, counted=False)
    stats, counters = cache.stats(), disk.stats().counters

    assert (sum(stats.hits.values()), sum(stats.misses.values())) == (2, 1)
    assert stats.partial == {reasons.DIVERGES: 1}
    assert (sum(stats.tokens.values()), stats.asked) == (3 + 99, 926 + 100 + 2)
    assert counters["hits_memory"] == 2
    assert counters[f"partial:{reasons.DIVERGES}"] == 1
    assert (counters["tokens_reused"], counters["tokens_asked"]) == (102, 1028)
    text = exposition(CacheCollector(lambda: stats)).decode()
    assert 'persist_cache_partial_hits_total{reason="diverges"} 1.0' in text
    assert "persist_cache_tokens_asked_total 1028.0" in text


def test_look_up_that_is_not_counted_is_no_use_of_an_entry(make: Make, disk: Store) -> None:
    with make() as before:
        insert(before, STORED)
    (stored,) = disk.entries()
    cache = make()

    assert cache.look_up(MODEL, STORED, counted=False)[2].source == "disk"
    disk.flush()

    (entry,) = disk.entries()
    assert (entry.hits, entry.last_use) == (stored.hits, stored.last_use)
    assert cache.recent_fetches() == []


@pytest.mark.parametrize(
    ("found", "on_disk", "in_memory", "asked_disk", "why"),
    [
        (9, Match(0, reason=NOTHING_STORED), (9, False), True, ""),
        (5, Match(0, reason=NOTHING_STORED), (5, False), True, reasons.ENDS),
        (5, Match(0, reason=reasons.OTHER_PROMPT), (5, True), True, reasons.DIVERGES),
        (5, Match(0, reason="the disk is on fire"), (5, True), True, "the disk is on fire"),
        (5, Match(0, reason="no store was given"), (5, True), False, reasons.DIVERGES),
        (0, Match(0, reason="no store was given"), (0, False), False, "no store was given"),
        (0, Match(0, reason="no store was given"), (4, True), False, reasons.NO_CHECKPOINT),
        (5, Match(5, common_tokens=5, reason=reasons.ENDS), (3, True), True, reasons.ENDS),
        (5, Match(5, common_tokens=5, reason=reasons.ENDS), (5, True), True, reasons.DIVERGES),
        (5, Match(3, common_tokens=3, reason=reasons.DIVERGES), (5, False), True, reasons.ENDS),
        (5, Match(7, common_tokens=7, reason=reasons.ENDS), (5, False), True, reasons.FEW_MORE),
        (5, Match(5, common_tokens=8, reason=""), (5, False), True, reasons.NO_CHECKPOINT),
    ],
)
def test_one_reason_for_memory_and_disk(
    found: int, on_disk: Match, in_memory: tuple[int, bool], asked_disk: bool, why: str
) -> None:
    assert why_no_more(found, 9, on_disk, in_memory, asked_disk=asked_disk) == why


@pytest.mark.parametrize(
    "reason", [value for name, value in vars(reasons).items() if name.isupper()]
)
def test_each_reason_has_a_label_of_its_own(reason: str | tuple[str, ...]) -> None:
    if isinstance(reason, str):
        assert reason_label(reason) != OTHER_REASON


def test_header_of_a_partial_hit_tells_the_reason() -> None:
    fetch = Fetch("disk", 1904, reasons.DIVERGES)

    assert cache_header(fetch) == f'disk; tokens=1904; reason="{reasons.DIVERGES}"'
    assert cache_header(replace(fetch, reason="")) == "disk; tokens=1904"


def test_stats_shows_tokens_reused_beside_the_hits(
    tmp_path: Path, make: Make, disk: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three of 926 tokens are a hit, and no 100 %."""
    cache = make()
    insert(cache, STORED)
    look(cache, [*STORED[:3], *range(200, 1123)])
    cache.close()
    disk.close()
    run = runner(tmp_path / "store", capfd)

    said, text = run("stats", "--json").json, run("stats").out

    assert (said["tokens_reused"], said["tokens_asked"]) == (3, 926)
    assert said["partial_reasons"] == {reasons.DIVERGES: 1}
    assert "1 of 1 request " in text
    assert "3 of 926 prompt tokens (0.3%)" in text
    assert reasons.DIVERGES in text


def test_stats_of_an_older_store_gives_no_share_of_tokens(
    tmp_path: Path, disk: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    """It has counted what was saved since it was made, and never what was asked for."""
    disk.count("hits_disk", 5)
    disk.count("tokens_saved", 9000)
    disk.close()
    run = runner(tmp_path / "store", capfd)

    said, text = run("stats", "--json").json, run("stats").out

    assert (said["tokens_saved"], said["tokens_reused"], said["tokens_asked"]) == (9000, 0, 0)
    assert "5 of 5 requests" in text
    assert "not counted yet" in text
    assert "%)" not in text
