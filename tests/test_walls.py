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
        ("stability/repairs.py", "from persist_cache import tokens"),
        ("codec.py", "from persist_cache.blobs.reader import BlobReader"),
        ("blobs/rows.py", "from persist_cache.index import records"),
        ("bundle/reading.py", "from persist_cache import warm"),
        ("store/store.py", "def late() -> None:\n    from persist_cache.server import http"),
        ("cache/prompt_cache.py", "from persist_cache import remote"),
        ("remote/remote.py", "from persist_cache import sharing"),
        ("sharing/behind.py", "from persist_cache.server import ticket"),
    ),
    "LMDB has one importer": (("store/opening.py", "import lmdb"),),
    "Each package of the extra `remote` has one importer": (
        ("remote/remote.py", "import obstore"),
        ("remote/manifest.py", "import cryptography"),
    ),
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


def test_mlx_lm_server_is_imported_by_one_package() -> None:
    importers = {
        Path(name).parent.as_posix()
        for name, tree in modules()
        if any(one.startswith("mlx_lm.server") for one in imported(tree))
    }

    assert importers == {"persist_cache/server/upstream"}


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


SEAM = {
    "_replace",
    "os._exit",
    "atexit._run_exitfuncs",
    "ResponseGenerator._tokenize",
    "upstream._run_http_server",
    "upstream._image_parts",
    "layer._idx",
    "provider._adapter_map",
    "provider._draft_model_map",
    "mlx_lm.utils._download",
    "mlx_lm.utils._get_classes",
}
"""What is touched of others by name: named tuples, the end of a process, and mlx-lm's seam."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_own(value: ast.expr) -> bool:
    """Whether an attribute of this is of the object, or the class, whose method is read."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def private_uses(name: str, tree: ast.Module) -> Iterator[str]:
    """Where a module touches private parts of other objects, or imports private names."""
    package = name.removesuffix(".py").replace("/", ".").rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value).rpartition(".")[2]
            allowed = {node.attr, f"{owner}.{node.attr}"} & SEAM
            if not is_own(node.value) and not allowed:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):
            # getattr, setattr, hasattr, delattr
            named = [str(one.value) for one in node.args[1:2] if isinstance(one, ast.Constant)]
            touched = {f"{ast.unparse(node.args[0])}.{one}" for one in named if is_private(one)}
            if touched - SEAM and not is_own(node.args[0]):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if any(map(is_private, home.split("."))) and home.rpartition(".")[0] != package:
                yield f"from {home} import"
            for one in node.names:
                if is_private(one.name) and f"{home}.{one.name}" not in SEAM and home != package:
                    yield f"from {home} import {one.name}"
        elif isinstance(node, ast.Import):
            yield from (
                f"import {one.name}"
                for one in node.names
                if any(map(is_private, one.name.split(".")))
            )


def test_no_module_touches_private_parts_of_others() -> None:
    found = {name: sorted(private_uses(name, tree)) for name, tree in modules()}

    assert len(found) > 100
    assert {name: uses for name, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    "line",
    [
        "store._disk",
        "self.store._disk",
        "self._store._disk.index",
        "a.b()._c = 1",
        "del rows[0]._cells",
        "upstream._encode",
        "layer._offset",
        "sys._exit(1)",
        "getattr(store, '_disk')",
        "setattr(self._saver, '_store', None)",
        "from persist_cache.store.store import _packed",
        "from persist_cache.tensors._mlx import mx",
        "import persist_cache.tensors._mlx",
    ],
)
def test_a_reach_into_private_parts_is_found(line: str) -> None:
    assert list(private_uses("persist_cache/cache/lookup.py", ast.parse(line))) != []


@pytest.mark.parametrize(
    "line",
    [
        "self._disk.index",
        "cls._made",
        "super()._tokenize(1)",
        "record._replace(hits=1)",
        "os._exit(1)",
        "x.__dict__",
        "getattr(self, '_disk')",
        "upstream.ResponseGenerator._tokenize",
    ],
)
def test_what_is_ones_own_or_of_the_seam_may_be_touched(line: str) -> None:
    assert list(private_uses("persist_cache/cache/lookup.py", ast.parse(line))) == []
