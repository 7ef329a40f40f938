"""`export` and `import` on the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from persist_cache import Store
from persist_cache.fingerprint.identifier import Identifier
from tests.bundles import Parts
from tests.cli import QUESTION, REPLY, SYSTEM, Run, contents, fill, runner, script
from tests.fakes import FakeSource, fetched
from tests.test_cli_docs import fields, section
from tests.test_cli_store import LIGHT, fake_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def ids(root: Path) -> dict[str, str]:
    return fill(root)


@pytest.fixture
def run(root: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(root, capfd)


@pytest.fixture
def there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs commands on another store, which does not exist yet."""
    return runner(tmp_path / "there", capfd)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "agent.tar"


def test_what_is_exported_can_be_imported(
    ids: dict[str, str], run: Run, there: Run, file: Path, tmp_path: Path
) -> None:
    exported = run("export", ids["system"][:8], ids["reply"], file)
    planned = there("import", file, "--dry-run")

    assert (exported.status, exported.err) == (0, "")
    assert exported.out.startswith("2 entries (40 tokens, ")
    assert (planned.status, planned.err) == (0, "")
    assert planned.out.startswith("2 entries would be added (40 new tokens, ")
    assert not (tmp_path / "there").exists()

    imported = there("import", file)

    assert (imported.status, imported.err) == (0, "")
    assert imported.out.startswith("2 entries added (40 new tokens, ")
    assert "org/model-w0" in imported.out
    with Store.open(tmp_path / "there") as store:
        assert fetched(store, REPLY) == 40
        assert store.get(ids["system"]).label == "the agent"
    assert there("check", "--read-data").status == 0
    assert there("import", file).out.startswith("0 entries added, 2 there already.")


def test_json_of_both(ids: dict[str, str], run: Run, there: Run, file: Path) -> None:
    exported = run("export", ids["question"], file, "--json").json
    planned = there("import", file, "--dry-run", "--json").json
    imported = there("import", file, "--json").json

    assert set(exported) == fields("export")
    assert exported["ids"] == [ids["question"]]
    assert exported["file_bytes"] == file.stat().st_size
    assert set(imported) == set(planned) == fields("import")
    assert (planned["dry_run"], imported["dry_run"]) == (True, False)
    (entry,), (model,) = imported["entries"], imported["models"]
    assert (entry["id"], entry["num_tokens"], entry["new_tokens"]) == (ids["question"], 30, 30)
    assert entry["written_bytes"] > 0
    assert (model["model"], model["usable"]) == ("org/model-w0", None)
    for value in (entry, model):
        for name in value:
            assert f"`{name}`" in section("import"), name


def test_what_is_imported_may_join_a_group(
    ids: dict[str, str], run: Run, there: Run, file: Path, tmp_path: Path
) -> None:
    run("export", ids["system"], ids["reply"], file)

    for group in ("team", "other"):
        assert there("import", file, "--group", group).status == 0

    with Store.open(tmp_path / "there") as store:
        assert [entry.groups for entry in store.entries()] == [("team", "other")] * 2


def test_quiet_says_nothing(ids: dict[str, str], run: Run, there: Run, file: Path) -> None:
    for done in (run("export", ids["reply"], file, "-q"), there("import", file, "-q")):
        assert (done.status, done.out, done.err) == (0, "", "")


