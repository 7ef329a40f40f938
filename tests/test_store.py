"""Put, match, fetch: the right bytes, for any prompt, at a cost linear in the prompt."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from persist_cache.entry import Match
from persist_cache.errors import CorruptBlobError, StoreError, StoreReadOnlyError
from persist_cache.index.transaction import Reader
from persist_cache.store.store import Store, default_store_path
from persist_cache.tokens import pack_tokens
from tests.fakes import Clock, FakeSource, blob_files, fetched, fingerprint, put, restore

IMAGES = [-(1 << 59) - 3, -1, (1 << 60) - 1, -(1 << 63)]


def test_default_path_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PERSIST_CACHE_HOME", str(tmp_path / "here"))
    assert default_store_path() == tmp_path / "here"

    monkeypatch.delenv("PERSIST_CACHE_HOME")
    assert default_store_path().name == "store"


def test_fetch_returns_the_bytes_that_were_put(store: Store) -> None:
    put(store, list(range(30)))

    assert fetched(store, [*range(30), 99]) == 30
    assert fetched(store, [*range(17), 99, 98]) == 17


def test_store_survives_its_process(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put(store, list(range(30)))
    program = (
        "import sys; from persist_cache.store.store import Store; from tests.fakes import fetched\n"
        "with Store.open(sys.argv[1], min_free_bytes=0) as s: print(fetched(s, list(range(31))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "30\n", done.stderr


def test_shared_prefix_is_written_once(store: Store) -> None:
    system = list(range(1, 41))
    put(store, system, tier="system")
    first = put_result(store, [*system, 50, 51])
    second = put_result(store, [*system, 60])

    assert (first.new_tokens, second.new_tokens) == (2, 1)
    tokens = sum(record.num_tokens for record in blob_records(store))
    assert tokens == 43


def test_putting_the_same_again_writes_nothing(store: Store) -> None:
    put(store, list(range(20)))
    files = blob_files(store.root)

    again = put_result(store, list(range(20)))

    assert (again.new_tokens, again.nbytes) == (0, 0)
    assert blob_files(store.root) == files


def test_putting_again_keeps_the_higher_tier_the_pin_and_the_label(store: Store) -> None:
    entry = put(store, [1, 2, 3], tier="system", label="mine", pinned=True, prefill_s=2.0)
    put(store, [1, 2, 3], tier="assistant")

    kept = store.get(entry)
    assert (kept.tier.label, kept.label, kept.pinned, kept.prefill_s) == ("system", "mine", True, 2)


def test_dropped_tail_comes_back_without_being_written(store: Store) -> None:
    stem = list(range(6))
    long = put(store, [*stem, 7, 8])
    put(store, stem, tier="system")
    store.evict([long])
    assert fetched(store, [*stem, 7, 8]) == 6

    again = put_result(store, [*stem, 7, 8])

    assert again.nbytes == 0
    assert fetched(store, [*stem, 7, 8]) == 8
    assert store.check(read_data=True) == []


def test_prompt_that_leaves_a_dropped_tail_midway_takes_back_what_it_shares(store: Store) -> None:
    stem = list(range(4))
    long = put(store, [*stem, 7, 8, 9])
    put(store, stem, tier="system")
    store.evict([long])

    other = put_result(store, [*stem, 7, 8, 1, 1])

    assert other.new_tokens == 2
    assert fetched(store, [*stem, 7, 8, 1, 1]) == 8
    assert store.check(read_data=True) == []


def test_other_model_or_layout_is_a_miss(store: Store) -> None:
    put(store, [1, 2, 3], model="w0")

    assert fetched(store, [1, 2, 3], model="w1") == 0
    store.put(fingerprint(), [9, 9], FakeSource([9, 9], layout='{"other":1}'))
    assert fetched(store, [1, 2, 3]) == 3
    assert fetched(store, [9, 9]) == 2


def test_state_is_resumed_only_where_it_was_stored(store: Store) -> None:
    put(store, list(range(10)), complete=False)

    assert fetched(store, [*range(10), 5]) == 10
    short = store.match(fingerprint(), list(range(9)))
    assert (short.num_tokens, short.common_tokens) == (0, 9)
    assert "no checkpoint" in short.reason


def test_shorter_checkpoint_serves_a_limit(store: Store) -> None:
    put(store, list(range(6)), complete=False)
    put(store, list(range(10)), complete=False)

    assert store.match(fingerprint(), list(range(10)), limit=9).num_tokens == 6


def test_state_is_added_where_only_rows_of_another_entry_were(store: Store) -> None:
    put(store, list(range(10)), complete=False)
    put(store, list(range(7)), complete=False)

    assert fetched(store, [*range(7), 99]) == 7
    assert store.check(read_data=True) == []


def test_complete_rows_behind_incomplete_ones_need_a_state(store: Store) -> None:
    put(store, list(range(10)), complete=False)
    put(store, list(range(14)), complete=True)

    assert fetched(store, list(range(14))) == 14
    assert fetched(store, list(range(13))) == 10
    assert store.check(read_data=True) == []


def test_source_without_rows_or_state_is_refused(store: Store) -> None:
    source = FakeSource([1, 2], complete=False)
    source.checkpoint = lambda: None  # type: ignore[method-assign]

    with pytest.raises(StoreError, match="neither"):
        store.put(fingerprint(), [1, 2], source)
    assert store.check() == []


@pytest.mark.parametrize("limit", [-1, 0])
def test_limit_of_nothing_is_a_miss(store: Store, limit: int) -> None:
    put(store, [1, 2, 3])

    assert store.match(fingerprint(), [1, 2, 3], limit=limit).num_tokens == 0


def test_empty_prompt_is_neither_stored_nor_found(store: Store) -> None:
    assert store.put(fingerprint(), [], FakeSource([])).entry is None
    assert store.match(fingerprint(), []).num_tokens == 0
    assert store.entries() == []


def test_one_token_prompt(store: Store) -> None:
    put(store, [7])
    put(store, [8], complete=False)

    assert fetched(store, [7]) == 1
    assert fetched(store, [8, 9]) == 1


def test_image_ids_keep_all_of_their_bits(store: Store) -> None:
    prompt = [1, *IMAGES, 2]
    put(store, prompt)

    assert fetched(store, prompt) == 6
    assert store.match(fingerprint(), [1, IMAGES[0] + 1]).num_tokens == 1


def test_ids_beyond_64_bits_and_torn_tokens_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        store.match(fingerprint(), [1 << 63])
    with pytest.raises(ValueError, match="8 bytes"):
        store.match(fingerprint(), pack_tokens([1, 2])[:-1])


def test_hundred_thousand_tokens(tmp_path: Path) -> None:
    prompt = [i * i % 50_021 for i in range(100_000)]
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put(store, prompt)

        assert fetched(store, prompt) == 100_000
        assert fetched(store, [*prompt[:70_000], -5]) == 70_000
        assert store.check(read_data=True) == []


def test_look_up_reads_no_more_than_the_prompt(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: with 250 entries under one prefix nothing else is looked at.

    mlx-lm 0.32.2: a look-up of 30,000 tokens blocks the server for 1.5 s.
    """
    system = list(range(1, 33))
    for n in range(250):
        store.put(
            fingerprint(),
            [*system, 100 + n % 10, 1000 + n],
            FakeSource([*system, 100 + n % 10, 1000 + n]),
        )
    assert len(store.entries()) == 250
    reads = count_reads(monkeypatch)

    match = store.match(fingerprint(), [*system, 105, 1005, 3])

    assert match.num_tokens == 34
    assert reads["tokens"] <= 35
    assert reads["edges"] <= 12
    assert reads["blobs"] <= len(match.runs) + 2
    reads.clear()
    assert store.match(fingerprint(), [*system[:20], 9]).num_tokens == 20
    assert reads["tokens"] <= 32
    assert store.check() == []


