"""What users get is complete: types in the wheel, and in each script's .venv what it imports."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDERS = {"persist_cache_cli": ROOT / "cli" / "persist_cache_cli"}
"""Packages of ours that do not lie in the repository's folder itself."""
OURS = ("persist_cache", "persist_cache_cli", "scripts", "tests")
BENCHMARKS = sorted(
    path.stem
    for path in (ROOT / "scripts" / "benchmarks").glob("*.py")
    if "\ndef run(context" in path.read_text()
)
SCRIPTS = sorted(
    path for path in (ROOT / "scripts").iterdir() if path.is_file() and path.name[0] != "_"
)

CONSUMER = """
from collections.abc import Sequence

from persist_cache import Entry, Fingerprint, Match, PromptCache, Store, Tier
from persist_cache.errors import StoreError
from persist_cache_cli import __name__ as cli


def longest(path: str, model: Fingerprint, tokens: Sequence[int]) -> int:
    try:
        with Store.open(path, read_only=True) as store:
            match: Match = store.match(model, tokens)
            entries: list[Entry] = store.entries()
            system = [one for one in entries if one.tier is Tier.SYSTEM]
            return match.num_tokens + len(system) + len(cli)
    except StoreError:
        return 0


def keep(cache: PromptCache, tokens: list[int]) -> str:
    cache.fetch_nearest_cache(("model", None, None), tokens)
    reveal_type(cache.last_fetch.num_tokens)
    return cache.disk_off
"""


BEHIND = ("mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub", "rich", "requests")
"""Packages that ours are made with and show nothing of; to read them takes mypy half a minute."""


# ---- types -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_wheel_says_that_both_packages_are_typed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        classifiers = archive.read(next(one for one in names if one.endswith("/METADATA")))

    assert b"Typing :: Typed" in classifiers
    assert {"persist_cache/py.typed", "persist_cache_cli/py.typed"} <= names
    assert "persist_cache/server/page/page.html" in names


@pytest.mark.long
@pytest.mark.parametrize("behind", [BEHIND, ()])
def test_strict_program_is_checked_against_the_installed_wheel(
    wheel: Path, tmp_path: Path, behind: tuple[str, ...]
) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # What the wheel needs; our own editable install lies in a .pth file there, which is not read.
    (packages / "needed.pth").write_text(f"{site.getsitepackages()[0]}\n")
    program = tmp_path / "program.py"
    program.write_text(CONSUMER)
    config = tmp_path / "mypy.ini"
    sections = [f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in behind]
    config.write_text("".join(["[mypy]\n", *sections]))

    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--no-incremental"),
            *("--config-file", str(config), "--python-executable", str(python), str(program)),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert 'Revealed type is "int"' in done.stdout.replace("builtins.", ""), done.stdout
    assert "Success: no issues found" in done.stdout, done.stdout
    assert done.returncode == 0


# ---- scripts ---------------------------------------------------------------------------------


@cache
def pyproject() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def profile_of(script: Path) -> str:
    """The profile that a script asks `_venv` for."""
    found = re.findall(r'^\. .*/_venv" (\w+)$', script.read_text(), re.MULTILINE)
    assert len(found) == 1, f"{script.name} must set up .venv by `_venv`, once"
    return str(found[0])


def programs_of(script: Path) -> set[str]:
    """Modules that a script runs with `python -m` or by a console script, as far as in Python."""
    text = script.read_text()
    modules = set(re.findall(r'\$venv_python" -m ([\w.]+)', text))
    if ".venv/bin/persist-cache" in text:
        modules.add("persist_cache_cli.commands.demo")
    if "scripts.benchmarks" in modules:
        modules |= {f"scripts.benchmarks.{name}" for name in (*BENCHMARKS, "table")}
    if "pytest" in modules:
        modules |= {f"tests.{path.stem}" for path in (ROOT / "tests").glob("*.py")}
    return modules


def source_of(module: str) -> Path | None:
    """The file of one of our modules, None for a name that is no module."""
    top, *rest = module.split(".")
    base = FOLDERS.get(top, ROOT / top).joinpath(*rest)
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.exists():
            return path
    return None


