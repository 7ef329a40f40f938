"""`selftest`: green here, and every check goes red on something deliberately broken."""

from __future__ import annotations

import getpass
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from persist_cache.selftest import CHECKS, Outcome, as_json, meaning, run, verdict
from persist_cache.selftest import machine as machine_checks
from persist_cache.selftest.checks import Check, Failed, Setting, Verdict, find, without_names
from persist_cache.selftest.machine import Facts, unsupported
from persist_cache.selftest.words import MEANINGS
from persist_cache.store import exclusion
from persist_cache.system import volumes
from persist_cache.system.mounts import Mounts
from tests.cli import Run, runner
from tests.test_exclusion import Attributes
from tests.test_volumes import Mac
from tests.waiting import until

ROOT = Path(__file__).parent.parent
NEEDS_DISK = ("read-ahead", "read-speed")

BROKEN: dict[str, tuple[str, str, str]] = {
    "a package is missing": (
        "platform",
        """
import importlib.metadata as m
version = m.version
def broken(name):
    if name == "lmdb":
        raise m.PackageNotFoundError(name)
    return version(name)
m.version = broken
""",
        "not installed: lmdb",
    ),
    "writev takes the wrong bytes": (
        "bytes",
        """
import os
writev = os.writev
os.writev = lambda fd, buffers: writev(fd, [bytes(one)[::-1] for one in buffers])
""",
        "wrote other bytes",
    ),
    "preadv reads zeros": (
        "bytes",
        """
import os
def preadv(fd, buffers, offset):
    return os.lseek(fd, 0, os.SEEK_END) - offset and sum(map(len, buffers))
os.preadv = preadv
""",
        "read other bytes",
    ),
    "a sync fails": (
        "sync",
        """
import os
def fsync(fd):
    raise OSError(5, "Input/output error")
os.fsync = fsync
""",
        "Input/output error",
    ),
    "unlinked blocks stay taken": (
        "space",
        "from persist_cache import fs; fs.free_bytes = lambda path: 1 << 40",
        "a snapshot holds it",
    ),
    "advice is not taken": (
        "read-ahead",
        "from persist_cache import fs; fs.read_ahead = lambda path: 0",
        "after the advice",
    ),
    "the page cache is not left out": (
        "read-speed",
        "from persist_cache import fs; fs.drop_cache = lambda fd: None",
        "what is measured would be memory",
    ),
    "pages have another size": (
        "index",
        "import mmap; mmap.PAGESIZE = 16384",
        "pages of 4096 bytes",
    ),
    "locks are of another kind": (
        "index",
        """
import contextlib
from persist_cache.index.environment import Index
class Others:
    def __getattr__(self, name):
        return contextlib.nullcontext
Index.semaphores = property(lambda self: Others(), lambda self, value: None)
""",
        "LMDB was expected to use",
    ),
    "the commit's number is elsewhere": (
        "index",
        """
from persist_cache.store.store import Store
commit_id = Store.commit_id
Store.commit_id = lambda self: commit_id(self) + 1000
""",
        "where the number of the last commit",
    ),
    "a kill leaves others waiting": (
        "kills",
        """
import time
from persist_cache import fs
lock = fs.lock
def slow(fd, patience_s):
    time.sleep(2.5)
    return lock(fd, patience_s)
fs.lock = slow
""",
        "a put waited",
    ),
    "what was acknowledged is not there": (
        "kills",
        """
from persist_cache.store.put import Insertion, PutResult
Insertion.run = lambda self: PutResult("0" * 16, 0, 0)
""",
        "commits were lost",
    ),
    "an opener finds something half made": (
        "opens",
        """
from persist_cache.errors import StoreError
from persist_cache.store.store import Store
opened = Store.open
times = 0
def flaky(*arguments, **options):
    global times
    times += 1
    if times == 5:
        raise StoreError("its semaphores are missing")
    return opened(*arguments, **options)
Store.open = flaky
""",
        "its semaphores are missing",
    ),
    "the index grows by more than is reserved": (
        "growth",
        "from persist_cache.store import budget; budget._INDEX_SLACK_PAGES = 0",
        "a put of",
    ),
    "du counts more than the store says": (
        "growth",
        """
from persist_cache import fs
disk_bytes = fs.disk_bytes
fs.disk_bytes = lambda path: disk_bytes(path) // 2
""",
        "du counts",
    ),
    "flock keeps nobody out": (
        "locks",
        "import fcntl; fcntl.flock = lambda fd, kind: None",
        "given away a second time",
    ),
    "a forked child keeps its parent's locks": (
        "locks",
        "from persist_cache.system import forked; forked.register = lambda one: None",
        "still held",
    ),
    "a byte changes on the way from the disk": (
        "caches",
        """
from persist_cache import fs
read_into = fs.read_into
def flipped(fd, offset, buffers):
    count = read_into(fd, offset, buffers)
    if count > 20_000:
        buffers[0][0] ^= 1
    return count
fs.read_into = flipped
""",
        "was not",
    ),
    "a restored cache goes on differently": (
        "caches",
        """
from persist_cache.cache.prompt_cache import PromptCache
fetch = PromptCache.fetch_nearest_cache
def nudged(self, model, tokens):
    cache, rest = fetch(self, model, tokens)
    if model == "KVCache-f16":
        cache[0].keys = cache[0].keys * 1.01
    return cache, rest
PromptCache.fetch_nearest_cache = nudged
""",
        "KVCache-f16: a restored cache continued differently",
    ),
    "the writer sees other bytes": (
        "writer",
        """
from persist_cache import fs
write_all = fs.write_all
def flipped(fd, buffers):
    copies = [bytearray(one) for one in buffers]
    if sum(map(len, copies)) > 100_000:
        copies[-1][-1] ^= 1
    return write_all(fd, [memoryview(one) for one in copies])
fs.write_all = flipped
""",
        "is damaged",
    ),
    "decoding is disturbed": (
        "writer",
        """
from mlx_lm.models.cache import KVCache
from persist_cache import fs
write_all, update = fs.write_all, KVCache.update_and_fetch
written = []
def noted(fd, buffers):
    written.append(fd)
    return write_all(fd, buffers)
def disturbed(self, keys, values):
    return update(self, keys * 1.01 if written else keys, values)
fs.write_all, KVCache.update_and_fetch = noted, disturbed
""",
        "differs from what is decoded alone",
    ),
    "a thread's bytes do not arrive": (
        "arrays",
        """
from persist_cache.tensors import pool
run = pool.run
pool.run = lambda tasks, num_threads: run(list(tasks)[1:], num_threads)
""",
        "the device saw other bytes",
    ),
    "the server looks its own name up": (
        "names",
        """
import socket, time
from http.server import HTTPServer
from persist_cache.server.listening import NamelessServer
NamelessServer.server_bind = HTTPServer.server_bind
def getfqdn(name=""):
    time.sleep(1.5)
    return name
socket.getfqdn = getfqdn
""",
        "to bind to its port",
    ),
    "SIGTERM saves nothing": (
        "sigterm",
        """
from persist_cache.cache.prompt_cache import PromptCache
PromptCache.flush = lambda self, timeout_s=None: True
PromptCache.close = lambda self, timeout_s=None: True
""",
        "is not on disk",
    ),
    "SIGTERM is not heard": (
        "sigterm",
        """
import signal
from persist_cache.selftest import serving
serving._STOP_LIMIT_S = 3.0
set_signal = signal.signal
signal.signal = lambda number, handler: set_signal(
    number, signal.SIG_IGN if number == signal.SIGTERM else handler
)
""",
        "did not end within",
    ),
    "a restarted server finds nothing": (
        "restart",
        """
import os
from persist_cache.fingerprint.value import Fingerprint
made = Fingerprint.from_fields
def anew(fields, *more):
    return made({**fields, "start": str(os.getpid())}, *more)
Fingerprint.from_fields = anew
""",
        "nothing was restored",
    ),
    "a restarted server goes on differently": (
        "restart",
        """
from persist_cache.tensors import pool
pool.run = lambda tasks, num_threads: None
""",
        "answered differently",
    ),
    "the model does not leave memory": (
        "unload",
        """
from persist_cache.selftest import restarting
restarting._SAVE_LIMIT_S = 3.0
serving = restarting.serving
restarting.serving = lambda folder, *flags: serving(folder)
""",
        "did not leave memory",
    ),
    "what comes back is not the same": (
        "unload",
        """
from persist_cache.tensors import pool
pool.run = lambda tasks, num_threads: None
""",
        "answered differently",
    ),
    "nothing is evicted on a full disk": (
        "full-disk",
        """
from persist_cache.errors import StoreFullError
from persist_cache.store.store import Store
def evict(self, *arguments, **options):
    raise StoreFullError("no block is free")
Store.evict = evict
""",
        "nothing could be evicted",
    ),
    "a full disk costs what is stored": (
        "full-disk",
        """
from persist_cache.selftest import small_disk
fill = small_disk._fill
def damaging(path):
    fill(path)
    for blob in path.parent.rglob("*.safetensors"):
        blob.chmod(0o600)
        blob.write_bytes(b"")
small_disk._fill = damaging
""",
        "came back",
    ),
    "backups are not told": (
        "backups",
        "from persist_cache.store import opening; opening.TAG_FILE = 'OTHER.TAG'",
        "no CACHEDIR.TAG",
    ),
    "mlx-lm cannot be imported": (
        "descriptors",
        """
import resource
def setrlimit(which, limits):
    raise ValueError("not allowed to raise maximum limit")
resource.setrlimit = setrlimit
""",
        "not allowed to raise maximum limit",
    ),
    "few files may be open": (
        "descriptors",
        """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
resource.setrlimit = lambda which, limits: None
""",
        "files may be open at once",
    ),
    "a check crashes": (
        "arrays",
        "import os; from persist_cache.selftest import checks; checks.find = lambda _: os.abort()",
        "ended by SIGABRT",
    ),
}
"""What is broken: the check that has to say so, what breaks it, and a part of what it says.

The check `semaphores` is broken in the Darwin lane: here there are none.
"""


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A folder that is not in memory."""
    if Mounts().kind(ROOT) in ("tmpfs", "ramfs"):
        pytest.skip("NO DISK: this checkout lies in memory, where nothing leaves the page cache")
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".selftest-") as folder:
        yield Path(folder)


def outcome(name: str, place: Path, limit_s: float = 120.0) -> Outcome:
    check = find(name)
    (found,) = run(place, [Check(name, check.area, check.function, limit_s)], quick=True)
    assert list(place.iterdir()) == []
    return found


@pytest.fixture
def break_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have every Python that is started from now on run some code first."""

    def install(code: str) -> None:
        shim = tmp_path / "shim"
        shim.mkdir()
        (shim / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(shim))

    return install


