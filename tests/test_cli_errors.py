"""Bad input ends with one sentence and a status, and leaves the store as it was."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from persist_cache import Store
from persist_cache.errors import StoreError
from persist_cache.index import tree
from persist_cache.index.records import pack_counter
from persist_cache.index.transaction import Writer
from persist_cache.queries.explain import explain
from tests import forge
from tests.bulk_store import conversations
from tests.bulk_store import fill as fill_bulk
from tests.cli import SCRIPT, Done, Run, contents, fill, runner, script
from tests.fakes import fingerprint

COMMANDS = {
    "list": "list",
    "tree": "list --tree",
    "show": "show {id}",
    "evict": "evict {id} --yes",
    "dry": "evict {id} --dry-run",
    "pin": "pin {id}",
    "unpin": "unpin {id}",
    "ttl": "ttl {id} 7d",
    "label": "label {id} name",
    "stats": "stats",
    "check": "check",
    "repair": "check --repair",
    "rebuild": "check --rebuild-index",
    "gc": "gc",
}
READERS = ("list", "tree", "show", "dry", "stats", "check")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def ids(root: Path) -> dict[str, str]:
    return fill(root)


@pytest.fixture
def run(root: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(root, capfd)


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("show 0123456789abcdef", 3, "No entry"),
        ("evict 0123456789abcdef --yes", 3, "No entry"),
        ("pin 0123456789abcdef", 3, "No entry"),
        ("ttl 0123456789abcdef 1d", 3, "No entry"),
        ("label 0123456789abcdef x", 3, "No entry"),
        ("show xyz", 3, "No entry has the label 'xyz', and it is no id"),
        ("show 0123456789abcdef0", 3, "No entry has the label"),
        ("pin", 2, "ID"),
        ("unpin ''", 2, "this is neither"),
        ("show", 2, "ID"),
        ("ttl {id}", 2, "Missing argument"),
        ("ttl {id} soon", 2, "'soon' is not a length of time"),
        ("ttl {id} 7", 2, "not a length of time"),
        ("ttl {id} -- -7d", 2, "negative"),
        ("ttl {id} 999999999999d", 2, "100 years"),
        ("label {id} {long}", 2, "at most 200"),
        ("label {id} {bell}", 2, "control characters"),
        ("list --tier boss", 2, "'system', 'user', 'assistant'"),
        ("list --sort colour", 2, "'used'"),
        ("list --limit -1", 2, "--limit"),
        ("list --limit many", 2, "--limit"),
        ("list --nonsense", 2, "--nonsense"),
        ("list extra", 2, "extra"),
        ("lst", 2, "No such command 'lst'. Did you mean 'list'?"),
        ("delete {id}", 2, "Did you mean 'evict'?"),
        ("Evict", 2, "Did you mean 'evict'?"),
        ("frobnicate", 2, "No such command 'frobnicate'. See"),
        ("list --store=", 2, "--store needs a folder"),
        ("evict", 2, "Say which entries"),
        ("evict --all --tier user", 2, "--all goes with no other"),
        ("evict --tier boss --yes", 2, "'system'"),
        ("evict --to -5 --yes", 2, "negative"),
        ("evict --larger-than 5XB --yes", 2, "not a size"),
        ("evict --larger-than 9999999PB --yes", 2, "more than any disk holds"),
        ("evict --older-than -5d --yes", 2, "negative"),
        ("evict --older-than {id} --yes", 2, "not a length of time"),
        ("evict --model nobody --yes", 3, "Nothing matches"),
        ("evict --match hello --yes", 1, "tokenizer"),
        ("evict {id}", 2, "say --yes"),
        ("show {id} --text", 1, "tokenizer"),
        ("stats --interval never", 2, "not a length of time"),
        ("check --fix", 2, "--fix"),
    ],
)
def test_bad_arguments(
    root: Path, ids: dict[str, str], run: Run, line: str, status: int, says: str
) -> None:
    words = {"id": ids["reply"], "long": "x" * 201, "bell": "a\x07b"}
    arguments = [part.format(**words).strip("'") for part in line.split()]
    before = contents(root)

    done = run(*arguments)

    assert done.status == status
    assert says in done.sentence
    assert done.out == ""
    assert contents(root) == before


def test_an_ambiguous_id_is_answered_with_the_candidates(root: Path, run: Run) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        fill_bulk(store, conversations(fingerprint(), 40))
        all_ids = [entry.id for entry in store.entries()]
    digit = max("0123456789abcdef", key=lambda one: sum(x.startswith(one) for x in all_ids))
    before = contents(root)

    for command in ("show", "evict", "pin"):
        done = run(command, digit)

        assert done.status == 1
        assert f"begins with {digit}" in done.sentence
        assert next(one for one in all_ids if one.startswith(digit))[:6] in done.sentence
    assert contents(root) == before


def failing(root: Path, run: Run, ids: dict[str, str], name: str, says: str) -> None:
    """The command fails with one sentence, and changes nothing."""
    before = contents(root)

    done = run(*COMMANDS[name].format(id=ids["reply"]).split())

    assert done.status == 1, (done.out, done.err)
    assert says in done.sentence
    assert done.out == ""
    assert contents(root) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_store_of_an_unknown_schema_version(
    root: Path, ids: dict[str, str], run: Run, name: str
) -> None:
    with Store.open(root) as store:
        forge.change(store, lambda txn: txn.set_meta("schema", pack_counter(99)))

    failing(root, run, ids, name, "schema version 99")


@pytest.mark.parametrize("name", COMMANDS)
def test_somebody_elses_store(
    root: Path, ids: dict[str, str], run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: root.stat().st_uid + 1)

    failing(root, run, ids, name, "belongs to another user")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_instead_of_a_store(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    root.write_text("mine")

    done = runner(root, capfd)(*COMMANDS[name].format(id="abcdef").split())

    assert done.status == 1
    assert "is not a folder" in done.sentence
    assert root.read_text() == "mine"


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_index(root: Path, ids: dict[str, str], run: Run, name: str) -> None:
    path = root / "data.mdb"
    path.write_bytes(b"garbage!" * (path.stat().st_size // 8))

    failing(root, run, ids, name, "not an LMDB file")


@pytest.mark.parametrize("name", READERS)
def test_a_truncated_index(root: Path, ids: dict[str, str], run: Run, name: str) -> None:
    os.truncate(root / "data.mdb", 8192)

    failing(root, run, ids, name, "data.mdb")


def test_a_damaged_index_is_rebuilt_on_request(root: Path, ids: dict[str, str], run: Run) -> None:
    path = root / "data.mdb"
    path.write_bytes(b"garbage!" * (path.stat().st_size // 8))

    done = run("check", "--rebuild-index", "--json")

    assert done.status == 0
    assert set(run("list", "-q").out.split()) == set(ids.values())


@pytest.mark.parametrize(
    "line",
    [
        "evict --all --yes --json",
        "evict --all --yes",
        "evict {id} --yes --json",
        "evict --tier system --yes",
        "evict --tier system --dry-run",
        "evict --stale --dry-run",
        "evict --to 1MB --dry-run",
        "list --json",
        "stats --json",
    ],
)
def test_an_index_that_contradicts_itself(
    root: Path, ids: dict[str, str], run: Run, line: str
) -> None:
    def confuse(txn: Writer) -> None:
        number, record = next(iter(txn.entries()))
        txn.put_entry(number, record._replace(checkpoint=7777))

    with Store.open(root) as store:
        forge.change(store, confuse)
    before = contents(root)

    done = run(*line.format(id=ids["reply"]).split())

    assert (done.status, done.out) == (1, "")
    assert "an entry names a checkpoint without record" in done.sentence
    assert contents(root) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"checkpoint": 7777}, "it names a blob without record"),
        ({"namespace": 7777}, "an entry names a namespace without record"),
        ({"node": 7777}, "an entry has another length than its path"),
        ({"num_tokens": 7777}, "an entry has another length than its path"),
    ],
)
def test_export_from_an_index_that_contradicts_itself(
    root: Path, ids: dict[str, str], run: Run, tmp_path: Path, change: Any, says: str
) -> None:
    def confuse(txn: Writer) -> None:
        record = txn.entry(int(ids["reply"], 16))
        assert record is not None
        txn.put_entry(int(ids["reply"], 16), record._replace(**change))

    with Store.open(root) as store:
        forge.change(store, confuse)

    done = run("export", ids["reply"], tmp_path / "bundle")

    assert (done.status, done.out) == (1, "")
    assert says in done.sentence
    assert not (tmp_path / "bundle").exists()


def test_a_model_whose_identity_cannot_be_read(
    root: Path, ids: dict[str, str], run: Run, tmp_path: Path
) -> None:
    def confuse(txn: Writer) -> None:
        for key, record in txn.namespaces():
            txn.put_namespace(key, msgspec.structs.replace(record, identity="{"))

    with Store.open(root) as store:
        forge.change(store, confuse)

        with pytest.raises(StoreError, match="the identity of a model"):
            explain(store, fingerprint(weights="other"), [1, 2, 3])

    done = run("export", ids["reply"], tmp_path / "bundle")
    assert (done.status, done.out) == (1, "")
    assert "the identity of a model is not a stored fingerprint" in done.sentence


def test_stats_of_a_store_whose_counter_is_damaged(
    root: Path, ids: dict[str, str], run: Run
) -> None:
    with Store.open(root) as store:
        forge.change(store, lambda txn: txn.add(tree.BLOB_BYTES, -(1 << 60)))

    done = run("stats")

    assert done.status == 0
    assert len(done.out) < 10_000


def test_a_folder_of_blobs_that_cannot_be_listed(
    root: Path, ids: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.listdir

    def fail(path: str) -> list[str]:
        if Path(path).parent == root / "blobs":
            raise OSError(errno.EIO, "Input/output error", path)
        return real(path)

    monkeypatch.setattr(os, "listdir", fail)

    done = run("check")

    assert (done.status, done.out) == (1, "")
    assert done.sentence.endswith(": Input/output error.")


def test_an_error_of_the_system_becomes_a_sentence(
    root: Path, ids: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", "/some/file")

    monkeypatch.setattr(Store, "open", fail)

    done = run("list")

    assert done.status == 1
    assert done.sentence == "Error: /some/file: Input/output error."


def test_an_empty_name_for_the_store(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = runner(Path("x"), capfd)("--store", "", "list")

    assert done.status == 2
    assert "--store" in done.sentence


# ---- permissions that bind, and a disk that is read-only --------------------------------------

UNPRIVILEGED = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
READ_ONLY_DISK = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"',
)


def require(*program: str) -> None:
    """Skip the test where `program` cannot be run."""
    if shutil.which(program[0]) is None or subprocess.run([*program, "true"]).returncode:
        pytest.skip(f"{program[0]} does not work here")


def bound(store: Path, *arguments: object) -> Done:
    """Run the script as somebody whom permissions bind, which they do not for root."""
    if os.geteuid() != 0:
        return script(store, *arguments)
    require(*UNPRIVILEGED)
    return script(store, *arguments, prefix=UNPRIVILEGED)


@pytest.fixture
def sealed(root: Path, ids: dict[str, str]) -> Iterator[Callable[[int, int], None]]:
    """Sets the modes of the store's folders and files; pytest could not remove it like that."""

    def seal(folders: int, files: int) -> None:
        for path in [*root.rglob("*"), root]:
            path.chmod(folders if path.is_dir() else files)

    yield seal
    for folder, _, _ in os.walk(root):
        Path(folder).chmod(0o700)
    root.chmod(0o700)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_written(
    root: Path, ids: dict[str, str], sealed: Callable[[int, int], None], name: str
) -> None:
    sealed(0o500, 0o400)
    before = contents(root)

    done = bound(root, *COMMANDS[name].format(id=ids["reply"]).split())

    assert contents(root) == before
    if name in READERS:
        assert (done.status, done.err) == (0, "")
    else:
        assert (done.status, done.out) == (1, "")
        assert done.sentence


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_disk(root: Path, ids: dict[str, str], name: str) -> None:
    prefix = (*READ_ONLY_DISK, str(root))
    require(*prefix)
    before = contents(root)

    done = script(root, *COMMANDS[name].format(id=ids["reply"]).split(), prefix=prefix)

    assert contents(root) == before
    if name in READERS:
        assert (done.status, done.err) == (0, "")
    else:
        assert (done.status, done.out) == (1, "")
        assert "Read-only file system" in done.sentence


