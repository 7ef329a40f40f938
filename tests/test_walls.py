"""The walls between the rooms of docs/design.md stand, and a breach of each is found.

`scripts/check` holds the imports against the contracts in pyproject.toml; here each contract is
broken on purpose in a copy. What the linter cannot see is looked for in the syntax trees.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINTER = Path(sys.executable).with_name("lint-imports")
CONTRACTS = [
    one["name"]
    for one in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
]
BREACHES = {
    "A room may use what stands below it, never what stands above or beside it": (
        ("store/evict.py", "from persist_cache.queries import totals"),
        ("queries/totals.py", "from persist_cache.cache import prompt_cache"),
        ("errors.py", "from persist_cache import fs"),
        ("blobs/rows.py", "from persist_cache.index import records"),
        ("bundle/reading.py", "from persist_cache import warm"),
        ("store/store.py", "def late() -> None:\n    from persist_cache.server import http"),
    ),
    "LMDB has one importer": (("store/opening.py", "import lmdb"),),
    "MLX is imported where tensors are made, and where a model runs": (
        ("cache/trie.py", "import mlx.core"),
    ),
    "The store knows bytes, never tensors": (
        ("store/put.py", "from persist_cache import tensors"),
        ("index/tree.py", "import mlx_lm"),
    ),
    "Commands and server see the store by its face": (
        ("server/metrics.py", "from persist_cache.index.environment import Index"),
    ),
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINTER, "--no-logo", "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": f"{folder}:{folder}/cli", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "persist_cache", tmp_path / "persist_cache", ignore=skip)
    shutil.copytree(ROOT / "cli/persist_cache_cli", tmp_path / "cli/persist_cache_cli", ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_walls_stand(copy: Path) -> None:
    done = lint(copy)

    assert done.returncode == 0, done.stdout
    assert f"{len(CONTRACTS)} kept, 0 broken" in done.stdout


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_breach_of_each_wall_is_found(copy: Path, contract: str) -> None:
    for place, line in BREACHES[contract]:
        path = copy / "persist_cache" / place
        sound = path.read_text()
        path.write_text(f"{sound}\n\n{line}\n")

        done = lint(copy)

        assert done.returncode == 1, (place, line)
        assert f"{contract} BROKEN" in " ".join(done.stdout.split()), (place, line)
        path.write_text(sound)


def modules() -> Iterator[tuple[str, ast.Module]]:
    for folder in (ROOT / "persist_cache", ROOT / "cli" / "persist_cache_cli"):
        for path in sorted(folder.rglob("*.py")):
            yield str(path.relative_to(folder.parent)), ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{one.name}" for one in node.names)


def test_mlx_lm_server_is_imported_by_one_module() -> None:
    importers = [
        name
        for name, tree in modules()
        if any(one.startswith("mlx_lm.server") for one in imported(tree))
    ]

    assert importers == ["persist_cache/server/upstream.py"]


def test_design_shows_the_rooms_and_nothing_else() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    tree = text.partition("\npersist_cache/\n")[2].partition("\ncli/")[0]
    drawn = {line[3:].split()[0].rstrip("/") for line in tree.splitlines()}
    there = {
        path.stem
        for path in (ROOT / "persist_cache").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }

    assert drawn == there - {"__init__"}


@pytest.mark.parametrize("page", ["walk.md", "design.md"])
def test_files_that_documents_name_are_there(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text))
    places = (ROOT, ROOT / "persist_cache")

    assert named
    assert [one for one in sorted(named) if not any((at / one).exists() for at in places)] == []


# ---- tests use public words --------------------------------------------------------------------

PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit", "_getframe"}
"""Names of the standard library that anybody may use."""
FORGES = {
    "tests/forge.py": "makes what only damage makes",
    "tests/torture/broken.py": "makes defects in the product, for the torture to find",
}
SEAMS = {
    "tests/test_docs.py": {"_idx"},
    "tests/test_first_look.py": {
        *("_answering", "_in_flight", "_generation_failed", "_generation_thread"),
        *("_tokenize", "_make_state_machine", "_serve_single"),
    },
    "tests/test_loads.py": {"_download"},
    "tests/test_rendering.py": {"_tokenize"},
    "tests/test_server_seam.py": {"_generate", "_serve_single"},
    "tests/test_tensors.py": {"_idx"},
}
"""Private parts of mlx-lm that the product uses or takes the place of, by the test that does."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def is_own(of: ast.expr) -> bool:
    """Whether it is `self`, `cls` or `super()`."""
    if isinstance(of, ast.Call):
        of = of.func
    return isinstance(of, ast.Name) and of.id in ("self", "cls", "super")


def private_parts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Private parts of other objects and modules that are used, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            for one in node.names:
                if is_private(one.name):
                    yield node.lineno, one.name


def test_private_parts_are_found() -> None:
    source = "a.b._c\nself._d\nself.e._f\nsuper()._g()\ns._replace(h=1)\nfrom i import _j, k\n"

    assert sorted(private_parts(ast.parse(source))) == [(1, "_c"), (3, "_f"), (6, "_j")]


def test_tests_reach_into_private_parts_in_their_forge_only() -> None:
    reaches = []
    used: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for line, part in private_parts(ast.parse(path.read_text())):
            used.setdefault(name, set()).add(part)
            if name not in FORGES and part not in SEAMS.get(name, ()):
                reaches.append(f"{name}:{line}: {part}")

    assert reaches == []
    assert {name: used.get(name) for name in SEAMS} == SEAMS, "an exception is not needed any more"


SLEEPERS = {
    "tests/waiting.py": "polls, with a deadline",
    "tests/server_process.py": "polls, with a deadline, while the process lives",
    "tests/test_page.py": "polls a page, whose errors mean that it is not there yet",
    "tests/test_upstream.py": "polls in the place of a look-up",
    "tests/test_tensors.py": "polls what the system counts; tasks of a pool that take their time",
    "tests/test_admin.py": "a survey that takes its time, which is what is measured",
    "tests/test_demo_model.py": "a conversion that takes its time, which others wait for",
    "tests/test_merge.py": "an answer that takes longer than idleness",
    "tests/test_server_disk.py": "a disk that stays away for several attempts",
    "tests/test_selftest.py": "intervals of the selftest",
}


def test_tests_sleep_where_time_itself_is_the_subject_only() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("*.py")
        if path.parent.name not in ("torture", "darwin")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "time.sleep"
    }

    assert found == set(SLEEPERS)
