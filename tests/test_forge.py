"""Tests use public words, and wait instead of sleeping; the exceptions are named here.

`test_walls` says the same of the product.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit", "_getframe"}
"""Names of the standard library that anybody may use."""
FORGES = {
    "tests/forge.py": "makes what only damage makes",
    "tests/torture/broken.py": "makes defects in the product, for the torture to find",
}
SEAMS = {
    "tests/test_alone.py": {"_stop"},
    "tests/test_stabilize.py": {"_remembered"},
    "tests/test_docs.py": {"_idx"},
    "tests/test_first_look.py": {
        *("_in_flight", "_is_distributed", "_stop", "_generation_failed", "_generation_thread"),
        *("_tokenize", "_make_state_machine", "_serve_single"),
    },
    "tests/test_interrupted.py": {"_time_budget"},
    "tests/test_loads.py": {"_download"},
    "tests/test_rendering.py": {"_is_distributed", "_tokenize"},
    "tests/test_server_seam.py": {"_generate"},
    "tests/test_tensors.py": {"_idx"},
    "tests/test_ticket.py": {"_tokenize"},
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
    "tests/proxy.py": "is slow, which is what it is for",
    "tests/held_server.py": "is slow to refuse, where that is asked for",
    "tests/test_upstream.py": "polls in the place of a look-up",
}


SLEEPS = ("time.sleep", "threading.Event().wait")


def test_tests_sleep_where_time_itself_is_the_subject_only() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("*.py")
        if path.parent.name not in ("torture", "darwin")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in SLEEPS
    }

    assert found == set(SLEEPERS)