def test_match_names_runs_that_cover_it(store: Store) -> None:
    put(store, list(range(20)))
    put(store, [*range(11), 50, 51])

    match = store.match(fingerprint(), [*range(11), 50, 7])

    position = 0
    for run in match.runs:
        assert run.start == position
        position += run.num_tokens
    assert position == match.num_tokens == 12


def test_flipped_bit_is_a_miss_once_and_is_stored_anew(store: Store) -> None:
    """ds4 #251, vLLM #49328: a poisoned entry retried for ever."""
    put(store, list(range(20)))
    path = blob_files(store.root)[1]
    flip(path, path.stat().st_size - 9)

    assert fetched(store, list(range(20))) == 0
    assert not path.exists()
    assert (store.root / "quarantine" / path.name).exists()
    assert store.stats().counters["quarantined"] == 1

    put(store, list(range(20)))
    assert fetched(store, list(range(20))) == 20
    assert store.stats().counters["bad_reads"] == 1
    assert store.check(read_data=True) == []


def test_missing_blob_is_a_miss_once(store: Store) -> None:
    put(store, list(range(20)))
    blob_files(store.root)[0].unlink()

    assert fetched(store, list(range(20))) == 0
    assert store.entries() == []
    assert store.check() == []


def test_unreadable_sector_is_used_at_most_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, list(range(20)))
    attempts = []

    def fail(*arguments: object) -> int:
        attempts.append(arguments)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("persist_cache.fs.read_into", fail)
        assert store.fetch(fingerprint(), list(range(20)), restore) is None
    assert len(attempts) == 1
    assert store.entries() == []


