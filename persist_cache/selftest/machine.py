"""The machine: is it one that is supported, is the store left out of backups, is there room."""

from __future__ import annotations

import json
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from persist_cache.doctor import facts
from persist_cache.filenames import UNSEARCHED_FILE
from persist_cache.fingerprint.versions import unknown_mlx_lm
from persist_cache.selftest import material, parts
from persist_cache.selftest.checks import Failed, NotApplicable, Number, Result, Setting
from persist_cache.store import exclusion
from persist_cache.system import volumes
from persist_cache.system.mounts import Mounts

LEAST_MACOS = (14, 0)
_LEAST_PYTHON = (3, 11)
_LEAST_FILES = 1024


class Facts(NamedTuple):
    """What decides whether a machine is supported.

    Attributes:
        system: `Darwin` or `Linux`.
        machine: Its architecture, as Python sees it.
        macos: Version, empty elsewhere.
        translated: Python runs under Rosetta.
        python: Its version.
        missing: Packages that are not installed.
    """

    system: str
    machine: str
    macos: str
    translated: bool
    python: tuple[int, int]
    missing: tuple[str, ...]


def platform_is_supported(setting: Setting) -> Result:
    """Look at system, architecture, and versions."""
    versions = facts.versions()
    system = platform.system()
    here = Facts(
        system,
        platform.machine(),
        platform.mac_ver()[0],
        _sysctl("sysctl.proc_translated") == "1",
        sys.version_info[:2],
        tuple(name for name, version in versions.items() if not version),
    )
    if why := unsupported(here) or unknown_mlx_lm():
        raise Failed(why)
    import mlx.core as mx

    chip = _sysctl("machdep.cpu.brand_string") or here.machine
    found = facts.machine()
    kind = volumes.kind(setting.folder) or Mounts().kind(setting.folder)
    numbers: dict[str, Number] = {
        "system": system,
        "release": here.macos or platform.release(),
        "machine": here.machine,
        "chip": chip,
        "cpus": found.cpus,
        "memory_bytes": found.memory_bytes,
        "page_bytes": mmap.PAGESIZE,
        "file_system": kind,
        "device": str(mx.default_device()),
        "metal": bool(mx.metal.is_available()),
        **versions,
    }
    return Result(
        f"{system} {here.macos or platform.release()}, {chip}, {kind}, MLX {versions['mlx']} on "
        f"{numbers['device']}, Python {versions['python']}",
        numbers,
    )


def unsupported(facts: Facts) -> str:
    """Why a machine is not supported; "" when it is."""
    if facts.missing:
        return f"not installed: {', '.join(facts.missing)}"
    if facts.python < _LEAST_PYTHON:
        return f"Python {facts.python[0]}.{facts.python[1]} is too old; it has to be 3.11 or later"
    if facts.system not in ("Darwin", "Linux"):
        return f"{facts.system} is neither macOS nor Linux"
    if facts.system == "Darwin":
        if facts.translated or facts.machine != "arm64":
            return "Python is not a native arm64 one, and MLX has no other on macOS"
        numbers = tuple(int(part) for part in facts.macos.split(".")[:2] if part.isdigit())
        if numbers < LEAST_MACOS:
            return f"macOS {facts.macos or '?'} is too old; it has to be 14 or later"
    return ""


def _sysctl(name: str) -> str:
    """A fact of macOS's kernel; "" elsewhere."""
    if not volumes.DARWIN:
        return ""
    done = subprocess.run(
        ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=10
    )
    return done.stdout.strip()


def backups_leave_it_out(setting: Setting) -> Result:
    """See that a new store carries the mark of Time Machine, and that Time Machine says so."""
    material.opened(setting.folder).close()
    root = setting.folder / "store"
    if not (root / "CACHEDIR.TAG").exists():
        raise Failed("the store has no CACHEDIR.TAG")
    if not volumes.DARWIN:
        raise NotApplicable("there is no Time Machine here; CACHEDIR.TAG is there")
    if not (root / UNSEARCHED_FILE).exists():
        raise Failed(f"the store has no {UNSEARCHED_FILE}")
    if not exclusion.is_excluded(root):
        raise Failed("the store does not carry the attribute that keeps it out of backups")
    said = _time_machine(root)
    if "[Included]" in said:
        raise Failed("tmutil says that the store would be backed up")
    return Result(
        "Time Machine and Spotlight are told to leave it out"
        + (", and tmutil says so" if "[Excluded]" in said else "; tmutil did not say"),
        {"attribute": True, "tmutil": "[Excluded]" in said},
    )


def _time_machine(root: Path) -> str:
    try:
        done = subprocess.run(
            ["/usr/bin/tmutil", "isexcluded", str(root)],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def descriptors_suffice(setting: Setting) -> Result:
    """Import mlx-lm in a new process and see how many files may be open, and are."""
    said = json.loads(parts.ended(parts.start("machine:count_files", setting.folder), "mlx-lm"))
    soft = said["after"][0]
    if 0 <= soft < _LEAST_FILES:
        raise Failed(f"only {soft} files may be open at once after mlx-lm was imported")
    if said["opened"] < _LEAST_FILES - 200:
        raise Failed(f"only {said['opened']} files could be opened of {soft}")
    return Result(
        f"{said['before'][0]} before mlx-lm is imported, {soft} after, {said['open']} in use",
        {
            "soft_before": said["before"][0],
            "hard_before": said["before"][1],
            "soft_after": soft,
            "hard_after": said["after"][1],
            "open_after_import": said["open"],
        },
    )


def count_files(folder: Path) -> None:
    """Part: print the limits of open files before and after mlx-lm is imported."""
    before = facts.open_files_limit()
    import mlx_lm.utils  # noqa: F401

    after = facts.open_files_limit()
    in_use = len(os.listdir("/dev/fd"))
    opened: list[int] = []
    try:
        while len(opened) < _LEAST_FILES - 100:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    print(json.dumps({"before": before, "after": after, "open": in_use, "opened": len(opened)}))
