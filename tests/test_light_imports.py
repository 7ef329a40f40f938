"""What must not be imported: the library works without MLX, the command line starts at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from persist_cache import Store

HEAVY = ("mlx", "mlx.core", "mlx_lm", "transformers", "numpy", "huggingface_hub")

SLOW = ("ctypes", "subprocess", "persist_cache.index.audit", "persist_cache.queries.explain")
"""What a look at a store does not wait for."""

WITHOUT_MLX = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlx", "mlx_lm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )


def test_every_public_name_works_without_mlx() -> None:
    done = run(
        WITHOUT_MLX + "import persist_cache\n"
        "for name in persist_cache.__all__: getattr(persist_cache, name)"
    )

    assert done.stderr == ""
    assert done.returncode == 0


def test_store_works_without_mlx(tmp_path: Path) -> None:
    done = run(
        WITHOUT_MLX + "from persist_cache import Store\n"
        "with Store.open(sys.argv[1], min_free_bytes=0) as store:\n"
        "    print(store.entries(), store.check(), store.stats().entries)",
        str(tmp_path / "store"),
    )

    assert (done.stdout, done.stderr) == ("[] [] 0\n", "")


@pytest.mark.parametrize(
    "program",
    [
        "from persist_cache import PromptCache; PromptCache()",
        "from persist_cache.prefill.loading import load_model; load_model('nowhere')",
        "from persist_cache import tensors",
    ],
)
def test_what_needs_mlx_asks_for_it_in_one_sentence(program: str) -> None:
    done = run(
        WITHOUT_MLX + "from persist_cache import PersistCacheError\n"
        "try:\n    " + program + "\nexcept PersistCacheError as error:\n    print(error)"
    )

    assert done.stderr == ""
    assert "pip install mlx mlx-lm" in done.stdout
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "program",
    [
        "import persist_cache",
        "from persist_cache import Entry, Fingerprint, Store, Tier, identify, PromptCache",
        "from persist_cache_cli.main import cli; cli(['list', '--help'], standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_imported(program: str) -> None:
    done = run(f"import sys\n{program}\nprint([name for name in {HEAVY!r} if name in sys.modules])")

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(sys.platform == "darwin", reason="its volumes and locks are asked by ctypes")
def test_list_waits_for_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    Store.open(tmp_path / "store", min_free_bytes=0).close()
    done = run(
        "import sys\n"
        "from persist_cache_cli.main import cli\n"
        "cli(['--store', sys.argv[1], 'list'], standalone_mode=False)\n"
        f"print([name for name in {SLOW!r} if name in sys.modules])",
        str(tmp_path / "store"),
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_server_starts_without_the_patterns_of_repairs_that_nobody_asked_for() -> None:
    done = run(
        "import sys\n"
        "import persist_cache.server.run\n"
        "print('persist_cache.stability.dates' in sys.modules)"
    )

    assert done.stdout == "False\n", done.stderr


def test_no_package_called_cli_is_installed() -> None:
    done = run("import importlib.util as u; print(u.find_spec('persist_cache_cli').origin)")
    home = Path(done.stdout.strip()).parent

    assert home.name == "persist_cache_cli"
    assert not (home.parent / "cli" / "__init__.py").exists()


def test_the_modules_of_a_command_are_never_searched_for_garbage() -> None:
    """A search of all that `serve` imports would take as long as our own part of it."""
    done = run(
        "import gc, sys\n"
        "import persist_cache_cli.main as main\n"
        "command = main.cli.get_command(None, 'serve')\n"
        "searched = {id(one) for one in gc.get_objects()}\n"
        "modules = [sys.modules[command.callback.__module__], sys.modules['mlx_lm.server']]\n"
        "print(gc.isenabled(), [id(vars(one)) in searched for one in modules])"
    )

    assert done.stdout == "True [False, False]\n", done.stderr