def test_codec_may_call_a_blob_corrupt(store: Store) -> None:
    put(store, [1, 2, 3])

    def refuse(runs: object, checkpoint: object, num_tokens: int) -> object:
        raise CorruptBlobError(blob_files(store.root)[0], "wrong shape")

    assert store.fetch(fingerprint(), [1, 2, 3], refuse) is None
    assert store.entries() == []


def test_entry_evicted_while_it_is_looked_up_is_looked_up_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, list(range(8)))
    longest = put(store, list(range(16)))
    match = store.match
    evicted: list[int] = []

    def evict_behind_its_back(*arguments: Any, **options: Any) -> Match:
        found = match(*arguments, **options)
        if not evicted:
            evicted.append(store.evict([longest]))
        return found

    monkeypatch.setattr(store, "match", evict_behind_its_back)

    assert fetched(store, list(range(16))) == 8
    assert store.stats().counters.get("bad_reads", 0) == 0


def test_min_tokens_makes_a_short_prefix_a_miss(store: Store) -> None:
    put(store, [1, 2, 3])

    assert store.fetch(fingerprint(), [1, 2, 3, 4], restore, min_tokens=4) is None


def test_path_of_more_runs_than_open_files_is_read(store: Store) -> None:
    prompt = list(range(8 * 230))
    for end in (8 * 100, 8 * 200, 8 * 230):
        put(store, prompt[:end])

    assert len(store.match(fingerprint(), prompt).runs) == 230
    assert fetched(store, prompt) == len(prompt)


def test_use_is_remembered_and_credited(tmp_path: Path, clock: Clock) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0, clock=clock) as store:
        entry = put(store, [1, 2, 3], prefill_s=6.0)
        clock.advance(100)
        store.touch(store.match(fingerprint(), [1, 2, 3]))
        assert store.get(entry).hits == 0, "uses are buffered"
        now = clock.now
    with Store.open(tmp_path / "store", min_free_bytes=0, clock=clock) as store:
        used = store.get(entry)
        assert (used.hits, used.last_use, used.saved_s) == (1, now, 6.0)


def test_hit_at_a_fork_without_entry_counts_as_a_use_below_it(store: Store, clock: Clock) -> None:
    put(store, [1, 2, 3, 4])
    put(store, [1, 2, 8, 9])

    match = store.match(fingerprint(), [1, 2, 77])

    assert match.num_tokens == 2
    assert len(match.entries) == 1


def test_store_takes_whole_ids_only(store: Store) -> None:
    entry = put(store, [1, 2, 3])

    for bad in ("", "x", entry[:5], entry.upper() + "0", entry + "0", "0" * 16, "x" * 16):
        for use in (
            store.get,
            store.pin,
            lambda one: store.set_label(one, "short"),
            lambda one: store.expire_at(one, 1e9),
            lambda one: store.evict([entry, one]),
        ):
            with pytest.raises(KeyError):
                use(bad)
    kept = store.get(entry)
    assert (kept.pinned, kept.label, kept.expires) == (False, "", None)


def test_entries_that_went_meanwhile_may_be_passed_over(store: Store) -> None:
    entry, other = put(store, [1, 2, 3]), put(store, [7, 8])

    assert store.evict([entry, "0123456789abcdef"], missing_ok=True) > 0
    assert [one.id for one in store.entries()] == [other]


def test_evicting_an_unknown_id_removes_nothing(store: Store) -> None:
    entry = put(store, [1, 2, 3])

    with pytest.raises(KeyError):
        store.evict([entry, "0123456789abcdef"])
    assert len(store.entries()) == 1


