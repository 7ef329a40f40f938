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

from bench import common
from bench.common import Context, Report, Spread, Table
from bench.drivers import __name__ as drivers

_INSTALL_TIMEOUT_S = 1200


@dataclass(frozen=True)
class Peer:
    """A project and its driver.

    Attributes:
        name: As people know it.
        driver: Module below `bench.drivers`, or "" when there is none.
        package: On PyPI; "" for what runs in this environment.
        note: What must be known to read its numbers; without a driver, why it has none.
    """

    name: str
    driver: str
    package: str = ""
    note: str = ""


PEERS = (
    Peer("persist-cache", "persist_cache_store", note="checksums verified, fsync"),
    Peer("mlx-lm prompt cache file", "mlx_lm_file", note="whole snapshot a turn, no checksum"),
    Peer("mlx-vlm APC", "mlx_vlm_apc", "mlx-vlm", note="blocks of 16 tokens, no checksum"),
)
NOT_RUN = (
    Peer("vllm-mlx", "", note="no driver was written yet"),
    Peer("llama-cpp-python", "", note="no driver was written yet; its KV is of its own model file"),
    Peer("oMLX", "", note="no driver was written yet"),
    Peer("LM Studio mlx-engine", "", note="its cache does not survive a restart"),
)


def run(context: Context) -> Report:
    repetitions = context.pick(3, 5)
    pythons: dict[str, str] = {}
    failed = [(peer.name, peer.note) for peer in NOT_RUN]
    versions = {}
    for peer in PEERS:
        common.say(f"peers: setting up {peer.name}")
        try:
            pythons[peer.name] = _python(peer)
            versions[peer.name] = _version(pythons[peer.name], peer.package or "mlx-lm")
        except (subprocess.SubprocessError, OSError) as error:
            failed.append((peer.name, f"cannot be installed: {_last_line(error)}"))
    found: dict[str, dict[str, list[Any]]] = {}
    with context.scratch() as scratch:
        for number in range(repetitions):
            for peer in PEERS:
                if peer.name not in pythons:
                    continue
                common.say(f"peers: {peer.name}, {number + 1} of {repetitions}")
                folder = scratch / f"{peer.driver}-{number}"
                folder.mkdir()
                try:
                    stored = _drive(pythons[peer.name], peer, "store", folder)
                    restored = _drive(pythons[peer.name], peer, "restore", folder)
                except subprocess.CalledProcessError as error:
                    failed.append((peer.name, f"cannot run: {_last_line(error)}"))
                    del pythons[peer.name]
                    continue
                samples = found.setdefault(peer.name, {"store": [], "restore": []})
                samples["store"].append(stored)
                samples["restore"].append(restored)
    values = {"found": found, "versions": versions, "failed": failed}
    return Report("peers", "Beside other projects", values, _tables(values))


def _python(peer: Peer) -> str:
    """The interpreter to run a peer with; makes its environment on first use."""
    if not peer.package:
        return sys.executable
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("persist-cache")) / "bench" / peer.package
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        mlx = "mlx[cpu]" if sys.platform == "linux" else "mlx"
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run(
            [*command, mlx, peer.package],
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
        kv_bytes = 2048 * kv_bytes_per_token()
        rows.append(
            [
                f"{name} ({values['versions'][name]})",
                f"{stored[0]['written'] / kv_bytes:.2f}",
                f"{stored[0]['on_disk'] / kv_bytes:.2f}",
                str(stored[0]["files"]),
                Spread.of([one["s"] for one in stored]).show(1, 2),
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
            "saving, s",
            "restoring + 1 token, ms",
            "tokens",
            "",
        ],
        rows,
        "KV of 28 layers × 8 heads × 128, bf16. Restoring begins with opening the store. The "
        "version of persist-cache and of the file is that of mlx-lm.",
    )
    missing = Table("Not run", ["project", "reason"], values["failed"])
    return [measured, missing]


def kv_bytes_per_token() -> int:
    from bench import kv

    return kv.LARGE.bytes_per_token
