"""What is released: one version, notes from the changelog, and a sentence for another mlx-lm."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlx_lm import server as upstream

import persist_cache
from persist_cache.doctor import facts, judgement
from persist_cache.errors import PersistCacheError
from persist_cache.fingerprint import versions
from persist_cache.server.upstream import seam
from persist_cache.server.upstream.seam import SEAM
from scripts.packages import smoke
from scripts.packages.notes import notes_of
from tests.cli import SCRIPT, Run, runner

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n- news\n\n## [1.0.0] - 2026-01-02\n\n- first\n"


def installed(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda name: version)


# ---- version -------------------------------------------------------------------------------------


def test_version_is_written_in_one_place() -> None:
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "persist_cache/__init__.py"
    assert importlib.metadata.version("persist-cache") == persist_cache.__version__


def test_pin_on_mlx_lm_is_the_one_that_is_checked() -> None:
    (pin,) = (one for one in PYPROJECT["project"]["dependencies"] if one.startswith("mlx-lm"))
    least, beyond = (".".join(map(str, one)) for one in versions.KNOWN_MLX_LM)

    assert pin == f"mlx-lm>={least},<{beyond}"


# ---- notes ---------------------------------------------------------------------------------------


def test_notes_are_the_section_of_the_version() -> None:
    assert notes_of(CHANGELOG, "1.0.0") == "- first\n"
    assert notes_of(CHANGELOG, "Unreleased") == "- news\n"
    assert notes_of((ROOT / "CHANGELOG.md").read_text(), "Unreleased").startswith("### ")


@pytest.mark.parametrize(
    ("text", "says"), [(CHANGELOG, "no section [2.0.0]"), ("## [2.0.0]\n\n", "is empty")]
)
def test_version_without_notes_is_refused(text: str, says: str) -> None:
    with pytest.raises(LookupError) as refused:
        notes_of(text, "2.0.0")

    assert says in str(refused.value)


# ---- trying it out -------------------------------------------------------------------------------


def test_every_python_that_is_tried_is_supported() -> None:
    prefix = "Programming Language :: Python :: "
    listed = {one.removeprefix(prefix) for one in PYPROJECT["project"]["classifiers"]}

    assert set(smoke.PYTHONS) <= listed
    assert smoke.version_of(sys.executable) == ".".join(map(str, sys.version_info[:2]))
    assert smoke.version_of("/no/such/python") == ""


def test_smoke_test_goes_red_on_another_version(tmp_path: Path) -> None:
    with pytest.raises(smoke.SmokeError, match=r"not 9\.9\.9"):
        smoke.use(SCRIPT.parent, {"HOME": str(tmp_path), "PATH": "/bin"}, tmp_path, "9.9.9")


def test_smoke_test_goes_red_on_a_command_that_fails(tmp_path: Path) -> None:
    (tmp_path / "persist-cache").write_text("#!/bin/sh\necho it broke >&2\nexit 4\n")
    (tmp_path / "persist-cache").chmod(0o755)

    with pytest.raises(smoke.SmokeError, match=r"ended with 4:\nit broke"):
        smoke.use(tmp_path, {"PATH": "/bin"}, tmp_path, "1")


# ---- another mlx-lm ------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.32.0", "0.32.2", "0.32.9.dev1", ""])
def test_known_mlx_lm_is_not_complained_of(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    installed(monkeypatch, version)

    assert versions.unknown_mlx_lm() == ""


@pytest.mark.parametrize("version", ["0.33.0", "0.31.3", "1.0", "main"])
def test_unknown_mlx_lm_is_told_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch, version: str, tmp_path: Path
) -> None:
    installed(monkeypatch, version)
    folder = facts.look_at_folder(tmp_path)
    limits = {"max_bytes": 1, "min_free_bytes": 0, "used_bytes": 0}

    said = versions.unknown_mlx_lm()
    packages = {"mlx": "1", "mlx-lm": version}
    found = list(judgement.judge(folder, limits=(-1, -1), packages=packages, **limits))

    assert f"mlx-lm {version} is installed" in said
    assert 'pip install "mlx-lm>=0.32,<0.33"' in said
    assert [one.level for one in found if said in one.message] == ["problem"]


def test_nothing_of_the_seam_has_moved() -> None:
    assert seam.moved(upstream) == []


def test_what_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "0.33.0")
    known = {path.partition(".")[0] for path in SEAM} - {"run"}
    other = SimpleNamespace(**{name: getattr(upstream, name) for name in known})
    other.TimeBudget = type("TimeBudget", (), {"__iter__": lambda self, more: None})

    with pytest.raises(PersistCacheError) as refused:
        seam.check(other)

    said = str(refused.value)
    assert "mlx_lm.server.run is gone" in said
    assert "mlx_lm.server.TimeBudget.__iter__ takes (self, more) instead of (self)" in said
    assert "mlx_lm.server.TimeBudget.__next__ is gone" in said
    assert "ModelProvider" not in said


def test_unknown_mlx_lm_that_moved_nothing_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed(monkeypatch, "0.33.0")

    seam.check(upstream)

    assert "mlx-lm 0.33.0 is installed" in caplog.text


def test_mlx_lm_that_cannot_be_built_on_ends_serve_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata, sys\n"
        "version = metadata.version\n"
        "metadata.version = lambda name: '0.33.0' if name == 'mlx-lm' else version(name)\n"
        "class Moved:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'mlx_lm.server':\n"
        "            raise ImportError('cannot import name BatchGenerator')\n"
        "sys.meta_path.insert(0, Moved())\n"
    )

    done = subprocess.run(
        [str(SCRIPT), "--store", str(tmp_path / "store"), "serve", "--model", "x"],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "mlx-lm 0.33.0 is installed" in done.stderr
    assert "cannot import name BatchGenerator" in done.stderr


def test_other_failures_are_not_blamed_on_mlx_lm(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from persist_cache_cli.commands import list as listing

    def fails(*_: object) -> None:
        raise AttributeError("ours")

    monkeypatch.setattr(listing, "reading", fails)
    run: Run = runner(tmp_path, capfd)

    with pytest.raises(AttributeError):
        run("list")


def test_what_is_tried_of_an_installation_holds_in_this_one(tmp_path: Path) -> None:
    """Else it would be seen at the next release only."""
    done = subprocess.run(
        [sys.executable, "-c", smoke.LIBRARY], cwd=tmp_path, capture_output=True, text=True
    )

    assert (done.returncode, done.stdout.strip()) == (0, persist_cache.__version__), done.stderr
