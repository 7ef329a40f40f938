"""persist-cache.toml: flags win over the environment, that over the file, that over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from persist_cache.server.run import flags_of_upstream
from persist_cache_cli import config_place
from persist_cache_cli.commands.serve import command as serve
from persist_cache_cli.main import main
from tests.cli import Done, Run

FULL = """
store = "prompts"

[serve]
model = "mlx-community/Qwen3-4B-4bit"
port = 9000
disk_bytes = "50GB"
unload-after = "15m"
persist = ["system", "user"]
strict = true
trust-remote-code = true
use-default-chat-template = false
stabilize = ["date", "env"]
grace = 5
api-key = "s3cret-key"
salt = "s3cret-salt"
allowed-origins = ["http://a", "http://b"]
quota = ["salt:s3cret=of=salt=1GB", "model=9GB"]
ttl = "salt:s3cret-salt=7d"

[serve.alias]
big = "mlx-community/Qwen3-32B-4bit"

[serve.chat-template-args]
enable_thinking = false
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "persist-cache.toml"
    path.write_text(FULL)
    monkeypatch.setenv("PERSIST_CACHE_CONFIG", str(path))
    monkeypatch.delenv("PERSIST_CACHE_HOME")
    return path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, without naming a store."""

    def called(*arguments: object) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, out, err)

    return called


def shown(run: Run, *arguments: str) -> dict[str, tuple[Any, str, str]]:
    """Value, source and place of each setting."""
    done = run("config", "show", "--json", *arguments)
    assert done.status == 0, done.err
    return {
        one["name"]: (one["value"], one["source"], one["place"]) for one in done.json["settings"]
    }


def test_the_file_holds_where_nothing_else_is_said(file: Path, run: Run) -> None:
    found = shown(run)

    assert found["store"] == (str(file.parent / "prompts"), "file", f"{file}:2")
    assert found["port"] == (9000, "file", f"{file}:6")
    assert found["disk-bytes"] == (50_000_000_000, "file", f"{file}:7")
    assert found["unload-after"] == (900.0, "file", f"{file}:8")
    assert found["persist"][0] == "system,user"
    assert found["strict"] == (True, "file", f"{file}:10")
    assert found["trust-remote-code"][0] is True
    assert found["use-default-chat-template"][0] is False
    assert {"date", "env"} <= set(found["stabilize"][0])
    assert found["allowed-origins"][0] == ["http://a", "http://b"]
    assert found["alias"][:2] == (["big=mlx-community/Qwen3-32B-4bit"], "file")
    assert found["chat-template-args"][0] == {"enable_thinking": False}
    assert found["host"] == ("127.0.0.1", "default", "")


def test_what_the_store_remembers_is_not_called_nothing(file: Path, run: Run) -> None:
    def rows(*flags: str) -> dict[str, str]:
        lines = run("config", "show", *flags).out.splitlines()[2:]
        return {line.split()[0]: line for line in lines}

    said = rows()
    assert said["min-free"].split()[1:] == ["as", "last", "set", "default"]
    assert "as last set" in said["remote"]
    assert "as last set" in said["publish-after"]
    assert "as last set" not in said["disk-bytes"]
    for name in ("while-locked", "daily-write-bytes"):
        assert said[name].split()[1] == "–"
    # What was last said of another remote does not hold for this one.
    assert "as last set for this remote" in rows("--remote", "s3://other/x")["publish-after"]
    assert rows("--remote", "none")["publish-after"].split()[1] == "–"


def test_flags_win_over_the_environment_and_that_over_the_file(
    file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSIST_CACHE_HOME", "/from/environment")
    monkeypatch.setenv("PERSIST_CACHE_API_KEY", "s3cret-of-environment")

    found = shown(run, "--port", "1234", "--disk-bytes=1GB", "--model", "other", "--grace", "7")

    assert found["store"] == ("/from/environment", "environment", "PERSIST_CACHE_HOME")
    assert found["api-key"][1:] == ("environment", "PERSIST_CACHE_API_KEY")
    assert found["port"] == (1234, "flag", "--port")
    assert found["disk-bytes"] == (1_000_000_000, "flag", "--disk-bytes")
    assert found["model"][:2] == ("other", "flag")
    assert found["grace"][:2] == (7.0, "flag")
    for flags in (("--store", "/flag", "config", "show"), ("config", "show", "--store", "/flag")):
        store = run(*flags, "--json").json["settings"][0]
        assert (store["value"], store["source"]) == ("/flag", "flag")


@pytest.mark.parametrize("form", [["--json"], []])
def test_secrets_are_masked(form: list[str], file: Path, run: Run) -> None:
    done = run("config", "show", *form)

    assert done.status == 0
    assert "s3cret" not in done.out
    assert done.out.count("********") == 4
    assert "salt:********=1GB" in done.out


def test_every_option_and_flag_of_serve_is_shown_once(file: Path, run: Run) -> None:
    done = run("config", "show", "--json")

    names = [one["name"] for one in done.json["settings"]]
    assert len(names) == len(set(names))
    own = {one.opts[0][2:] for one in serve.params if isinstance(one, click.Option)}
    theirs = {one.option_strings[-1][2:] for one in flags_of_upstream().known}
    assert (own | theirs) - {*names, "config"} == {"", "help"}  # the last one of -h


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[serve]\nprot = 1\n", "line 2: prot: `serve` has no such option; did you mean port?"),
        ("[serve]\nunload_aftr = '1m'\n", "line 2: unload-aftr: "),
        ("[serve]\nunload_aftr = '1m'\n", "did you mean unload-after?"),
        ("[serv]\nport = 1\n", "line 1: serv: there is no such setting; did you mean serve?"),
        ("port = 1\n", "line 1: port: there is no such setting; an option goes below [serve]"),
        ("zzz = 1\n", "line 1: zzz: there is no such setting; an option goes below [serve]"),
        ("store = 3\n", "line 1: store: the name of a folder is wanted, not 3"),
        ("[serve]\n\nport = 'many'\n", 'line 3: port: "many" is no value of --port'),
        ("[serve]\nport = true\n", "line 2: port: a text or a number is wanted, not true"),
        ("[serve]\nlog-level = 'LOUD'\n", "line 2: log-level: "),
        ("[serve]\nstrict = 'yes'\n", "line 2: strict: true or false is wanted"),
        ("[serve]\ntrust-remote-code = 1\n", "line 2: trust-remote-code: true or false"),
        ("[serve]\ndisk-bytes = 'much'\n", "line 2: disk-bytes: 'much' is not a size"),
        ("[serve]\ndisk-bytes = true\n", "line 2: disk-bytes: a text or a number"),
        ("[serve]\nwarm = 'nowhere.toml'\n", "line 2: warm: "),
        ("[serve]\nport = 1\n[serve]\n", "cannot be understood"),
        ("[serve]\ndisk_bytes = '1GB'\ndisk-bytes = '2GB'\n", "disk-bytes: it is given twice"),
        ("serve = 3\n", "line 1: serve: a table is wanted"),
        ("[serve]\nstore = 'x'\n", "line 2: store: it is a setting of all commands"),
    ],
)
def test_a_bad_file_is_one_sentence_with_its_line(
    text: str, said: str, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)

    done = run("--config", path, "config", "show")

    assert done.status == 2
    assert said in done.sentence
    assert str(path) in done.sentence
    assert "?." not in done.sentence


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "70000"],
        ["--port", "-1"],
        ["--port", "many"],
        ["--persist", "sytem"],
        ["--api-key", ""],
        ["--admin-token", " blank"],
        ["--alias", "nothing"],
        ["--quota", "model=much"],
        ["--ttl", "model=soon"],
        ["--warm", "WARM"],
        ["--stabilize", "everything"],
        ["--prot", "1"],
        ["--log-level", "LOUD"],
    ],
)
def test_what_serve_refuses_is_refused_by_show_and_install_as_well(
    flags: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSIST_CACHE_CONFIG", "")
    (tmp_path / "warm.toml").write_text("[[prompt]]\nsystem = ''\n")
    flags = [one.replace("WARM", str(tmp_path / "warm.toml")) for one in flags]
    flags += ["--model", str(tmp_path / "nowhere")]

    done = [run(*command, *flags) for command in (("serve",), ("config", "show"))]
    if "--api-key" not in flags and "--admin-token" not in flags:  # which have no place there
        done.append(run("service", "install", "--print", *flags))

    assert {one.status for one in done} == {2}
    assert len({one.sentence.partition(" See `")[0] for one in done}) == 1, done


@pytest.mark.parametrize(("value", "right"), [("true", "false"), ("false", "true")])
def test_an_option_that_is_switched_off_by_another_name_is_named(
    value: str, right: str, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "persist-cache.toml"
    path.write_text(f"[serve]\nno-text = {value}\n")

    done = run("--config", path, "config", "show")

    assert done.status == 2
    assert f"line 2: no-text: there is no such setting; write text = {right}." in done.sentence


def test_advice_names_the_store_unless_commands_use_it_by_themselves(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    by_file = run("ps").sentence
    monkeypatch.setenv("PERSIST_CACHE_CONFIG", "")
    monkeypatch.setenv("PERSIST_CACHE_HOME", str(tmp_path / "own"))

    assert f"`persist-cache --store {tmp_path / 'prompts'} serve`" in by_file
    assert "`persist-cache serve`" in run("ps").sentence
    assert "`persist-cache serve`" in run("--store", tmp_path / "own", "ps").sentence
    named = run("--store", tmp_path / "other", "ps").sentence
    assert f"`persist-cache --store {tmp_path / 'other'} serve`" in named


def test_serve_refuses_an_unknown_key_before_anything_is_loaded(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[serve]\nmodl = 'nowhere/at-all'\n")

    done = run("--config", path, "serve")

    assert done.status == 2
    assert "did you mean model?" in done.sentence


@pytest.mark.parametrize("before", [True, False])
def test_the_file_may_be_named_before_and_behind_a_command(
    before: bool, file: Path, run: Run, tmp_path: Path
) -> None:
    other = tmp_path / "other.toml"
    other.write_text("store = 'elsewhere'\n[serve]\ngrace = 3\n")
    named = ["--config", str(other)]
    called = ["config", "show", "--json"]

    done = run(*named, *called) if before else run(*called, *named)

    found = {one["name"]: one["value"] for one in done.json["settings"]}
    assert found["grace"] == 3
    assert found["store"] == str(tmp_path / "elsewhere")
    assert found["disk-bytes"] is None


def test_a_file_that_was_named_has_to_be_there(run: Run, tmp_path: Path) -> None:
    done = run("--config", tmp_path / "nowhere.toml", "list")

    assert done.status == 2
    assert "there is no file" in done.sentence


def test_without_a_file_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PERSIST_CACHE_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))

    assert config_place.find(None) is None


def test_the_platforms_place_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run
) -> None:
    monkeypatch.setattr("persist_cache_cli.config_place.default_path", lambda: tmp_path / "c.toml")
    monkeypatch.delenv("PERSIST_CACHE_CONFIG")
    monkeypatch.delenv("PERSIST_CACHE_HOME")
    (tmp_path / "c.toml").write_text("store = 'here'\n")

    assert shown(run)["store"][0] == str(tmp_path / "here")


def test_paths_are_relative_to_the_file(tmp_path: Path, run: Run) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "w.toml").write_text("[[prompt]]\nsystem = 'x'\n")
    (tmp_path / "c.toml").write_text("[serve]\nmodel = 'model'\nwarm = 'w.toml'\n")

    done = run("--config", tmp_path / "c.toml", "config", "show", "--json")

    found = {one["name"]: one["value"] for one in done.json["settings"]}
    assert found["model"] == str(tmp_path / "model")
    assert found["warm"] == str(tmp_path / "w.toml")