SOON = {"backups", "bytes", "index", "locks", "names", "platform", "space", "sync"}
"""Checks that turn red in a moment; the others are seen to by `scripts/test --all`."""


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=[] if check in SOON else [pytest.mark.long])
        for what, (check, _, _) in BROKEN.items()
    ],
)
def test_a_check_goes_red(
    what: str,
    tmp_path: Path,
    break_it: Callable[[str], None],
    request: pytest.FixtureRequest,
) -> None:
    name, code, says = BROKEN[what]
    place = tmp_path / "place"
    place.mkdir()
    if name in NEEDS_DISK:
        place = request.getfixturevalue("on_disk")
    break_it(code)

    found = outcome(name, place)

    assert found.verdict == "FAILED", found
    assert says in found.line


def test_what_each_check_means_is_said_when_it_fails() -> None:
    assert set(MEANINGS) == {check.name for check in CHECKS}
    for check in CHECKS:
        assert meaning(Outcome(check.name, "FAILED", "x")).endswith((".", ")."))
        assert meaning(Outcome(check.name, "ok", "x")) == ""


@pytest.mark.parametrize(
    ("verdicts", "says"),
    [
        (["ok", "ok"], "Nothing is wrong. All 2 checks passed."),
        (["ok"], "Nothing is wrong. The check passed."),
        (["ok", "not applicable"], "Nothing is wrong. The check passed. Not applicable here: b."),
        (["not applicable"], "Nothing was checked. Not applicable here: a."),
        (["FAILED", "ok", "not applicable"], "1 check failed: a. Not applicable here: c."),
        (["FAILED", "FAILED"], "2 checks failed: a, b."),
    ],
)
def test_all_of_it_is_put_in_words(verdicts: list[Verdict], says: str) -> None:
    outcomes = [Outcome(name, one, "x") for name, one in zip("abc", verdicts, strict=False)]

    assert verdict(outcomes) == says