def test_the_model_given_decides(
    root: Path, run: Run, there: Run, file: Path, tmp_path: Path
) -> None:
    folder = fake_model(tmp_path / "model")
    found = Identifier()((str(folder), None, None))
    assert found is not None
    ids = fill(root)
    with Store.open(root) as store:
        ours = store.put(found, SYSTEM, FakeSource(SYSTEM, real=True)).entry
    run("export", ids["system"], ours, file)

    done = there("import", file, "--model", folder, "--json").json
    (entry,) = done["entries"]
    usable = {one["model"]: one["usable"] for one in done["models"]}
    assert entry["id"] == ours
    assert usable == {"model": True, "org/model-w0": False}

    run("export", ids["system"], file, "--force")
    none = there("import", file, "--model", folder)
    assert none.status == 3
    assert none.out.startswith("0 entries added.\n")
    assert "  weights: w0 in the file, " in none.out
    assert len(there("list", "--json").json) == 1

    salted = there("import", file, "--model", folder, "--salt", "me")
    assert salted.status == 3
    assert "  salt: none in the file" in salted.out


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("export", 2, "ID"),
        ("export {id}", 2, "ID"),
        ("export xyz {file}", 3, "No entry has the label 'xyz', and it is no id."),
        ("export 0123456789abcdef {file}", 3, "No entry"),
        ("export {id} 0123456789abcdef {file}", 3, "No entry"),
        ("export {id} {taken}", 1, "exists already; --force"),
        ("export {id} {folder}", 1, "is a folder; name the file"),
        ("export {id} {folder} --force", 1, "is a folder; name the file"),
        ("export {id} {empty} --force", 1, ". is a folder; name the file"),
        ("export {id} / --force", 1, "/ is a folder; name the file"),
        ("export {id} {folder}/no/where.tar", 1, "cannot be written"),
        ("export {id} {pipe}", 1, "is a device, a pipe or a socket; name a file"),
        ("export {id} {pipe} --force", 1, "is a device, a pipe or a socket; name a file"),
        ("export {id} {link} --force", 1, "is a device, a pipe or a socket; name a file"),
        ("export {id} {file} --nonsense", 2, "--nonsense"),
        ("import", 2, "FILE"),
        ("import {folder}/nothing", 1, "cannot be read"),
        ("import {folder}", 2, "folder is a folder; name the file that"),
        ("import {pipe}", 1, "pipe is not a file that"),
        ("import {empty}", 2, "Error: . is a folder; name the file that"),
        ("import {taken}", 1, "is not a bundle"),
        ("import {bad}", 1, "checksum"),
        ("import {bad} --dry-run", 1, "checksum"),
        ("import {good} --model nowhere", 1, "cannot be identified"),
        ("import {good} --model {folder}", 1, "cannot be identified"),
        ("import {good} --kv-bits 99", 2, "--kv-bits"),
        ("import {good} {good}", 2, "extra argument"),
    ],
)
def test_bad_arguments(
    root: Path,
    ids: dict[str, str],
    run: Run,
    tmp_path: Path,
    line: str,
    status: int,
    says: str,
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    good, bad, taken = tmp_path / "good.tar", tmp_path / "bad.tar", tmp_path / "taken"
    run("export", ids["reply"], good)
    raw = bytearray(good.read_bytes())
    raw[-2000] ^= 1
    bad.write_bytes(raw)
    taken.write_text("mine\n" * 200)
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    words = {"id": ids["reply"], "file": tmp_path / "new.tar", "folder": folder, "empty": ""}
    words |= {"good": good, "bad": bad, "taken": taken, "pipe": pipe, "link": link}
    before = contents(root)

    done = run(*(part.format(**words) for part in line.split()))

    assert done.status == status
    assert says in done.sentence
    assert done.out == ""
    assert contents(root) == before
    assert taken.read_text() == "mine\n" * 200
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert not (tmp_path / "new.tar").exists()
    assert list(tmp_path.glob(".*")) == []


def test_a_bad_bundle_makes_no_store(there: Run, file: Path, tmp_path: Path) -> None:
    file.write_bytes(bytes(5000))

    assert there("import", file).status == 1
    assert not (tmp_path / "there").exists()


def test_a_budget_that_is_too_small(
    ids: dict[str, str], run: Run, there: Run, file: Path, tmp_path: Path
) -> None:
    run("export", *ids.values(), file)
    with Store.open(tmp_path / "there", max_bytes=1000, min_free_bytes=0):
        pass
    before = contents(tmp_path / "there")

    for extra in ((), ("--dry-run",)):
        done = there("import", file, *extra)

        assert done.status == 1
        assert "budget" in done.sentence
        assert contents(tmp_path / "there") == before


def test_an_unknown_version(ids: dict[str, str], run: Run, there: Run, file: Path) -> None:
    run("export", ids["reply"], file)
    parts = Parts.of(file)
    parts.manifest["version"] = 2
    parts.write(file)

    assert "version 2" in there("import", file).sentence


def test_an_empty_store_has_nothing_to_export(run: Run, root: Path, file: Path) -> None:
    done = run("export", "abc", file)

    assert done.status == 3
    assert "No entry" in done.sentence
    assert not root.exists()


def test_the_installed_script(root: Path, ids: dict[str, str], file: Path, tmp_path: Path) -> None:
    exported = script(root, "export", ids["reply"], ids["other"], file)
    imported = script(tmp_path / "there", "import", file)
    broken = script(tmp_path / "there", "import", root / "data.mdb")

    assert (exported.status, exported.err) == (0, "")
    assert (imported.status, imported.err) == (0, "")
    assert "Traceback" not in broken.err
    assert "is not a bundle" in broken.sentence


@pytest.mark.parametrize("name", ["export", "import", "doctor"])
def test_nothing_heavy_is_imported(
    root: Path, ids: dict[str, str], run: Run, file: Path, name: str
) -> None:
    run("export", ids["reply"], file)
    arguments: dict[str, list[object]] = {
        "export": [ids["reply"], file, "--force"],
        "import": [file],
        "doctor": [],
    }
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, "--store", root, name, *map(str, arguments[name])],
        capture_output=True,
        text=True,
    )

    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_beside_a_process_that_has_the_store_open(
    root: Path, ids: dict[str, str], file: Path
) -> None:
    with Store.open(root) as store:
        assert script(root, "export", ids["reply"], file).status == 0
        store.evict([ids["reply"], ids["question"], ids["system"], ids["other"]])
        assert fetched(store, QUESTION) == 0

        assert script(root, "import", file, env=dict(os.environ)).status == 0
        assert fetched(store, REPLY) == 40
