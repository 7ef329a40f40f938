"""Commands are called as people type them: by short names, by labels, with `--store` anywhere."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from persist_cache import Store
from persist_cache_cli.calling import ALIASES
from persist_cache_cli.main import cli
from tests.cli import Run, contents, fill, runner


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def ids(root: Path) -> dict[str, str]:
    return fill(root)


@pytest.fixture
def run(root: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(root, capfd)


# ---- commands ------------------------------------------------------------------------------------


def test_short_names_are_the_commands(ids: dict[str, str], run: Run) -> None:
    assert run("ls").out == run("list").out
    assert run("rm", ids["reply"], "--dry-run").out == run("evict", ids["reply"], "--dry-run").out


def test_help_names_the_short_names(run: Run) -> None:
    said = run("--help").out

    for alias, name in ALIASES.items():
        assert f"{name}, {alias}" in said


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lst", "list"),
        ("expalin", "explain"),
        ("Show", "show"),
        ("remove", "evict"),
        ("pni", "pin"),
    ],
)
def test_near_miss_of_a_command_is_suggested(run: Run, typed: str, meant: str) -> None:
    done = run(typed)

    assert done.status == 2
    assert f"Did you mean {meant!r}?" in done.sentence


def test_nothing_is_suggested_for_what_is_near_to_nothing(run: Run) -> None:
    assert "Did you mean" not in run("frobnicate").sentence


# ---- the store -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["list", "check", "gc", "evict --all --dry-run"])
def test_store_may_stand_behind_a_command(
    tmp_path: Path, root: Path, ids: dict[str, str], run: Run, command: str
) -> None:
    words = [*command.split(), "--quiet" if command == "list" else "--json"]

    here = run(*words)
    behind = run("--store", tmp_path / "elsewhere", *words, "--store", root)

    assert (behind.status, behind.out) == (0, here.out)


def test_every_command_takes_a_store() -> None:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        stores = [one for one in command.params if "--store" in one.opts]
        assert len(stores) == 1, name


# ---- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["house", "bad", "20261126", "zwölf Boxkämpfer", "a@b"])
def test_a_label_names_its_entry_wherever_an_id_does(
    tmp_path: Path, ids: dict[str, str], run: Run, label: str
) -> None:
    run("label", ids["reply"], label)

    assert run("show", label).out.startswith(run("show", ids["reply"]).out[:200])
    assert run("pin", label, "--json").json[0]["id"] == ids["reply"]
    assert run("ttl", label, "1d", "--json").json[0]["id"] == ids["reply"]
    assert run("unpin", label, "--json").json[0]["id"] == ids["reply"]
    assert run("export", label, tmp_path / "one.tar").status == 0
    (gone,) = run("evict", label, "--yes", "--json").json["entries"]
    assert gone["id"] == ids["reply"]


def test_label_of_several_entries_is_answered_with_the_candidates(
    root: Path, ids: dict[str, str], run: Run
) -> None:
    run("label", ids["reply"], ids["other"], "twice")
    before = contents(root)

    done = run("evict", "twice", "--yes")

    assert done.status == 1
    assert ids["reply"][:6] in done.sentence
    assert ids["other"][:6] in done.sentence
    assert contents(root) == before


def test_label_that_looks_like_the_beginning_of_another_entrys_id_evicts_neither(
    root: Path, ids: dict[str, str], run: Run
) -> None:
    label = ids["other"][:3]
    run("label", ids["reply"], label)
    before = contents(root)

    done = run("evict", label, "--yes")

    assert done.status == 1
    assert ids["reply"][:6] in done.sentence
    assert ids["other"][:6] in done.sentence
    assert contents(root) == before


def test_whole_id_goes_before_a_label_that_is_the_same(
    root: Path, ids: dict[str, str], run: Run
) -> None:
    run("label", ids["reply"], ids["other"])

    assert run("show", ids["other"], "--json").json["id"] == ids["other"]


def test_unknown_label_is_told_with_what_was_typed(ids: dict[str, str], run: Run) -> None:
    done = run("show", "nobody's")

    assert done.status == 3
    assert "nobody's" in done.sentence


def test_label_finds_nothing_without_a_store(tmp_path: Path, run: Run) -> None:
    with Store.open(tmp_path / "empty"):
        pass
    assert run("--store", tmp_path / "empty", "show", "house").status == 3
    assert run("show", "house").status == 3