def test_what_was_not_done_is_said() -> None:
    passed = [Outcome("a", "ok", "x")]

    assert verdict(passed, left_out=2).endswith("The check passed. 2 other checks were not run.")
    assert "leave out --quick for all" in verdict(passed, quick=True)
    assert "quick" not in verdict(passed)


LATER = {"caches", "sigterm"}
"""Checks that take long: by `scripts/test --all`, and the second one as on a Mac."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(check.name, marks=[pytest.mark.long] if check.name in LATER else [])
        for check in CHECKS
    ],
)
def test_a_check_is_green_here(name: str, on_disk: Path) -> None:
    found = outcome(name, on_disk)

    assert found.verdict != "FAILED", found
    assert found.line


def test_all_checks_can_go_red_but_those_of_the_darwin_lane() -> None:
    assert {check.name for check in CHECKS} - {one[0] for one in BROKEN.values()} == {"semaphores"}


def test_a_check_that_hangs_is_red_and_ends(
    tmp_path: Path, break_it: Callable[[str], None]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    break_it("from persist_cache import fs; import signal; fs.create = lambda path: signal.pause()")

    found = outcome("sync", place, limit_s=3)

    assert found.verdict == "FAILED"
    assert "hangs" in found.line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, ""),
        ({"macos": "13.6.1"}, "macOS 13.6.1 is too old"),
        ({"macos": "26.0"}, ""),
        ({"macos": ""}, "too old"),
        ({"translated": True}, "native arm64"),
        ({"machine": "x86_64"}, "native arm64"),
        ({"python": (3, 10)}, "Python 3.10 is too old"),
        ({"system": "Windows"}, "neither macOS nor Linux"),
        ({"missing": ("mlx",)}, "not installed: mlx"),
        ({"system": "Linux", "machine": "x86_64", "macos": ""}, ""),
    ],
)
def test_which_machines_are_supported(changes: dict[str, object], says: str) -> None:
    plain = Facts("Darwin", "arm64", "14.0", False, (3, 12), ())

    said = unsupported(plain._replace(**changes))  # type: ignore[arg-type]

    assert says in said
    assert bool(said) == bool(says)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [("", ""), ("attribute", "attribute"), ("spotlight", "never_index"), ("tmutil", "tmutil")],
)
def test_the_marks_for_backups_are_looked_at_on_a_mac(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, says: str
) -> None:
    Mac(monkeypatch)
    attributes = Attributes()
    monkeypatch.setattr(exclusion, "_attribute", attributes.ask)
    if trouble != "attribute":
        monkeypatch.setattr(exclusion, "_set_attribute", attributes.set)
    included = "[Included]" if trouble == "tmutil" else "[Excluded]"
    monkeypatch.setattr(machine_checks, "_time_machine", lambda root: f"{included} {root}")
    if trouble == "spotlight":
        monkeypatch.setattr(exclusion, "exclude", lambda folder: None)

    if not says:
        assert machine_checks.backups_leave_it_out(Setting(tmp_path)).numbers["tmutil"] is True
        return
    with pytest.raises(Failed, match=says):
        machine_checks.backups_leave_it_out(Setting(tmp_path))
    assert volumes.DARWIN


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_stays_when_it_is_interrupted(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "persist_cache_cli", "selftest", "--only", "kills"]
    process = subprocess.Popen(
        [*command, "--dir", str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    until(lambda: list(tmp_path.glob("*/kills/store/blobs/*/*")))
    (folder,) = tmp_path.iterdir()

    process.send_signal(number)

    assert process.wait(30) == {2: 130, 15: 143, 1: 129}[number]
    assert list(tmp_path.iterdir()) == []
    assert not _processes_in(folder)


def _processes_in(folder: Path) -> list[str]:
    """Processes that were told of a folder."""
    done = subprocess.run(["ps", "axww", "-o", "command"], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if str(folder) in line]


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(tmp_path / "home" / "store", capfd)


def test_a_line_and_a_verdict_each(command: Run, tmp_path: Path) -> None:
    report = tmp_path / "report.json"

    done = command("selftest", "--quick", "--only", "sync", "--only", "backups", "--json", report)

    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert [line.split(":")[0].split(maxsplit=1) for line in lines[:2]] == [
        ["sync", "ok"],
        ["backups", "not applicable"],
    ]
    said = "Nothing is wrong. The check passed. Not applicable here: backups. 20 other checks"
    assert lines[2].startswith(said)
    assert "quick run" in lines[2]
    said = json.loads(report.read_text())
    assert [one["name"] for one in said["checks"]] == ["sync", "backups"]
    assert said["ok"]
    assert not (tmp_path / "home").exists()


def test_no_word_is_broken_by_the_end_of_a_terminals_line(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persist_cache_cli.commands.selftest.terminal_width", lambda: 60)

    done = command("selftest", "--quick", "--only", "platform", "--only", "backups")

    lines = done.out.splitlines()
    assert lines[0].startswith("platform  ok: ")
    assert lines[1].startswith(" " * 10)
    assert len(lines) > 3
    assert max(map(len, lines)) <= 60


def test_a_red_check_is_named_and_in_the_exit_status(
    command: Run, tmp_path: Path, break_it: Callable[[str], None]
) -> None:
    break_it(BROKEN["a sync fails"][1])

    done = command("selftest", "--quick", "--only", "sync", "--json", "-")

    assert done.status == 1
    assert "1 check failed: sync." in done.err
    (check,) = json.loads(done.out)["checks"]
    assert check["verdict"] == "FAILED"


def test_the_report_holds_no_path_and_no_name() -> None:
    home, user, host = str(Path.home()), getpass.getuser(), socket.gethostname()
    line = (
        f"OSError: [Errno 2] No such file: '{home}/store/x' /Volumes/My/y {user}x "
        f"on {host}, (/private/tmp/z) 3.5 MiB/s, root"
    )

    text = json.dumps(
        as_json([Outcome("sync", "FAILED", line, {"a": line})], quick=False, place=Path.cwd())
    )

    for part in (f"{home}/", "Volumes", "private", "tmp/z", f"on {host},"):
        assert part not in text
    assert "3.5 MiB/s" in text
    assert "No such file" in text


def test_the_report_holds_no_part_of_a_path_with_blanks_in_it(tmp_path: Path) -> None:
    """As disks on a Mac are called."""
    place = tmp_path / "My Disk" / "Ann's «secret» plans"
    place.mkdir(parents=True)
    told = [
        Outcome("sync", "FAILED", f"{place}/x/store cannot be used", {"a": f"in {place}"}),
        Outcome("sync", "FAILED", str(OSError(2, "No such file", str(place / "x")))),
    ]

    text = json.dumps(as_json(told, quick=True, place=place), ensure_ascii=False)

    for part in ("My", "Disk", "Ann", "secret", "plans"):
        assert part not in text
    assert "<path> cannot be used" in text


def test_the_names_of_user_and_machine_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "ann")
    monkeypatch.setattr(socket, "gethostname", lambda: "anns-mac.local")

    said = without_names("ann's disk on anns-mac.local, an annex of Ann: anns-mac")

    assert said == "<name>'s disk on <name>, an annex of Ann: <name>"


def test_a_folder_that_is_not_there_is_a_sentence(command: Run, tmp_path: Path) -> None:
    done = command("selftest", "--dir", tmp_path / "missing")

    assert done.status == 2
    assert done.err.count("\n") == 1
    assert os.fspath(tmp_path / "missing") in done.err


def test_a_report_that_cannot_be_written_is_said_at_once(command: Run, tmp_path: Path) -> None:
    done = command("selftest", "--json", tmp_path / "missing" / "report.json")

    assert done.status == 1
    assert done.err.count("\n") == 1
    assert done.out == ""
