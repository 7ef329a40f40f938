"""Running the command line in tests, in this process or through the installed script."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store
from persist_cache_cli.main import main
from tests import prepared
from tests.fakes import FakeSource, fingerprint
from tests.torture.storm import in_child

SCRIPT = Path(sys.executable).with_name("persist-cache")
Run = Callable[..., "Done"]

SYSTEM = list(range(1000, 1020))
QUESTION = [*SYSTEM, *range(2000, 2010)]
REPLY = [*QUESTION, *range(3000, 3010)]
OTHER = [*SYSTEM, *range(4000, 4010)]


@dataclass
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """What it complained about; exactly one line of it."""
        assert self.err.startswith("Error: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.strip()


def runner(store: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, errors and exit status included."""

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["--store", str(store), *map(str, arguments)])
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, captured.out, captured.err)

    return run


def script(store: Path, *arguments: object, prefix: Sequence[str] = (), **options: Any) -> Done:
    """Runs a command as users do; `prefix` is a program that starts it."""
    done = subprocess.run(
        [*prefix, str(SCRIPT), "--store", str(store), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | options.pop("env", {}),
        **options,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def prepared_script(
    store: Path,
    *arguments: object,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> Done:
    """As `script`, for a command that uses mlx-lm, where importing it is not the point."""
    with tempfile.TemporaryDirectory() as folder:
        given, out, err = (Path(folder, name) for name in ("in", "out", "err"))
        given.write_text(stdin)
        words = ["--store", str(store), *map(str, arguments)]
        running = prepared.start(
            "persist_cache_cli", words, out, errors=err, stdin=given, variables=env
        )
        try:
            status = running.wait(timeout)
        finally:
            running.kill()
        return Done(status, out.read_text(), err.read_text())


def forked(store: Path, *arguments: object) -> Done:
    """Runs a command in a child of this process, for what may take it down; cheaper than `script`.

    Raises:
        ChildDied: Something did.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:

        def act() -> int:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            with (
                open(1, "w", closefd=False) as sys.stdout,
                open(2, "w", closefd=False) as sys.stderr,
                pytest.raises(SystemExit) as ended,
            ):
                main(["--store", str(store), *map(str, arguments)])
            assert isinstance(ended.value.code, int)
            return ended.value.code

        status = in_child(act)
        out.seek(0)
        err.seek(0)
        return Done(status, out.read().decode(), err.read().decode())


def fill(root: Path) -> dict[str, str]:
    """A store with a system prompt, two conversations below it, and another model's prompt.

    Always the same one, copied, so its entries have the same ids everywhere.
    """
    filled, ids = _filled()
    shutil.copytree(Path(filled.name, "store"), root)
    return dict(ids)


@functools.cache
def _filled() -> tuple[tempfile.TemporaryDirectory[str], dict[str, str]]:
    folder = tempfile.TemporaryDirectory()
    with Store.open(Path(folder.name, "store"), min_free_bytes=0) as store:

        def put(tokens: list[int], model: str = "w0", **options: Any) -> str:
            identity = fingerprint(weights=model)
            identity = type(identity).from_fields(
                dict(identity.fields), {"name": f"org/model-{model}", "path": f"/gone/{model}"}
            )
            entry = store.put(identity, tokens, FakeSource(tokens, real=True), **options).entry
            assert entry is not None
            return entry

        return folder, {
            "system": put(SYSTEM, tier="system", label="the agent", prefill_s=2.0),
            "question": put(QUESTION, tier="user"),
            "reply": put(REPLY, tier="assistant"),
            "other": put(OTHER, tier="user"),
            "foreign": put(SYSTEM, model="w1", tier="system"),
        }


def contents(root: Path) -> dict[str, bytes]:
    """Every byte of a store but LMDB's lock table, which readers register in."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in ("lock.mdb", "writer.lock")
    }
