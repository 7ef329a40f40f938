"""A remote in a folder: what one machine publishes the others have, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from persist_cache.remote import PublishOutcome, Remote, RemoteError, Why, checked_url
from persist_cache.store.store import Store
from tests.fakes import Clock, FakeSource, fetched, fingerprint
from tests.remotes import LONG, bring, folder_settings, machine, objects, opened, put_real


@pytest.fixture
def remote(store: Store, tmp_path: Path) -> Iterator[Remote]:
    """The first machine's."""
    with opened(store, folder_settings(tmp_path)) as one:
        yield one


@pytest.fixture
def second(remote: Remote, tmp_path: Path) -> Iterator[tuple[Store, Remote]]:
    with machine(tmp_path, "second", remote.settings) as made:
        yield made


def test_what_one_machine_publishes_another_has_bit_for_bit(
    store: Store, remote: Remote, second: tuple[Store, Remote]
) -> None:
    other, its_remote = second
    done = remote.publish(put_real(store, LONG, tier="system"))

    brought = bring(its_remote, LONG)

    assert done.outcome == PublishOutcome.SENT
    assert (brought.why, brought.num_tokens) == (Why.BROUGHT, len(LONG))
    assert fetched(other, LONG) == len(LONG)
    assert [one.tier.label for one in other.entries()] == ["system"]
    assert other.check(read_data=True) == []


def test_prompts_that_share_700_tokens_find_700(
    store: Store, remote: Remote, second: tuple[Store, Remote]
) -> None:
    other, its_remote = second
    remote.publish(put_real(store, LONG))
    prompt = [*LONG[:700], *range(5000, 5400)]

    brought = bring(its_remote, prompt, limit=len(prompt) - 1)

    assert brought.num_tokens == 700
    assert fetched(other, prompt) == 700


@pytest.mark.parametrize(("timed_s", "saved"), [(0.0, False), (1000.0, True)])
def test_time_is_saved_only_where_it_was_measured(
    store: Store, remote: Remote, second: tuple[Store, Remote], timed_s: float, saved: bool
) -> None:
    """Of what nobody timed it is not said that it cost more than it gave."""
    _, its_remote = second
    remote.publish(put_real(store, LONG))

    assert bring(its_remote, LONG, prefill_s=lambda num_tokens: timed_s).is_hit

    assert (its_remote.status().counters.get("saved_ms", 0) > 0) is saved
    assert its_remote.status().counters.get("saved_ms", 0) >= 0


def test_an_entry_with_a_state_is_found_whole_or_not_at_all(
    store: Store, remote: Remote, second: tuple[Store, Remote]
) -> None:
    other, its_remote = second
    remote.publish(put_real(store, LONG, complete=False))

    parted = bring(its_remote, [*LONG[:1000], *range(5000, 5400)])
    whole = bring(its_remote, [*LONG, 1, 2, 3])

    assert (parted.why, parted.num_tokens) == (Why.NOT_FOUND, 0)
    assert whole.num_tokens == len(LONG)
    assert fetched(other, [*LONG, 1, 2, 3]) == len(LONG)


def test_a_state_is_found_by_its_exact_end(
    store: Store, remote: Remote, second: tuple[Store, Remote]
) -> None:
    _, its_remote = second
    # The anchors of the shared beginning are those of the entry that came first.
    remote.publish(put_real(store, [*LONG[:300], *range(3000, 3300)], complete=False))
    remote.publish(put_real(store, LONG[:340], complete=False))

    without = bring(its_remote, LONG)
    brought = bring(its_remote, LONG, ends=[340])

    assert without.num_tokens == 0
    assert brought.num_tokens == 340


def test_an_entry_is_published_once(store: Store, remote: Remote, tmp_path: Path) -> None:
    entry = put_real(store, LONG)
    remote.publish(entry)
    before = objects(tmp_path)

    again = remote.publish(entry)

    assert (again.outcome, again.nbytes, again.blobs) == (PublishOutcome.THERE_ALREADY, 0, 0)
    assert objects(tmp_path) == before


def test_a_beginning_that_was_published_is_not_sent_again(
    store: Store, remote: Remote, tmp_path: Path
) -> None:
    remote.publish(put_real(store, LONG[:600]))
    before = {name for name in objects(tmp_path) if name.startswith("pc1/b/")}

    done = remote.publish(put_real(store, LONG))

    after = {name for name in objects(tmp_path) if name.startswith("pc1/b/")}
    assert before < after
    assert len(after - before) == done.blobs == 2  # 600 to 1024, and 1024 to the end