@cache
def imports_of(path: Path, package: str) -> tuple[str, ...]:
    """Dotted names that a file imports anywhere, those for type checkers only left out."""
    return tuple(_imports_of(path, package))


def _imports_of(path: Path, package: str) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            yield from (f"{base}.{one.name}" for one in node.names)


def reached_from(start: set[str], files: set[Path]) -> dict[str, str]:
    """Third-party packages that are imported by these modules and by all of ours below them.

    Returns:
        By name of the package a file that imports it.
    """
    found: dict[str, str] = {}
    queue, seen = [(path, "") for path in files], set(files)

    def enqueue(module: str) -> None:
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            path = source_of(name)
            if path is not None and path not in seen:
                seen.add(path)
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                queue.append((path, package))

    for module in start:
        enqueue(module)
        if module == "scripts.benchmarks" or source_of(module + ".__main__"):
            enqueue(module + ".__main__")
    while queue:
        path, package = queue.pop()
        for name in imports_of(path, package):
            top = name.partition(".")[0]
            if top in OURS:
                enqueue(name)
            elif top not in sys.stdlib_module_names:
                found.setdefault(top, str(path.relative_to(ROOT)))
    return found


@cache
def distributions_by_module() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def optional(extra: str) -> set[str]:
    """What an extra of ours asks for, which only those modules import that say it is missing."""
    project = pyproject()["project"]
    assert isinstance(project, dict)
    return {
        canonicalize_name(Requirement(one).name) for one in project["optional-dependencies"][extra]
    }


@cache
def distributions_of(profile: str) -> set[str]:
    """What pip installs for a profile: what is asked for, and all that needs."""
    said = pyproject()
    project, groups = said["project"], said["dependency-groups"]
    assert isinstance(project, dict)
    assert isinstance(groups, dict)
    wanted = [Requirement(one) for one in project["dependencies"]]
    if profile != "runtime":
        wanted += [Requirement(one) for one in groups[profile]]
    found: set[tuple[str, str]] = set()
    while wanted:
        one = wanted.pop()
        extras = ["", *one.extras]
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        for extra in extras:
            key = (canonicalize_name(one.name), extra)
            if key in found:
                continue
            found.add(key)
            try:
                needed = importlib.metadata.requires(one.name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # of another profile than this environment; its own needs are its own
            for text in needed:
                requirement = Requirement(text)
                marker = requirement.marker
                if marker is None or marker.evaluate({"extra": extra}):
                    requirement.marker = None
                    wanted.append(requirement)
    return {name for name, _ in found}


def missing(profile: str, modules: set[str], files: set[Path]) -> dict[str, str]:
    provided = distributions_of(profile)
    if profile in ("runtime", "fuzz"):
        # Nothing there asks for a remote, without which the program works.
        provided |= optional("remote")
    by_module = distributions_by_module()
    return {
        module: importer
        for module, importer in reached_from(modules, files).items()
        if provided.isdisjoint(
            canonicalize_name(one) for one in (module, *by_module.get(module, ()))
        )
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.name))
def test_script_installs_all_that_it_imports(script: Path) -> None:
    files = {script} if "\nimport " in script.read_text() else set()
    modules = {one for one in programs_of(script) if one.partition(".")[0] in OURS}

    assert missing(profile_of(script), modules, files) == {}


@pytest.mark.parametrize("name", [*BENCHMARKS, "table"])
def test_benchmark_installs_all_that_it_imports(name: str) -> None:
    assert missing("bench", {"scripts.benchmarks", f"scripts.benchmarks.{name}"}, set()) == {}


def test_every_benchmark_is_looked_at() -> None:
    said = (ROOT / "scripts" / "benchmarks" / "__main__.py").read_text()

    assert {"restore", "stall", "peers"} <= set(BENCHMARKS)
    assert all(f'"{name}"' in said for name in BENCHMARKS)


def test_search_finds_what_a_group_lacks() -> None:
    lacking = missing("runtime", {"tests.test_packaging", "tests.server_process"}, set())

    assert lacking["requests"] == "tests/server_process.py"
    assert "pytest" in lacking
    assert {"mlx", "click", "numpy", "transformers"}.isdisjoint(
        missing("runtime", set(OURS), set())
    )
