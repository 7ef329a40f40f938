"""What is published by itself, at which hit, and within which bytes; and what is remembered."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from persist_cache.entry import PARTIAL_LABEL
from persist_cache.remote import (
    PublishOutcome,
    Remote,
    RemoteError,
    Why,
    checked_url,
    make_secret,
    publishing,
    read_settings,
    write_settings,
)
from persist_cache.remote.keys import places_to_ask, rungs
from persist_cache.remote.trust import open_trust
from persist_cache.store.store import Store
from tests.fakes import Clock, fingerprint
from tests.remotes import LONG, bring, folder_settings, machine, objects, opened, put_real
from tests.waiting import until

OTHERS = [[number, *LONG[:300]] for number in range(2000, 2006)]


@pytest.fixture
def remote(store: Store, tmp_path: Path) -> Iterator[Remote]:
    with opened(store, folder_settings(tmp_path)) as one:
        yield one


def published(remote: Remote) -> int:
    return remote.status().counters.get("published", 0)


def hit(remote: Remote, entry: str, times: int = 1) -> None:
    """Tell of hits."""
    for _ in range(times):
        remote.note_hit(entry)


def test_a_system_part_is_published_at_its_second_hit(
    store: Store, remote: Remote, tmp_path: Path
) -> None:
    entry = put_real(store, LONG, tier="system")
    sentinel = put_real(store, OTHERS[0], tier="system")

    hit(remote, entry)
    hit(remote, sentinel, 2)
    until(lambda: published(remote) == 1)
    with machine(tmp_path, "second", remote.settings) as (_, its_remote):
        before = bring(its_remote, LONG).why
        hit(remote, entry)
        until(lambda: published(remote) == 2)
        after = bring(its_remote, LONG).why

    assert (before, after) == (Why.NOT_FOUND, Why.BROUGHT)


def test_what_a_lifecycle_rule_removed_is_published_and_found_again(
    store: Store, tmp_path: Path
) -> None:
    now = [0.0]
    settings = folder_settings(tmp_path)
    entry = put_real(store, LONG, tier="system")
    with (
        opened(store, settings, clock=lambda: now[0]) as remote,
        Store.open(tmp_path / "second", min_free_bytes=0) as other,
        opened(other, settings, clock=lambda: now[0]) as reader,
    ):
        hit(remote, entry, 2)
        until(lambda: published(remote) == 1)
        for name in objects(tmp_path):
            if name.startswith("pc1/b/"):
                (tmp_path / "bucket" / name).unlink()
        gone = bring(reader, LONG).why
        shutil.rmtree(tmp_path / "bucket" / "pc1")

        now[0] += 86_400
        hit(remote, entry)
        until(lambda: published(remote) == 2)
        again = bring(reader, LONG).why

    assert (gone, again) == (Why.GONE, Why.BROUGHT)


def test_hits_of_earlier_processes_count(store: Store, remote: Remote) -> None:
    entry = put_real(store, LONG, tier="system")
    for _ in range(2):
        store.touch(store.match(fingerprint(), LONG))
    store.flush()

    hit(remote, entry)

    until(lambda: published(remote) == 1)


def test_only_chosen_tiers_and_pinned_entries_are_published(
    store: Store, remote: Remote, tmp_path: Path
) -> None:
    wanted = [
        put_real(store, OTHERS[0], tier="system"),
        put_real(store, OTHERS[1], pinned=True),
    ]
    unwanted = [
        put_real(store, OTHERS[2], tier="user"),
        put_real(store, OTHERS[3]),
        put_real(store, LONG[:255], tier="system"),  # too short
        put_real(store, OTHERS[4], tier="system", label=PARTIAL_LABEL),
        "0123456789abcdef",  # not there
    ]

    for entry in [*unwanted, *wanted]:
        hit(remote, entry, 3)
    until(lambda: published(remote) == 2)

    assert until(lambda: remote.status().queued == 0)
    ends = [name for name in objects(tmp_path) if name.startswith("pc1/c/")]
    assert len(ends) == len(wanted)


def test_a_remote_that_is_only_read_publishes_nothing(store: Store, tmp_path: Path) -> None:
    entry = put_real(store, LONG, tier="system")

    with opened(store, folder_settings(tmp_path, publish_plain=False)) as remote:
        hit(remote, entry, 5)

        assert remote.status().queued == 0
        assert "--publish-plain" in remote.why_not_publish
    assert objects(tmp_path) == {}


def test_the_bytes_of_a_day_are_not_exceeded(store: Store, clock: Clock, tmp_path: Path) -> None:
    with opened(store, folder_settings(tmp_path)) as free:
        needed = free.publish(put_real(store, OTHERS[0])).nbytes
    limited = folder_settings(tmp_path, budget_bytes_per_day=needed * 3 // 2)
    with opened(store, limited) as remote:
        first = remote.publish(put_real(store, OTHERS[1]))
        before = objects(tmp_path)
        with pytest.raises(RemoteError, match="Today's budget"):
            remote.publish(put_real(store, OTHERS[2]))
        grown = sum(map(len, objects(tmp_path).values())) - sum(map(len, before.values()))
        clock.advance(86_400)
        tomorrow = remote.publish(put_real(store, OTHERS[3]))

    assert first.outcome == tomorrow.outcome == PublishOutcome.SENT
    assert grown < needed // 2


def test_claims_and_manifests_are_among_the_bytes_of_a_day(store: Store, tmp_path: Path) -> None:
    entry = put_real(store, LONG)
    with opened(store, folder_settings(tmp_path)) as free:
        needed = free.publish(entry).nbytes
    all_bytes = sum(map(len, objects(tmp_path).values()))
    shutil.rmtree(tmp_path / "bucket")

    limited = folder_settings(tmp_path, budget_bytes_per_day=needed - 1)
    with opened(store, limited) as remote, pytest.raises(RemoteError, match="Today's budget"):
        remote.publish(entry)

    assert needed == all_bytes
    assert 0 < sum(map(len, objects(tmp_path).values())) < needed


def test_a_claim_of_another_process_is_respected_until_it_is_old(
    store: Store, tmp_path: Path
) -> None:
    settings = folder_settings(tmp_path)
    entry = put_real(store, LONG)
    now = [0.0]
    with opened(store, settings) as remote:
        remote.publish(entry)
    for name in objects(tmp_path):
        if not name.startswith("pc1/c/"):
            (tmp_path / "bucket" / name).unlink()  # as if its publisher had died

    outcomes = []
    with opened(store, settings, clock=lambda: now[0]) as remote:
        for now[0] in (0.0, publishing.CLAIM_S - 1, publishing.CLAIM_S):
            outcomes.append(remote.publish(entry).outcome)

    assert outcomes == [PublishOutcome.CLAIMED, PublishOutcome.CLAIMED, PublishOutcome.SENT]


def test_a_claim_grows_old_though_no_process_lives_that_long(
    store: Store, clock: Clock, tmp_path: Path
) -> None:
    """Such as that of a command that was killed, found by commands."""
    settings = folder_settings(tmp_path)
    entry = put_real(store, LONG)
    with opened(store, settings) as remote:
        remote.publish(entry)
    for name in objects(tmp_path):
        if not name.startswith("pc1/c/"):
            (tmp_path / "bucket" / name).unlink()

    outcomes = []
    for seconds in (0, publishing.CLAIM_S - 1, 1):
        clock.advance(seconds)
        with opened(store, settings) as remote:
            outcomes.append(remote.publish(entry).outcome)

    assert outcomes == [PublishOutcome.CLAIMED, PublishOutcome.CLAIMED, PublishOutcome.SENT]


def test_what_failed_is_published_by_the_next_process_at_once(store: Store, tmp_path: Path) -> None:
    settings = folder_settings(tmp_path)
    entry = put_real(store, LONG)
    limited = msgspec.structs.replace(settings, budget_bytes_per_day=1000)

    with opened(store, limited) as remote, pytest.raises(RemoteError, match="Today's budget"):
        remote.publish(entry)
    with opened(store, settings) as remote:
        done = remote.publish(entry)

    assert done.outcome == PublishOutcome.SENT


# ---- settings -----------------------------------------------------------------------------------


def test_settings_are_remembered_without_credentials(store: Store, tmp_path: Path) -> None:
    settings = folder_settings(tmp_path, options={"region": "eu-central-1"})

    write_settings(store, settings)

    assert read_settings(store) == settings
    assert store.check() == []
    store.rebuild_index()
    assert read_settings(store) == settings
    write_settings(store, None)
    assert read_settings(store) is None


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://key:secret@bucket/prefix", "AWS_ACCESS_KEY_ID"),
        ("s3://key@bucket", "environment"),
        ("https://user:pw@host/x", "environment"),
        ("s3://bucket?X-Amz-Signature=1", "query"),
        ("http://example.org/mirror", "https"),
        ("ftp://example.org", "no remote"),
        ("s3://", "no bucket"),
        ("file:///", "no folder"),
        ("/", "no folder"),
        ("file://host/path", "folder"),
        ("s3://bucket/../other", r"\.\."),
        ("s3://bucket/%2e%2E/other", r"has \.\. in its prefix"),
        ("", "folder"),
        ("https://[bad/", "not a URL"),
    ],
)
def test_a_url_that_cannot_be_used_is_told_and_shows_no_password(url: str, said: str) -> None:
    with pytest.raises(RemoteError, match=said) as caught:
        checked_url(url)

    assert "secret" not in str(caught.value)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("gs://bucket", "gs://bucket"),
        ("/some/folder/", "file:///some/folder"),
        ("file:///some/folder", "file:///some/folder"),
        ("http://127.0.0.1:9000/mirror", "http://127.0.0.1:9000/mirror"),
        ("https://example.org/a/b/", "https://example.org/a/b"),
    ],
)
def test_a_url_has_one_spelling(url: str, canonical: str) -> None:
    assert checked_url(url) == canonical == checked_url(canonical)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"secret_access_key": "x"}}, "environment"),
        ({"trust": "publisher"}, "public key"),
        ({"publish_after": 0}, "publish_after"),
        ({"tiers": ("root",)}, "tiers"),
        ({"public_key": "xyz"}, "public_key"),
        ({"budget_bytes_per_day": -1}, "budget"),
        ({"url": "https://example.org/mirror"}, "only read"),
    ],
)
def test_settings_that_cannot_be_used_are_told(
    store: Store, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RemoteError, match=said):
        write_settings(store, folder_settings(tmp_path, **changes))

    assert read_settings(store) is None


def test_settings_of_a_later_version_are_told(store: Store) -> None:
    store.remember("remote.settings", b'{"url":"s3://b","new":1}')

    with pytest.raises(RemoteError, match="remote add"):
        read_settings(store)


# ---- secrets ------------------------------------------------------------------------------------


def test_a_secret_is_made_for_its_owner_alone_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "remote.secret"

    secret = make_secret(path)

    assert path.read_text().strip() == secret
    assert len(secret) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(RemoteError, match="there already"):
        make_secret(path)
    assert path.read_text().strip() == secret


def test_a_secret_may_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    path.write_text("sixteen bytes and more\n")
    from_file = open_trust("secret", str(path), "")[0].blob_name(bytes(32))
    monkeypatch.setenv("PERSIST_CACHE_REMOTE_SECRET_FILE", str(path))
    from_named_file = open_trust("secret", "", "")[0].blob_name(bytes(32))
    monkeypatch.delenv("PERSIST_CACHE_REMOTE_SECRET_FILE")
    monkeypatch.setenv("PERSIST_CACHE_REMOTE_SECRET", "sixteen bytes and more")
    from_variable = open_trust("secret", "", "")[0].blob_name(bytes(32))

    assert from_file == from_named_file == from_variable


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        (None, "cannot be read"),
        (b"short", "at least 16"),
        (b"", "at least 16"),
        (b"x" * 5000, "4096"),
    ],
)
def test_a_secret_that_is_none_is_told(
    tmp_path: Path, store: Store, secret: bytes | None, said: str
) -> None:
    path = tmp_path / "secret"
    if secret is not None:
        path.write_bytes(secret)

    with pytest.raises(RemoteError, match=said):
        Remote.open(store, folder_settings(tmp_path, secret_file=str(path)))


def test_no_secret_at_all_is_told(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [one for one in os.environ if one.startswith("PERSIST_CACHE_REMOTE")]:
        monkeypatch.delenv(name)

    with pytest.raises(RemoteError, match="--remote-secret-file"):
        Remote.open(store, msgspec.structs.replace(folder_settings(tmp_path), secret_file=""))


# ---- lengths ------------------------------------------------------------------------------------


def test_all_machines_agree_on_the_lengths() -> None:
    assert rungs(5000) == [256, 362, 512, 724, 1024, 1448, 2048, 2896, 4096]
    assert rungs(255) == []


@pytest.mark.parametrize("known", range(0, 3000, 97))
@pytest.mark.parametrize("shared", [256, 700, 1500, 3000])
def test_an_entry_that_shares_256_tokens_more_is_asked_for(known: int, shared: int) -> None:
    """Its anchors are at all lengths that it has, of which the prompt has those up to `shared`."""
    asked = {place.num_tokens for place in places_to_ask(known, 3000, [])}

    if shared - known >= 256:
        assert asked & set(rungs(shared))
    assert not asked or 3000 - known >= 256
