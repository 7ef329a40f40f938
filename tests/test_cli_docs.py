"""`docs/cli.md` names every command, option and JSON field, and no others."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

from persist_cache import Store
from persist_cache.entry import Tier
from persist_cache.server.guard import LOOPBACK_ORIGINS
from persist_cache_cli.main import cli
from persist_cache_cli.prompts import ManifestPrompt, read_manifest
from tests.cli import Run, fill, prepared_script, runner
from tests.fakes import put

ROOT = Path(__file__).parents[1]
CLI_MD = (ROOT / "docs" / "cli.md").read_text()
CONTEXT = click.Context(cli)
COMMANDS = cli.list_commands(CONTEXT)
OF_SERVE = ("serve", "service", "config")
"""Commands that take the flags of `serve`."""


def section(title: str) -> str:
    """The part of `docs/cli.md` about one command."""
    parts = re.split(r"^## (.+)$", CLI_MD, flags=re.MULTILINE)
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        if title in heading.split(", "):
            return str(body)
    raise AssertionError(f"docs/cli.md has no section about {title}")


def command(name: str) -> click.Command:
    found = cli.get_command(CONTEXT, name)
    assert found is not None
    return found


def parts(name: str) -> list[click.Command]:
    """A command, and those below it."""
    found = command(name)
    below = found.commands.values() if isinstance(found, click.Group) else ()
    return [found, *below]


def options(name: str) -> set[str]:
    return {
        text
        for part in parts(name)
        for parameter in part.params
        if isinstance(parameter, click.Option)
        for text in (*parameter.opts, *parameter.secondary_opts)
        if text.startswith("--")
    }


@cache
def flags_of_serve() -> set[str]:
    """Its own options, and the flags of `mlx_lm.server`, as its help has them."""
    own, upstream = prepared_script(ROOT, "serve", "--help").out.split("Flags of mlx_lm.server:")
    found = set(re.findall(r"--[a-z][a-z-]+", own))
    assert options("serve") <= found
    assert "--prompt-cache-size" in upstream
    return found | set(re.findall(r"--[a-z][a-z-]+", upstream))


def fields(title: str) -> set[str]:
    """Names in the first column of a section's tables."""
    rows = re.findall(r"^\| (`[^|]*`) \|", section(title), flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name: str) -> None:
    text = section(name)
    everywhere = {"--json", "--quiet", "--help", "--config", "--store"}

    for option in options(name) - everywhere:
        assert option in text, option
    assert f"persist-cache {name}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_documented_option_exists(name: str) -> None:
    siblings = {text for one in cli.params for text in one.opts}
    siblings = siblings.union(*(options(one) for one in COMMANDS))
    if name == "serve":
        siblings = flags_of_serve()

    for option in re.findall(r"--[a-z][a-z-]+", section(name)):
        assert option in siblings, option


def test_members_of_a_manifest_are_documented(tmp_path: Path) -> None:
    rows = re.findall(r"^\| (`[^|]+) \|", section("warm"), flags=re.MULTILINE)
    (example,) = re.findall(r"```toml\n(.*?)```", section("warm"), flags=re.DOTALL)

    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(ManifestPrompt.__struct_fields__)
    (tmp_path / "prompts.toml").write_text(example)
    assert len(read_manifest(tmp_path / "prompts.toml")) == 2


def test_global_options_are_documented() -> None:
    for parameter in cli.params:
        assert any(text in CLI_MD for text in parameter.opts)


def test_table_names_every_command() -> None:
    table = re.findall(r"^\| (`persist-cache .*?) \|", CLI_MD, re.M)

    assert set(re.findall(r"`(?:persist-cache )?(\w+)`", "".join(table))) == set(COMMANDS)


