"""What broke for the users of other caches does not break here: each bug has a test by its name.

`ROWS` lists them; the first test looks for each in the names and docstrings of the whole suite.
"""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from persist_cache import PromptCache, fs
from persist_cache.blobs.reader import BlobReader
from persist_cache.errors import CorruptBlobError, StoreAccessError, StoreFullError
from persist_cache.store.store import Store
from tests.fakes import FakeSource, blob_files, disk_usage, fetched, fingerprint, put
from tests.live_fakes import MODEL, FakeCodec, FakeLayer
from tests.memory import fast_folder

TESTS = Path(__file__).parent
ROWS = (
    "LMCache #562, Mooncake #1196, LlamaFarm",
    "LMCache #1454",
    "LMCache #4725, vLLM #52784, oMLX #2115",
    "LMCache #2136",
    "ds4 #448, #157",
    "cc-local-llm #6, mlx-engine #341, vmlx #4, osaurus #2580",
    "llama.cpp #26676, #25913",
    "ds4 #251, vLLM #49328",
    "SGLang #31485",
    "SGLang #28653",
    "SGLang #31926, mlx-vlm, vllm-mlx",
    "oMLX: a leftover temporary file",
    "oMLX: last use forgotten",
    "vllm-mlx 0.6.0",
    "vllm-mlx: a rotating cache restored as a plain one",
    "vllm-mlx, llama.cpp, MemOS #2300",
    "vLLM #42125, llama.cpp #26207",
    "Rapid-MLX #198",
    "vllm-mlx, omlx #1736",
    "Tanguille #4636",
    "osaurus #2273, oMLX #3699, #3183",
    "Rapid-MLX #667, oMLX #3015",
    "mlx-lm 0.32.2: a look-up",
    "mlx-lm 0.32.2: `pop_prefixes`",
    "mlx-lm #1215, #1887",
    "open-webui #28527, sglang #34553",
    "llama.cpp, vLLM: prompts that every local user can read",
    "llama-cpp-python: pickle",
)
"""One for each row of the survey of other caches, as their tests name them."""


def documented_tests() -> Iterator[tuple[str, str]]:
    """Every test of the suite with its docstring."""
    for path in sorted(TESTS.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield f"{path.name}::{node.name}", ast.get_docstring(node) or ""


def test_each_bug_of_a_peer_is_named_by_a_test() -> None:
    docstrings = [" ".join(text.split()) for _, text in documented_tests()]

    assert [row for row in ROWS if not any(row in text for text in docstrings)] == []


def test_storing_does_not_evict_what_it_extends_nor_what_it_stored(tmp_path: Path) -> None:
    """ds4 #448, #157: storing evicts what the load needs; stored, then evicted at once."""
    one, other = list(range(30)), list(range(100, 130))
    with Store.open(tmp_path / "probe", min_free_bytes=0) as probe:
        put(probe, one)
        one_entry = disk_usage(probe.root)
    with Store.open(tmp_path / "s", max_bytes=one_entry + 490_000, min_free_bytes=0) as store:
        for turn in range(1, 9):
            for prompt in (one, other):
                grown = [*prompt, *range(turn)]
                put(store, grown)
                assert fetched(store, grown) == len(grown), "what was stored last is there"
                assert disk_usage(store.root) <= one_entry + 490_000
        assert store.check() == []


def test_twenty_turns_write_each_row_once() -> None:
    """cc-local-llm #6, mlx-engine #341, vmlx #4, osaurus #2580: the prefix rewritten each turn."""
    prompt: list[int] = []
    with fast_folder() as folder, Store.open(folder / "store", min_free_bytes=0) as store:
        for turn in range(20):
            more = [turn, *range(400)]
            prompt += more
            done = store.put(fingerprint(), prompt, FakeSource(prompt))
            assert done.new_tokens == len(more)

        stored = 0
        for path in blob_files(store.root):
            with BlobReader(path) as reader:
                stored += reader.header.tensors["layers.0.keys"].shape[2]
    assert stored == len(prompt), "no row is on disk twice"


def test_restored_prefix_leaves_just_the_suffix_to_compute(tmp_path: Path) -> None:
    """llama.cpp #26676, #25913: "restored", but computed again anyway."""
    prompt = list(range(50))
    options = {"codec": FakeCodec(), "identify": lambda model: fingerprint()}
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        before = PromptCache(store=store, **options)  # type: ignore[arg-type]
        before.insert_cache(MODEL, prompt, [FakeLayer(prompt)], cache_type="system")
        before.close()
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        after = PromptCache(store=store, **options)  # type: ignore[arg-type]
        cache, rest = after.fetch_nearest_cache(MODEL, [*prompt, 7, 8, 9])
        assert cache is not None
        assert list(rest) == [7, 8, 9]
        after.close()


def test_crashes_add_nothing_to_the_cap(tmp_path: Path) -> None:
    """LMCache #1454: leftovers not counted, one more cap per restart."""
    limit = 1_000_000
    script = (
        "import os, sys\n"
        "from persist_cache import fs\n"
        "from persist_cache.store.store import Store\n"
        "from tests.fakes import put\n"
        "sync = fs.sync\n"
        "def die(fd):\n"
        "    sync(fd)\n"
        "    if len(sys.argv) > 3: os.kill(os.getpid(), 9)\n"
        "n = int(sys.argv[2])\n"
        f"with Store.open(sys.argv[1], max_bytes={limit}, min_free_bytes=0) as store:\n"
        "    put(store, [n] * 500)\n"
        "    fs.sync = die\n"
        "    sys.argv.append('die')\n"
        "    put(store, [n, *range(2000)])\n"
    )
    for n in range(5):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "store"), str(n)], cwd=TESTS.parent
        )
        assert done.returncode == -signal.SIGKILL
        assert disk_usage(tmp_path / "store") <= limit

    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        assert store.check() == []
        assert list((store.root / "tmp").iterdir()) == []


