"""`doctor`: what it measures, what it finds wrong, and that it leaves everything as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store, fs
from persist_cache.doctor import facts, judgement
from persist_cache.doctor.facts import Folder, ModelCache
from persist_cache.doctor.judgement import Finding
from persist_cache.index.records import pack_counter
from persist_cache.tensors.live import LayerStatus
from tests import forge
from tests.cli import Run, contents, fill, runner, script
from tests.test_cli_docs import fields, section

PACKAGES = {"mlx": "1", "mlx-lm": "1"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def ids(root: Path) -> dict[str, str]:
    return fill(root)


@pytest.fixture
def run(root: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(root, capfd)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import build_model_dir

    return build_model_dir(tmp_path_factory.mktemp("model") / "tiny")


def problems(done: Any) -> list[str]:
    return [one["message"] for one in done.json["findings"] if one["level"] == "problem"]


def test_a_sound_store(root: Path, ids: dict[str, str], run: Run) -> None:
    before = contents(root)

    done = run("doctor")

    assert (done.status, done.err) == (0, "")
    assert done.out.endswith("Nothing is wrong.\n")
    for word in ("versions", "persist-cache 0.", "mode 0700", "5 entries", "a sync", "break-even"):
        assert word in done.out, word
    assert contents(root) == before


def test_json(ids: dict[str, str], run: Run) -> None:
    report = run("doctor", "--json").json

    assert set(report) == fields("doctor")
    assert report["ok"]
    assert report["versions"]["lmdb"]
    assert report["store"]["entries"] == 5
    assert report["store"]["mode"] == "0700"
    assert report["disk"]["write_bytes_per_s"] > 0
    (rate,) = report["break_even"]
    assert (rate["model"], rate["prefill_tokens_per_s"]) == ("org/model-w0", 10.0)
    assert rate["tokens"] >= 1
    for part in ("machine", "store", "disk", "open_files"):
        for name in report[part]:
            assert f"`{name}`" in section("doctor"), name


def test_without_a_store(root: Path, run: Run) -> None:
    done = run("doctor")
    report = run("doctor", "--json").json

    assert done.status == 0
    assert "not there yet" in done.out
    assert "break-even  unknown" in done.out
    assert (report["store"]["exists"], report["disk"], report["break_even"]) == (False, None, [])
    assert not root.exists()


def test_an_empty_store(root: Path, run: Run) -> None:
    Store.open(root, min_free_bytes=0).close()

    done = run("doctor")

    assert done.status == 0
    assert "break-even  unknown: no prefill was timed yet" in done.out


def test_a_model_whose_caches_can_be_stored(
    root: Path, ids: dict[str, str], run: Run, model: Path
) -> None:
    done = run("doctor", "--model", model)
    found = run("doctor", "--model", model, "--json").json["model"]

    assert done.status == 0, done.out
    assert "KVCache (rows)" in done.out
    assert found["storable"]
    assert len(found["fingerprint"]) == 64
    assert {(one["class"], one["storage"]) for one in found["layers"]} == {("KVCache", "rows")}
    for name in (*found, *found["layers"][0]):
        assert f"`{name}`" in section("doctor"), name


def test_a_model_whose_weights_do_not_fit(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"llama"', '"no_such_type"'))

    done = run("doctor", "--model", folder, "--json")

    assert done.status == 1
    (problem,) = problems(done)
    assert "no_such_type" in problem


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("doctor extra", 2, "extra"),
        ("doctor --nonsense", 2, "--nonsense"),
        ("doctor --kv-bits 99", 2, "--kv-bits"),
    ],
)
def test_bad_arguments(run: Run, line: str, status: int, says: str) -> None:
    done = run(*line.split())

    assert done.status == status
    assert says in done.sentence


def test_a_model_that_is_not_there(ids: dict[str, str], run: Run) -> None:
    done = run("doctor", "--model", "no/where", "--json")

    assert done.status == 1
    assert "not in the Hugging Face cache" in problems(done)[0]
    assert not done.json["model"]["storable"]


def test_somebody_elses_store(
    root: Path, ids: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: root.stat().st_uid + 1)
    before = contents(root)

    done = run("doctor", "--json")

    assert done.status == 1
    (problem,) = problems(done)
    assert "belongs to" in problem
    assert contents(root) == before


def test_a_file_instead_of_a_store(root: Path, run: Run) -> None:
    root.write_text("mine")

    done = run("doctor", "--json")

    assert done.status == 1
    assert problems(done) == [f"{root} is not a folder; use a folder of your own (--store PATH)."]
    assert root.read_text() == "mine"


def test_a_store_of_an_unknown_version(root: Path, ids: dict[str, str], run: Run) -> None:
    with Store.open(root) as store:
        forge.change(store, lambda txn: txn.set_meta("schema", pack_counter(99)))

    done = run("doctor")

    assert done.status == 1
    assert "schema version 99" in done.out


def test_a_disk_that_cannot_be_written(
    root: Path, ids: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(facts, "measure_disk", refuse)

    done = run("doctor", "-q")

    assert (done.status, done.out) == (1, "")
    assert "Read-only file system" in done.err
    assert done.err.count("\n") == 1


def test_too_little_free_space(root: Path, ids: dict[str, str], run: Run) -> None:
    Store.open(root, min_free_bytes=1 << 60).close()

    done = run("doctor", "--json")

    assert done.status == 1
    assert problems(done)[0].startswith("The disk is off: ")


def test_the_installed_script(root: Path, ids: dict[str, str]) -> None:
    done = script(root, "doctor")

    assert (done.status, done.err) == (0, "")


def test_the_probe_is_removed_even_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("persist_cache.fs.sync", refuse)

    with pytest.raises(OSError, match="No space"):
        facts.measure_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


def folder(**changes: Any) -> Folder:
    plain = {
        "path": "/s",
        "exists": True,
        "is_taken": False,
        "owner": "ann",
        "is_ours": True,
        "mode": 0o700,
        "writable": True,
        "file_system": "apfs",
        "free_bytes": 1 << 40,
        "total_bytes": 1 << 41,
    }
    return Folder(**{**plain, **changes})


def judge(
    place: Folder, limits: tuple[int, int] = (2048, -1), packages: dict[str, str] = PACKAGES
) -> list[Finding]:
    found = judgement.judge(
        place,
        limits=limits,
        packages=packages,
        max_bytes=32 << 30,
        min_free_bytes=2 << 30,
        used_bytes=0,
    )
    return list(found)


@pytest.mark.parametrize(
    ("place", "level", "says"),
    [
        (folder(is_ours=False), "problem", "belongs to ann"),
        (folder(writable=False), "problem", "cannot be written"),
        (folder(writable=False, exists=False), "problem", "The place for /s"),
        (folder(is_taken=True, exists=False), "problem", "not a folder"),
        (folder(mode=0o755), "note", "chmod 700 /s"),
        (folder(mode=0o777, file_system="exfat"), "note", "exfat keeps no permissions"),
        (folder(file_system="nfs4"), "problem", "use a local folder"),
        (folder(file_system="tmpfs"), "note", "restart"),
        (folder(free_bytes=1), "problem", "The disk is off"),
        (folder(free_bytes=9 << 30), "note", "cannot be used in full"),
    ],
)
def test_findings_about_the_folder(place: Folder, level: str, says: str) -> None:
    (finding,) = judge(place)

    assert finding.level == level
    assert says in finding.message
    assert finding.message.endswith(".")


def test_findings_about_the_rest() -> None:
    assert judge(folder()) == []
    assert [one.level for one in judge(folder(), packages={"mlx": "", "mlx-lm": "1"})] == ["note"]


def test_a_soft_limit_that_mlx_lm_raises_itself_is_no_finding() -> None:
    """A Mac has 256 of unlimited; `ulimit -n 2048` there would set the hard limit as well."""
    for limits in ((256, -1), (256, 4096), (1024, 1 << 20), (-1, -1)):
        assert judge(folder(), limits=limits) == [], limits


def test_a_hard_limit_that_mlx_lm_cannot_be_imported_under_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 501)

    (few,) = judge(folder(), limits=(2048, 2048))

    assert few.level == "problem"
    assert "mlx-lm" in few.message
    assert "4096" in few.message
    assert "2048" in few.message


IMPORT_UNDER = """
import os, resource, sys
from persist_cache.doctor import facts, judgement
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
if os.geteuid() == 0:
    os.setuid(65534)