@pytest.mark.parametrize(
    "document", ["README.md", "docs/cli.md", "docs/start.md", "docs/sharing.md"]
)
def test_examples_are_accepted(document: str) -> None:
    """Every call of a command in a document parses: its command and options exist."""
    text = (ROOT / document).read_text()
    calls = re.findall(r"^(?:    |\$ )?(persist-cache [^\n`]+?)(?:  #.*)?$", text, re.MULTILINE)
    for call in calls:
        words = shlex.split(call.split(" | ")[0].split(" -- ")[0].rstrip("\\ &"))[1:]
        while words and words[0] in ("--store", "[--store"):
            words = words[2:]
        if not words or words[0].startswith(("-", "COMMAND")):
            continue
        name, given = words[0], {word.split("=")[0] for word in words if word.startswith("--")}
        assert name in COMMANDS, call
        known = options(name) | (flags_of_serve() if name in OF_SERVE else set())
        assert given <= known, call


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    whole, *below = parts(name)

    assert f"persist-cache {name}" in (whole.help or "")
    for one in below:
        assert f"persist-cache {name} {one.name}" in (one.help or ""), one.name


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(tmp_path / "store", capfd)


@pytest.fixture
def ids(tmp_path: Path) -> dict[str, str]:
    return fill(tmp_path / "store")


ENTRY = fields("Entry")


def test_what_a_client_asks_to_keep_is_shown_where_it_did(
    tmp_path: Path, run: Run, ids: dict[str, str]
) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        kept = put(store, [7] * 5, tier="user", keep_s={Tier.USER: 3600})

    for call in (["list"], ["list", "--tree"], ["show", kept]):
        said = run(*call, "--json").json
        entries = said if isinstance(said, list) else [said]
        assert {one["id"]: one["keep_s"] for one in entries if "keep_s" in one} == {kept: 3600}
    assert "asked for" in run("show", kept).out
    assert "1.0 h after each use" in run("show", kept).out
    assert "asked for" not in run("show", ids["reply"]).out


def test_entry_fields(run: Run, ids: dict[str, str]) -> None:
    entries = run("list", "--json").json
    (tree, *_) = run("list", "--tree", "--json").json
    shown = run("show", ids["reply"], "--json").json
    (evicted,) = run("evict", ids["reply"], "--dry-run", "--json").json["entries"]

    assert all(set(entry) == ENTRY for entry in entries)
    assert set(tree) == ENTRY | {"children"}
    assert set(shown) == ENTRY | fields("show") - {"text"}
    assert set(evicted) == ENTRY | {"reason"}


def test_fields_of_reports(run: Run, ids: dict[str, str]) -> None:
    assert set(run("evict", ids["reply"], "--dry-run", "--json").json) == fields("evict")
    assert set(run("stats", "--json").json) == fields("stats")
    assert set(run("check", "--json").json) == fields("check")


def test_fields_within_fields(run: Run, ids: dict[str, str]) -> None:
    def named(title: str, *values: Any) -> None:
        text = section(title)
        for value in values:
            for name in value:
                assert f"`{name}`" in text, name

    stats = run("stats", "--json").json
    named("stats", stats["bytes"], stats["hits"], stats["tiers"][0], stats["models"][0])
    shown = run("show", ids["reply"], "--json").json
    named("show", shown["runs"][0], shown["identity"])
    named("gc", run("gc", "--json").json)
    for line in ("pin {id}", "unpin {id}", "ttl {id} 1d", "label {id} x"):
        (changed,) = run(*line.format(id=ids["reply"]).split(), "--json").json
        named("pin", changed)


def test_help_of_serve_says_one_default_of_allowed_origins_and_it_is_the_one_used() -> None:
    said = " ".join(prepared_script(ROOT, "serve", "--help").out.split())
    flag = re.findall(r"--allowed-origins ALLOWED_ORIGINS (?!\])(.*?) --draft-model", said)

    assert [re.findall(r"default: ([^)]*)", one) for one in flag] == [[LOOPBACK_ORIGINS]]
    assert said.count("--allowed-origins") == 2, "in the usage, and where it is described"