def test_files_are_spread_over_folders(store: Store) -> None:
    """SGLang #28653: 7.5 million files in one folder."""
    for n in range(40):
        put(store, [n, 1])

    files = blob_files(store.root)

    assert len(files) == 40
    assert all(path.parent.name == path.name[:2] for path in files)
    assert len({path.parent for path in files}) > 25


def test_folder_that_may_not_be_used_is_said_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """osaurus #2273, oMLX #3699, #3183: the disk is silently off."""

    def denied(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        cache = PromptCache(
            store=store,
            codec=FakeCodec(),
            identify=lambda model: fingerprint(),
        )
        with monkeypatch.context() as patch:
            patch.setattr(fs, "create", denied)
            cache.insert_cache(MODEL, [1, 2, 3], [FakeLayer([1, 2, 3])], cache_type="system")
            cache.flush()
            assert "Permission denied" in cache.stats().disk_off
        cache.close()
    with monkeypatch.context() as patch:
        patch.setattr(fs, "make_folder", denied)
        with pytest.raises(StoreAccessError, match="Permission denied"):
            Store.open(tmp_path / "other", min_free_bytes=0)


def test_nothing_on_disk_is_ever_unpickled(store: Store) -> None:
    """llama-cpp-python: pickle in the cache, which runs what the file says."""
    product = TESTS.parent / "persist_cache"
    imported = {
        name.name
        for path in product.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle"} == set()

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(store.root / "boom"),)

    put(store, [1, 2, 3])
    (path,) = blob_files(store.root)
    path.write_bytes(pickle.dumps(Bomb()).ljust(path.stat().st_size, b"\0"))
    with pytest.raises(CorruptBlobError):
        BlobReader(path)
    assert fetched(store, [1, 2, 3]) == 0
    assert not (store.root / "boom").exists()


def test_cap_holds_while_prompts_of_all_sizes_come(tmp_path: Path) -> None:
    """LMCache #4725, vLLM #52784, oMLX #2115: a cap that is declared, not enforced."""
    dice = random.Random(3)
    limit = 900_000
    with Store.open(tmp_path / "s", max_bytes=limit, min_free_bytes=0, run_tokens=64) as store:
        for n in range(40):
            with contextlib.suppress(StoreFullError):
                put(store, [n, *range(dice.choice((5, 200, 900, 4000)))])
            assert disk_usage(store.root) <= limit


def test_copy_of_a_store_is_a_store(tmp_path: Path) -> None:
    """LMCache #562, Mooncake #1196, LlamaFarm: what was stored is found by who comes next."""
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        kept = put(store, list(range(20)), pinned=True, label="mine")
    shutil.copytree(tmp_path / "store", tmp_path / "copy")

    with Store.open(tmp_path / "copy", min_free_bytes=0) as store:
        assert fetched(store, list(range(20))) == 20
        entry = store.get(kept)
        assert (entry.pinned, entry.label) == (True, "mine")