found = judgement.judge_open_files(facts.open_files_limit())
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, facts.MLX_LM_OPEN_FILES)
    works = True
except ValueError:
    works = False
print(works, [one.level for one in found])
"""


@pytest.mark.parametrize(
    ("limits", "says"),
    [((256, 4096), "True []"), ((2048, 2048), "False ['problem']"), ((64, 4096), "True []")],
)
def test_what_is_said_of_open_files_is_what_the_kernel_does(
    limits: tuple[int, int], says: str
) -> None:
    soft, hard = map(str, limits)

    done = subprocess.run(
        [sys.executable, "-c", IMPORT_UNDER, soft, hard], capture_output=True, text=True
    )

    assert done.stdout.strip() == says, done.stderr


def test_the_limits_are_those_that_mlx_lm_sets() -> None:
    """Read in its source: importing it takes seconds and raises them in this process."""
    import importlib.util

    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = (Path(spec.submodule_search_locations[0]) / "utils.py").read_text()

    assert f"setrlimit(resource.RLIMIT_NOFILE, {facts.MLX_LM_OPEN_FILES})" in source


def test_the_probe_is_kept_out_of_the_page_cache_from_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS: F_NOCACHE set after the write leaves what was written in the cache."""
    steps: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            steps.append(name)
            return call(*arguments)

        return step

    for name in ("bypass_cache", "write_all", "read_into"):
        monkeypatch.setattr(fs, name, noted(name, getattr(fs, name)))

    facts.measure_disk(tmp_path)

    assert steps == ["bypass_cache", "write_all", "read_into"]


def test_a_cache_class_that_is_not_known_is_named() -> None:
    layers = (LayerStatus("KVCache", "rows"), LayerStatus("LayerCache", "unsupported"))
    found = ModelCache("m", "f" * 64, "", layers)

    (finding,) = judgement.judge_model(found)

    assert not found.storable
    assert "LayerCache cannot be saved" in finding.message
