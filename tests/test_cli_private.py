"""The commands that erase, and the rules that `serve` takes: in sentences, with an exit status."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import click
import pytest

from persist_cache import Store
from persist_cache.fingerprint.value import salt_digest
from persist_cache_cli.parse import parse_duration, parse_rules, parse_size
from tests.cli import Run, fill, runner
from tests.fakes import put
from tests.searched import in_folder, patterns
from tests.waiting import until


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def run(root: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(root, capfd)


def tokens_of(root: Path, id: str) -> list[int]:
    from persist_cache.queries.details import tokens_of as read

    with Store.open(root, min_free_bytes=0) as store:
        return read(store, id)


def test_evict_erase_leaves_nothing_and_says_what_it_cannot_erase(root: Path, run: Run) -> None:
    ids = fill(root)
    id = ids["reply"] if "reply" in ids else list(ids.values())[-1]
    last = tokens_of(root, id)[-4:]
    assert in_folder(root, patterns([], [last])) != []

    done = run("evict", id, "--erase", "--yes")

    assert done.status == 0
    assert "snapshots" in done.out
    assert "SSD" in done.out
    assert in_folder(root, patterns([], [last])) == []


def test_evict_erase_tells_of_no_rows_that_stay_in_files_of_others(root: Path, run: Run) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        gone = put(store, list(range(1_000)))
        put(store, list(range(600)))

    assert "rewrites a file" in run("evict", gone, "--dry-run").out
    done = run("evict", gone, "--erase", "--yes")

    assert done.status == 0
    assert "rewrites a file" not in done.out


def test_gc_erase_overwrites_what_has_expired(root: Path, run: Run) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        expires = store.clock() + 0.2
        store.expire_at(put(store, [1, 2, 3]), expires)
    held = [os.open(one, os.O_RDONLY) for one in root.glob("blobs/*/*")]
    until(lambda: time.time() > expires, "it did not expire")

    run("gc", "--erase")

    try:
        assert [os.fstat(fd).st_nlink for fd in held] == [0]
        assert not any(os.pread(held[0], os.fstat(held[0]).st_size, 0))
    finally:
        os.close(held[0])


def test_gc_erase_without_a_store_changes_nothing(root: Path, run: Run) -> None:
    assert run("gc", "--erase").status == 0
    assert not root.exists()


def test_an_erasure_that_lacks_room_is_a_sentence_and_an_exit_status(root: Path, run: Run) -> None:
    ids = fill(root)
    with Store.open(root, min_free_bytes=0) as store:
        total = store.stats().usage.total
    with Store.open(root, min_free_bytes=0, max_bytes=total):
        pass
    with Store.open(root, min_free_bytes=0, max_bytes=1):
        pass

    done = run("evict", list(ids.values())[-1], "--erase", "--yes")

    assert done.status != 0
    assert "Not everything was erased" in done.err
    assert "Traceback" not in done.err
    assert "gc --erase" in done.err


def test_stats_tell_quotas_and_json_has_them(root: Path, run: Run) -> None:
    fill(root)
    with Store.open(root, min_free_bytes=0, quotas={"model": 1 << 40}, ttl={"user": 86400}):
        pass

    said = json.loads(run("stats", "--json").out)

    assert {one["kind"] for one in said["quotas"]} == {"model"}
    assert not any(one["near"] for one in said["quotas"])
    assert said["ttl_s"] == {"user": 86400}
    assert "quota" in run("stats").out


@pytest.mark.parametrize(
    ("given", "tiers", "rules"),
    [
        ((), False, None),
        (("none",), False, {}),
        (("model=4GB",), False, {"model": 4 * 10**9}),
        (("model:org/a=b=1MB",), False, {"model:org/a=b": 10**6}),
        (("salt=1MB", "salt:alice=2MB"), False, None),
        (("assistant=7d", "salt=1h"), True, {"assistant": 7 * 86400, "salt": 3600}),
    ],
)
def test_rules_are_read(given: tuple[str, ...], tiers: bool, rules: dict[str, int] | None) -> None:
    if "salt:alice=2MB" in given:
        rules = {"salt": 10**6, f"salt:{salt_digest('alice')}": 2 * 10**6}

    parse = parse_duration if tiers else parse_size

    assert parse_rules(given, "--quota", parse, tiers=tiers) == rules


@pytest.mark.parametrize(
    "given",
    [
        ("4GB",),
        ("=4GB",),
        ("model",),
        ("model=",),
        ("model=many",),
        ("model=0",),
        ("model:=1GB",),
        ("salt:=1GB",),
        ("assistant=1GB",),
        ("model=1GB", "model=2GB"),
        ("none", "model=1GB"),
    ],
)
def test_what_is_no_rule_is_one_sentence(given: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError, match=r"^--quota: "):
        parse_rules(given, "--quota", parse_size, tiers=False)