def test_evicting_a_reply_leaves_its_system_prompt(store: Store) -> None:
    system = list(range(12))
    put(store, system, tier="system")
    reply = put(store, [*system, 50, 51, 52])

    store.evict([reply])

    assert fetched(store, [*system, 50]) == 12
    assert store.check(read_data=True) == []


def test_evicting_everything_leaves_no_blob(store: Store) -> None:
    for n in range(10):
        put(store, [1, 2, 3, n, n], complete=bool(n % 2))

    store.evict([entry.id for entry in store.entries()])

    assert blob_files(store.root) == []
    assert store.check() == []


@pytest.mark.parametrize("when", [0.0, -5.0, float("inf"), float("nan")])
def test_expiry_has_to_be_a_date(store: Store, when: float) -> None:
    entry = put(store, [1, 2, 3])

    with pytest.raises(ValueError, match="date"):
        store.expire_at(entry, when)


def test_stats_show_what_was_counted_and_nothing_internal(store: Store) -> None:
    put(store, [1, 2, 3], expires=2e9)
    store.count("hits_disk", 2)

    stats = store.stats()

    assert stats.counters == {"hits_disk": 2, "puts": 1}
    assert stats.written_bytes == stats.written_today > 0
    assert (stats.entries, stats.blobs) == (1, 1)


def test_read_only_store_serves_and_changes_nothing(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put(store, list(range(20)))
    before = snapshot(tmp_path / "store")

    with Store.open(tmp_path / "store", read_only=True) as store:
        assert fetched(store, list(range(20))) == 20
        store.touch(store.match(fingerprint(), list(range(20))))
        store.count("hits")
        store.flush()
        for change in (
            lambda: put(store, [1]),
            lambda: store.evict([store.entries()[0].id]),
            lambda: store.pin(store.entries()[0].id),
        ):
            with pytest.raises(StoreReadOnlyError):
                change()

    assert snapshot(tmp_path / "store") == before


def test_closed_store_says_so(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", min_free_bytes=0)
    store.close()
    store.close()

    with pytest.raises(StoreError, match="closed"):
        store.entries()
    with pytest.raises(StoreError, match="closed"):
        put(store, [1])


def test_listing_is_one_pass(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = list(range(200))
    for end in range(10, 200, 10):
        put(store, chain[:end])
    reads = count_reads(monkeypatch)

    entries = store.entries()

    assert sum(entry.parent is not None for entry in entries) == len(entries) - 1
    assert reads["edges"] == reads["tokens"] == 0, "no look-ups by key"


def test_sizes_add_up(store: Store) -> None:
    system = list(range(16))
    put(store, system, tier="system")
    first = put(store, [*system, 1])
    second = put(store, [*system, 2, 3], complete=False)

    total = store.stats().usage.blobs
    own = sum(entry.own_bytes for entry in store.entries())
    assert store.get(first).shared_bytes == store.get(second).shared_bytes
    assert own + store.get(first).shared_bytes == total


def put_result(store: Store, tokens: list[int]):  # type: ignore[no-untyped-def]
    return store.put(fingerprint(), tokens, FakeSource(tokens))


def blob_records(store: Store):  # type: ignore[no-untyped-def]
    with store.read() as txn:
        return [record for _, record in txn.blobs()]


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def snapshot(root: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "lock.mdb"
    }


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what a transaction reads: edges, tokens, blob records."""
    reads: Counter[str] = Counter()
    edge, tokens, blob = Reader.edge, Reader.tokens, Reader.blob

    def count_edge(self: Reader, key: bytes):  # type: ignore[no-untyped-def]
        reads["edges"] += 1
        return edge(self, key)

    def count_tokens(self: Reader, number: int, first_row: int, rows: int) -> bytes:
        reads["tokens"] += rows
        return tokens(self, number, first_row, rows)

    def count_blob(self: Reader, number: int):  # type: ignore[no-untyped-def]
        reads["blobs"] += 1
        return blob(self, number)

    monkeypatch.setattr(Reader, "edge", count_edge)
    monkeypatch.setattr(Reader, "tokens", count_tokens)
    monkeypatch.setattr(Reader, "blob", count_blob)
    return reads


def test_one_put_keeps_few_files_open(store: Store) -> None:
    put(store, list(range(8 * 230)))

    assert len(blob_files(store.root)) <= 100
