"""OpenBLAS for a child process on Linux, where `mlx[cpu]` brings a slow reference BLAS.

MLX's CPU backend multiplies float32 matrices by `cblas_sgemm`. A library that is preloaded answers
that symbol before the reference one does, about fifty times faster. It is never required.
"""

from __future__ import annotations

import ctypes.util
import functools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import platformdirs

# numpy's own copy is no candidate: its symbols end in `64_`. scipy-openblas32 is none either: its
# symbols begin with `scipy_`. The wheel cmeel-openblas has the plain ones.
_WHEEL = Path("cmeel.prefix/lib/libopenblas.so.0")
# Fedora's `p` is the threaded build of the same library, and its plain one is not threaded.
_NAMES = ("libopenblasp.so.0", "libopenblas.so.0", "libopenblas.so")
_PROBE = """
import ctypes, sys
from array import array
library = ctypes.CDLL(None)
library.openblas_get_config
rows, columns, depth = 65, 67, 130
left = array("f", [row % 5 * (place % 3) for row in range(rows) for place in range(depth)])
right = array("f", [column % 7 for column in range(columns) for _ in range(depth)])
product = array("f", bytes(4 * rows * columns))
integer, real = ctypes.c_int, ctypes.c_float
address = lambda numbers: ctypes.c_void_p(numbers.buffer_info()[0])
library.cblas_sgemm(
    101, 111, 112, integer(rows), integer(columns), integer(depth), real(1),
    address(left), integer(depth), address(right), integer(depth), real(0),
    address(product), integer(columns),
)
weight = sum(place % 3 for place in range(depth))
wanted = [row % 5 * (column % 7) * weight for row in range(rows) for column in range(columns)]
sys.exit(list(product) != wanted)
"""
"""Multiplies two matrices of small whole numbers, whose product is exact."""


def find_openblas() -> Path | None:
    """Return an OpenBLAS that a child process can preload, or None (always on other systems)."""
    found = find()
    return found[0] if found else None


def preload_env() -> dict[str, str]:
    """Return what to add to a child's environment so that it uses OpenBLAS; empty if there is none.

    `subprocess.run(command, env=os.environ | preload_env())`.
    """
    found = find()
    return dict(found[1]) if found else {}


@functools.cache
def find() -> tuple[Path, dict[str, str]] | None:
    if sys.platform != "linux":
        return None
    for library in _candidates():
        if not library.is_file():
            continue
        env = {"LD_PRELOAD": _joined("LD_PRELOAD", library)}
        if _works(env):
            return library, env
        # A wheel's OpenBLAS may miss only the Fortran runtime, which clean systems do not have.
        folders = _fortran_folders()
        if folders:
            env["LD_LIBRARY_PATH"] = _joined("LD_LIBRARY_PATH", *folders)
            if _works(env):
                return library, env
    return None


def _candidates() -> list[Path]:
    """Return where OpenBLAS may be: this environment, what the system names, known folders."""
    paths = [Path(sysconfig.get_path("platlib")) / _WHEEL]
    named = ctypes.util.find_library("openblas")
    names = _NAMES if named is None or named in _NAMES else (*_NAMES, named)
    multiarch = str(sysconfig.get_config_var("MULTIARCH") or "")
    folders = [Path(sys.base_prefix) / "lib"]  # conda
    folders += [Path("/usr/lib") / multiarch, Path("/usr/lib64"), Path("/usr/lib")]
    folders += [Path("/usr/local/lib"), Path("/opt/OpenBLAS/lib")]
    return paths + [folder / name for folder in folders for name in names]


def _works(env: dict[str, str]) -> bool:
    """Say whether a child with `env` starts and multiplies by OpenBLAS, under its plain names.

    It has to multiply: a wheel that was built for another processor loads, and dies of an illegal
    instruction at its first product.
    """
    command = [sys.executable, "-I", "-S", "-c", _PROBE]
    probe = subprocess.run(command, env=os.environ | env, capture_output=True, check=False)
    return probe.returncode == 0 and b"cannot be preloaded" not in probe.stderr


def _fortran_folders() -> list[Path]:
    """Return folders that lend mlx-cpu's own Fortran runtime under its ordinary name."""
    libs = Path(sysconfig.get_path("platlib")) / "mlx_cpu.libs"
    runtime = next(iter(libs.glob("libgfortran-*.so.5*")), None)
    if runtime is None:
        return []
    folder = Path(platformdirs.user_cache_dir("persist-cache")) / "lib"
    link = folder / "libgfortran.so.5"
    fresh = folder / f"{link.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh.symlink_to(runtime)
        fresh.replace(link)
    except OSError:
        return []
    return [folder, libs]


def _joined(variable: str, *paths: Path) -> str:
    """Return `paths` in front of what the variable holds already."""
    return ":".join([*map(str, paths), *filter(None, [os.environ.get(variable)])])