@pytest.mark.parametrize("name", ["list", "show", "evict", "stats", "check", "gc"])
def test_a_folder_that_cannot_be_read(
    root: Path, ids: dict[str, str], sealed: Callable[[int, int], None], name: str
) -> None:
    sealed(0o000, 0o000)

    done = bound(root, *COMMANDS[name].format(id=ids["reply"]).split())

    assert done.status == 1
    assert "cannot be read" in done.sentence


def test_blobs_that_cannot_be_read_are_problems(root: Path, ids: dict[str, str]) -> None:
    next(iter((root / "blobs").glob("*/*"))).chmod(0)

    done = bound(root, "check", "--read-data")

    assert done.status == 1
    assert done.out.count("damaged") == 1
    assert "Permission denied" in done.out


@pytest.mark.parametrize("line", ["--version", "list", "stats --json", "show 0123456789abcdef"])
@pytest.mark.usefixtures("ids")
def test_status_does_not_depend_on_a_closed_standard_error(root: Path, line: str) -> None:
    command = [str(SCRIPT), "--store", str(root), *line.split()]
    plain = subprocess.run(command, capture_output=True, text=True)

    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True
    )

    def settled(output: str) -> str:
        """Without numbers: ages grow from one run to the next, and others use the disk, too."""
        output = re.sub(r"\bnow\b", "0 s", output)
        return re.sub(r"\s+", " ", re.sub(r"[\d.]+", "0", output))

    assert closed.returncode == plain.returncode
    assert settled(closed.stdout) == settled(plain.stdout)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["list", "gc", "repair"])
def test_what_is_no_file_in_the_place_of_the_index_is_named(
    root: Path, ids: dict[str, str], name: str, make: Callable[[Path], None]
) -> None:
    """A pipe would have the command wait for ever."""
    index = root / "data.mdb"
    index.unlink()
    make(index)

    done = script(root, *COMMANDS[name].format(id=ids["system"]).split(), timeout=60)

    assert done.status == 1
    assert done.sentence == f"Error: {index} is not a file; move it away."
    assert index.exists()


def test_profiler_can_write_what_it_found(root: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.prof"
    subprocess.run(
        f"{sys.executable} -m cProfile -o {found} -m persist_cache_cli --store {root} list".split(),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    assert found.stat().st_size > 0


def test_an_option_without_its_value_points_to_the_help_of_its_command(run: Run) -> None:
    for words in (("evict", "--group"), ("list", "--tier"), ("ttl", "3fa2b1", "--group")):
        assert run(*words).err.endswith(f" See `persist-cache {words[0]} --help`.\n"), words