@pytest.mark.parametrize("known", [0, 300, 699, 1100])
def test_only_what_the_store_lacks_is_pulled(
    store: Store, remote: Remote, second: tuple[Store, Remote], known: int
) -> None:
    other, its_remote = second
    remote.publish(put_real(store, LONG))
    if known:
        put_real(other, LONG[:known])

    brought = bring(its_remote, LONG, known=known)

    if len(LONG) - known < 256:
        assert (brought.why, brought.nbytes) == (Why.ENOUGH_KNOWN, 0)
    else:
        assert brought.num_tokens == fetched(other, LONG) == len(LONG)


def test_a_salted_model_is_neither_published_nor_looked_up(
    store: Store, remote: Remote, tmp_path: Path
) -> None:
    salted = fingerprint().salted("5a17")
    done = store.put(salted, LONG, FakeSource(LONG, real=True))
    assert done.entry is not None

    with pytest.raises(RemoteError, match="salt"):
        remote.publish(done.entry)
    brought = remote.bring(salted, LONG, known=0, limit=len(LONG))

    assert brought.why == Why.NOT_ALLOWED
    assert objects(tmp_path) == {}


def test_nothing_is_published_before_the_user_agreed(store: Store, tmp_path: Path) -> None:
    entry = put_real(store, LONG)

    with (
        opened(store, folder_settings(tmp_path, publish_plain=False)) as remote,
        pytest.raises(RemoteError, match="--publish-plain"),
    ):
        remote.publish(entry)

    assert objects(tmp_path) == {}


@pytest.mark.parametrize("where", [".", "blobs", ".."])
def test_a_remote_within_the_store_or_around_it_is_refused(
    store: Store, tmp_path: Path, where: str
) -> None:
    url = checked_url(str((store.root / where).resolve()))

    with pytest.raises(RemoteError, match="one lies within the other"):
        Remote.open(store, folder_settings(tmp_path, url=url))


def test_a_folder_that_is_not_there_is_not_made(store: Store, tmp_path: Path) -> None:
    """It may be on a disk that is not mounted."""
    settings = folder_settings(tmp_path)
    (tmp_path / "bucket").rmdir()

    with pytest.raises(RemoteError, match="mount it, or make it"):
        Remote.open(store, settings)


@pytest.mark.parametrize("is_made_again", [False, True])
def test_nothing_is_published_where_the_folder_was(
    store: Store, remote: Remote, tmp_path: Path, is_made_again: bool
) -> None:
    """As when a disk is unmounted: the folder below is on another one."""
    entry = put_real(store, LONG)
    (tmp_path / "bucket").rename(tmp_path / "away")
    if is_made_again:
        (tmp_path / "bucket").mkdir()

    with pytest.raises(RemoteError, match="no longer mounted"):
        remote.publish(entry)
    assert "no longer mounted" in remote.probe().message

    assert (tmp_path / "bucket").exists() == is_made_again
    assert objects(tmp_path) == {}


@pytest.mark.parametrize("inside", ["", "blobs", "new"])
def test_a_folder_in_the_store_is_no_remote(store: Store, tmp_path: Path, inside: str) -> None:
    folder = store.root / inside
    folder.mkdir(exist_ok=True)
    settings = msgspec.structs.replace(folder_settings(tmp_path), url=checked_url(str(folder)))

    with pytest.raises(RemoteError, match="one lies within the other"):
        Remote.open(store, settings)


def test_what_would_expire_at_once_is_not_pulled(
    store: Store, remote: Remote, second: tuple[Store, Remote]
) -> None:
    """The store of the first machine has a clock of 2023."""
    other, its_remote = second
    remote.publish(put_real(store, LONG, tier="system"))
    other.set_rules(ttl={"system": 86_400})

    expired = bring(its_remote, LONG)
    other.set_rules(ttl={"system": 10 * 365 * 86_400})
    brought = bring(its_remote, LONG)

    assert (expired.why, expired.num_tokens) == (Why.NOT_FOUND, 0)
    assert brought.why == Why.BROUGHT
    assert other.entries()[0].created == store.entries()[0].created


def test_a_date_ahead_is_not_believed(
    store: Store, remote: Remote, second: tuple[Store, Remote], clock: Clock
) -> None:
    other, its_remote = second
    clock.advance(10 * 365 * 86_400)
    remote.publish(put_real(store, LONG))

    bring(its_remote, LONG)

    assert other.entries()[0].created <= other.clock()
