"""Any arguments: an answer or one sentence, never a traceback, and the store stays sound."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from persist_cache import Store
from persist_cache_cli.main import cli, main
from tests.cli import fill
from tests.examples import examples
from tests.memory import fast_folder

CONTEXT = click.Context(cli)
NOT_HERE = {"serve", "demo"}
"""They go on until they are stopped, or for a minute."""
NAMES = sorted(set(cli.list_commands(CONTEXT)) - NOT_HERE)
ENDLESS = {"--watch"}
LIMITED = {"selftest": ["--quick", "--only", "platform"]}
"""What keeps a command short that takes minutes when it is called rightly."""
HOSTILE = [
    "", "-", "--", "-x", "--no-such-option", "0", "-1", "1e999", "nan", "inf", "9" * 400, "1.5",
    "\x1b[2J", "é" * 300, "\udcff", "\u202e", "none", "null", "true", "*", "[",
    "[[[[", "@", "@missing", "@.", "{}", "[]", '{"a": ' * 2000, "7d", "-7d", "1h-2m", "10GB",
    "-5GB", "1QB", "system", "SYSTEM", "no/such", "list", "f.json", "f.toml", "store", "%s%n",
    "$(id)", "a" * 5000,
]  # fmt: skip
TEXTS = st.binary(max_size=8).map(lambda raw: os.fsdecode(raw.translate(None, b"/\0"))) | st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=8
)
"""No argument of a process holds a zero byte, and none here may lead out of the folder."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The current folder, with a store and files that are not what they should be."""
    before = Path.cwd()
    with fast_folder() as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(found / "hub"))
        (found / "f.json").write_bytes(b'{"messages": [{"role": 5, "content": ["\xff"]}]}')
        (found / "f.toml").write_text("[[prompt]]\nmodel = 5\n")
        os.chdir(found)
        yield found
        os.chdir(before)


def filled(root: Path) -> list[str]:
    """Make a new store there; returns the ids of its entries."""
    shutil.rmtree(root, ignore_errors=True)
    return sorted(fill(root).values())


def arguments(name: str, ids: list[str]) -> st.SearchStrategy[list[str]]:
    """What might follow the name of a command: its options, and anything else."""
    command = cli.get_command(CONTEXT, name)
    assert command is not None
    known = [
        (text, parameter.is_flag)
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for text in parameter.opts
        if text not in ENDLESS
    ]
    value = st.sampled_from([*HOSTILE, *ids, ids[0][:5], ids[0][:1]]) | TEXTS
    option = st.sampled_from(known).flatmap(
        lambda one: st.just([one[0]]) if one[1] else value.map(lambda text: [one[0], text])
    )
    return st.lists(option | value.map(lambda text: [text]), max_size=5).map(
        lambda groups: [word for group in groups for word in group]
    )


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main(["--store", "store", *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code, err.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_any_arguments(name: str, folder: Path) -> None:
    ids = filled(folder / "store")

    @settings(
        max_examples=examples(25, 120), deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(words=arguments(name, ids))
    @example(words=[])
    @example(words=["\udcff"])
    @example(words=[ids[0], ""])
    @example(words=["--force", ids[0], ""])
    def check(words: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            status, err = run([name, *LIMITED.get(name, []), *words], patch)
        assert status in (0, 1, 2, 3), err
        complaints = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert "Traceback" not in err
        assert len(complaints) <= 1
        if status == 2:
            assert err.splitlines() == complaints
        with Store.open(folder / "store", min_free_bytes=0) as store:
            assert store.check() == []

    check()


def test_any_arguments_of_the_whole(folder: Path) -> None:
    filled(folder / "store")
    short = sorted(set(NAMES) - set(LIMITED))

    @settings(
        max_examples=examples(50, 200), deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(words=st.lists(st.sampled_from([*HOSTILE, *short, "--version", "-h"]), max_size=4))
    def check(words: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            status, err = run(words, patch)
        assert status in (0, 1, 2, 3), err
        assert "Traceback" not in err

    check()
