"""Groups of entries: what one client's requests use is listed, kept and evicted together."""

from __future__ import annotations

from pathlib import Path

import pytest

from persist_cache import Store
from persist_cache.entry import MAX_GROUP
from persist_cache.index.groups import MOST_GROUPS, joined, pack_groups, unpack_groups
from tests import forge
from tests.cli import Run, runner
from tests.fakes import fingerprint, put

SYSTEM = [1] * 30
MINE, YOURS = [*SYSTEM, *[2] * 10], [*SYSTEM, *[3] * 10]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def run(root: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(root, capfd)


@pytest.fixture
def ids(root: Path) -> dict[str, str]:
    """Two clients under one system prompt, which the first of them stored; and one of no group."""
    with Store.open(root, min_free_bytes=0) as store:
        return {
            "system": put(store, SYSTEM, tier="system", group="mine"),
            "mine": put(store, MINE, tier="user", group="mine"),
            "yours": put(store, YOURS, tier="user", group="yours"),
            "nobody's": put(store, [9] * 10, tier="user"),
        }


def of_group(run: Run, group: str) -> set[str]:
    return {one["id"] for one in run("list", "--group", group, "--json").json}


def test_what_a_group_uses_is_listed_whoever_stored_it(run: Run, ids: dict[str, str]) -> None:
    assert of_group(run, "mine") == {ids["system"], ids["mine"]}
    assert of_group(run, "yours") == {ids["system"], ids["yours"]}
    assert of_group(run, "min*") == set()
    listed = {one["id"]: one for one in run("list", "--json").json}
    assert listed[ids["mine"]]["group"] == "mine"
    assert listed[ids["nobody's"]]["group"] == ""
    assert "groups" not in listed[ids["mine"]]
    assert listed[ids["system"]]["groups"] == ["mine", "yours"]
    assert "group" in run("list").out
    assert "mine, yours" in run("show", ids["system"]).out


def test_evicting_a_group_leaves_what_others_use(run: Run, ids: dict[str, str]) -> None:
    planned = run("evict", "--group", "mine", "--dry-run", "--json").json
    done = run("evict", "--group", "mine", "--yes", "--json").json

    for one in (planned, done):
        assert [entry["id"] for entry in one["entries"]] == [ids["mine"]]
        assert one["skipped_shared"] == [ids["system"]]
    assert of_group(run, "mine") == set()
    assert of_group(run, "yours") == {ids["system"], ids["yours"]}
    assert run("evict", "--group", "mine", "--yes").status == 3
    assert {
        one["id"] for one in run("evict", "--group", "yours", "--yes", "--json").json["entries"]
    } == {
        ids["system"],
        ids["yours"],
    }
    assert [one["id"] for one in run("list", "--json").json] == [ids["nobody's"]]


def test_what_requests_of_no_group_use_is_not_evicted_with_one(
    root: Path, run: Run, ids: dict[str, str]
) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        after = put(store, [9] * 20, tier="user", group="late")
        put(store, MINE, tier="user")

    assert of_group(run, "late") == {ids["nobody's"], after}
    assert run("evict", "--group", "late", "--group", "late", "--yes").status == 0
    assert run("evict", "--group", "mine", "--yes", "--json").json["entries"] == []
    left = {one["id"] for one in run("list", "--json").json}
    assert left == {ids["nobody's"], ids["system"], ids["mine"], ids["yours"]}


def test_evicting_an_entry_of_a_group_by_id_evicts_it(run: Run, ids: dict[str, str]) -> None:
    assert run("evict", ids["system"], "--json", "--yes").json["entries"][0]["id"] == ids["system"]
    assert of_group(run, "yours") == {ids["yours"]}


def test_a_use_joins_the_group_once_it_is_written(root: Path, ids: dict[str, str]) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        store.touch(store.match(fingerprint(), MINE), group="reader")
        store.flush()

        assert store.get(ids["mine"]).groups == ("mine", "reader")
        assert store.get(ids["system"]).groups == ("mine", "yours", "reader")


def test_use_of_a_part_of_an_entry_does_not_join_its_group(root: Path, ids: dict[str, str]) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        match = store.match(fingerprint(), [*MINE[:35], 8, 8])
        assert match.entries[-1] in (ids["mine"], ids["system"])
        store.touch(match, group="reader")
        store.touch(store.match(fingerprint(), MINE), num_tokens=20, group="shorter")
        store.flush()

        assert store.get(ids["mine"]).groups == ("mine",)
        assert store.get(ids["system"]).groups == ("mine", "yours", "reader")


def test_marks_of_a_group_leave_what_others_use(run: Run, ids: dict[str, str]) -> None:
    assert [one["id"] for one in run("ttl", "--group", "mine", "12h", "--json").json] == [
        ids["mine"]
    ]
    assert run("label", "--group", "mine", "a name").status == 0
    assert run("pin", "--group", "mine").status == 0
    listed = {one["id"]: one for one in run("list", "--json").json}
    assert listed[ids["mine"]]["label"] == "a name"
    assert listed[ids["mine"]]["pinned"]
    assert not listed[ids["system"]]["pinned"]
    assert listed[ids["system"]]["expires"] is None
    assert run("unpin", "--group", "mine").status == 0
    assert run("ttl", "--group", "mine", "none").status == 0
    assert [one["expires"] for one in run("list", "--json").json] == [None] * 4


def test_a_group_is_exported_with_what_others_use(
    run: Run, ids: dict[str, str], tmp_path: Path
) -> None:
    done = run("export", "--group", "yours", tmp_path / "yours.tar", "--json").json
    assert set(done["ids"]) == {ids["system"], ids["yours"]}


@pytest.mark.parametrize("command", ["pin", "unpin", "label", "ttl", "export"])
def test_entries_are_named_by_id_or_by_group(
    run: Run, ids: dict[str, str], tmp_path: Path, command: str
) -> None:
    ends: dict[str, list[object]] = {
        "label": ["name"],
        "ttl": ["7d"],
        "export": [tmp_path / "out.tar"],
    }
    last = ends.get(command, [])

    assert run(command, *last).status == 2
    assert run(command, "--group", "mine", ids["mine"], *last).status == 2
    assert run(command, "--group", "nobody", *last).status == 3


@pytest.mark.parametrize("group", ["", "two\nlines", "x" * (MAX_GROUP + 1), "\x1b[31m"])
def test_what_can_be_no_group_is_refused(run: Run, ids: dict[str, str], group: str) -> None:
    for command in ("list", "evict", "pin"):
        assert run(command, "--group", group).status == 2


def test_put_refuses_what_can_be_no_group(root: Path) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        with pytest.raises(ValueError, match="one line"):
            put(store, MINE, group="x\0y")
        assert store.entries() == []


def test_groups_of_an_entry_are_bounded_and_those_forgotten_keep_it() -> None:
    groups: tuple[str, ...] = ()
    for number in range(MOST_GROUPS + 3):
        groups = joined(groups, f"group {number}", is_new=number == 0)

    assert groups == ("", *(f"group {number}" for number in range(3, MOST_GROUPS + 3)))
    assert unpack_groups(pack_groups(groups)) == groups


@pytest.mark.parametrize("raw", [b"", b"\0", b"\xff", b"a\0a", b"x" * 300, b"a\nb", b"a\0" * 20])
def test_damaged_groups_say_nothing(raw: bytes) -> None:
    assert unpack_groups(raw) == ()


def test_store_of_a_version_that_knows_no_groups_is_read_and_cleaned(root: Path) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        mine = put(store, MINE, group="mine")
        forge.change(store, lambda txn: forge.put(txn, b"groups", b"x" * 8, b"\xff"))
        assert store.check() == []
        store.gc()
        left = forge.change(store, lambda txn: forge.records(txn, b"groups"))
        assert [key.hex() for key, _ in left] == [mine]
        forge.change(store, lambda txn: forge.drop(txn, b"groups"))

    with Store.open(root, read_only=True) as store:
        assert store.get(mine).groups == ()
        assert [one.groups for one in store.entries()] == [()]
        assert store.check() == []
    with Store.open(root, min_free_bytes=0) as store:
        put(store, MINE, group="mine")
        assert store.get(mine).groups == ("", "mine")


def test_a_rebuilt_index_has_the_groups(root: Path, ids: dict[str, str]) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        store.rebuild_index()
        assert store.get(ids["system"]).groups == ("mine", "yours")


def test_an_evicted_entry_leaves_no_group_behind(root: Path, ids: dict[str, str]) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        store.evict([ids["mine"]])
        assert forge.change(store, lambda txn: len(forge.records(txn, b"groups"))) == 2
