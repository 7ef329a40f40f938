"""mlx-lm's own tests, of the installed version, from the source distribution on PyPI.

They are fetched rather than copied, so that a new mlx-lm is met by its own expectations.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import platformdirs

TESTS_VARIABLE = "PERSIST_CACHE_UPSTREAM_TESTS"
"""Environment variable: the `tests` folder of an mlx-lm checkout, used instead of PyPI's."""

DOWNLOAD_TIMEOUT_S = 300

UNREACHABLE = (
    "ConnectionError",
    "ConnectTimeout",
    "NewConnectionError",
    "ProtocolError",
    "ProxyError",
    "ReadTimeout",
    "SSLError",
    "Failed to establish a new connection",
    "Failed to fetch",
    "Name or service not known",
    "Temporary failure in name resolution",
    "connection broken by",
    "dns error",
    "timed out",
)
"""What pip and uv print when there is no network, as against no such file."""


class UpstreamUnavailableError(Exception):
    """PyPI cannot be reached, and no earlier download is there."""


@dataclass(frozen=True)
class Case:
    """One upstream test method.

    Attributes:
        file: Name of the test file, such as `test_server.py`.
        class_name: The `unittest.TestCase` in it.
        method: The test.
    """

    file: str
    class_name: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.class_name}.{self.method}"


@cache
def tests_folder() -> Path:
    """Return a folder with the tests of the installed mlx-lm, downloading them once.

    Raises:
        UpstreamUnavailableError: PyPI cannot be reached.
        RuntimeError: it can, but the tests are not to be had.
    """
    given = os.environ.get(TESTS_VARIABLE)
    if given:
        return Path(given)
    version = importlib.metadata.version("mlx-lm")
    root = platformdirs.user_cache_path("persist-cache") / "test-sources"
    folder = root / f"mlx-lm-{version}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        archive = _download(version, Path(scratch))
        extracted = Path(scratch) / "tests"
        _extract_tests(archive, extracted)
        try:
            extracted.rename(folder)
        except OSError:
            # Another test run was faster.
            if not folder.is_dir():
                raise
    return folder


def cases_using(names: set[str]) -> list[Case]:
    """List the upstream tests whose class mentions one of `names`.

    Read from the source: nothing is imported, so collecting tests stays cheap.
    """
    found = []
    for path in sorted(tests_folder().glob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        if not any(name in source for name in names):
            continue
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ClassDef):
                continue
            mentioned = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            if mentioned & names:
                found += [
                    Case(path.name, node.name, part.name)
                    for part in node.body
                    if isinstance(part, ast.FunctionDef) and part.name.startswith("test")
                ]
    return found


@cache
def load_module(file: str) -> ModuleType:
    """Execute an upstream test file as a module of its own."""
    path = tests_folder() / file
    spec = importlib.util.spec_from_file_location(f"mlx_lm_upstream_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_case(module: ModuleType, case: Case) -> unittest.TestResult:
    """Run one test by itself, with the set-up and tear-down of its class."""
    result = unittest.TestResult()
    test_class: Callable[[str], unittest.TestCase] = getattr(module, case.class_name)
    unittest.TestSuite([test_class(case.method)]).run(result)
    return result


def local_load(model_dir: Path) -> Callable[..., Any]:
    """Return a `mlx_lm.load` that opens `model_dir`, whichever model is asked for."""
    from mlx_lm.utils import load

    def load_local(path_or_hf_repo: str, *args: Any, **kwargs: Any) -> Any:
        return load(str(model_dir), *args, **kwargs)

    return load_local


def _download(version: str, folder: Path) -> Path:
    command = [
        *_pip(),
        "download",
        "--no-deps",
        "--no-binary=mlx-lm",
        "--retries=1",
        f"--dest={folder}",
        f"mlx-lm=={version}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise UpstreamUnavailableError(
            f"PyPI did not deliver mlx-lm {version} within {DOWNLOAD_TIMEOUT_S} s"
        ) from error
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode == 0 and archives:
        return archives[0]
    output = f"{done.stdout}\n{done.stderr}"
    if any(sign in output for sign in UNREACHABLE):
        raise UpstreamUnavailableError(f"PyPI cannot be reached for the tests of mlx-lm {version}")
    raise RuntimeError(
        f"no source distribution of mlx-lm {version}; set {TESTS_VARIABLE} to the tests of a "
        f"checkout, or look into this:\n{output}"
    )


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    # Environments made by uv have no pip.
    uv = shutil.which("uv")
    if uv:
        return [uv, "tool", "run", f"--python={sys.executable}", "pip"]
    raise RuntimeError(
        f"neither pip nor uv is here to fetch mlx-lm's tests: install one, or set {TESTS_VARIABLE}"
    )


def _extract_tests(archive: Path, folder: Path) -> None:
    """Copy `*/tests/*.py` out of `archive`, by content: no path or link of it is followed."""
    folder.mkdir()
    with tarfile.open(archive) as sdist:
        for member in sdist:
            parts = Path(member.name).parts
            if member.isfile() and parts[1:-1] == ("tests",) and parts[-1].endswith(".py"):
                source = sdist.extractfile(member)
                assert source is not None
                (folder / parts[-1]).write_bytes(source.read())
    if not any(folder.iterdir()):
        raise RuntimeError(f"{archive.name} holds no tests folder")
