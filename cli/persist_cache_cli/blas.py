"""Whether MLX multiplies by a slow BLAS here, and what to do about it.

On Linux the wheel `mlx-cpu` brings the reference BLAS. A library that is preloaded answers in its
place (`demo/openblas.py`); no package can do that for the user.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path

WHEEL = "cmeel-openblas==0.3.31"


def advice(command: str, then: str = "`persist-cache doctor` then says how to use it") -> str:
    """What to do to be faster, or "" where there is nothing to gain.

    Args:
        command: Of ours, as it would be called again.
        then: What to do once OpenBLAS is installed.
    """
    if sys.platform != "linux" or not _has_reference_blas() or _is_preloaded():
        return ""
    from persist_cache_cli.demo.openblas import find

    slow = (
        "MLX computes on the CPU here with a reference BLAS: OpenBLAS makes prefill in float32 "
        "many times as fast."
    )
    found = find()
    if found is None:
        return f"{slow} Install it by `{_install()}`; {then}."
    variables = " ".join(f"{name}={value}" for name, value in found[1].items())
    return f"{slow} It is installed; start with `{variables} persist-cache {command}`."


def variables_for_service() -> dict[str, str]:
    """Variables that make a service use OpenBLAS, as it does not inherit those of this shell."""
    if sys.platform != "linux" or not _has_reference_blas():
        return {}
    from persist_cache_cli.demo.openblas import preload_env

    here = {name: os.environ.get(name, "") for name in ("LD_PRELOAD", "LD_LIBRARY_PATH")}
    if found := preload_env():
        # What this shell preloads besides is no affair of the service; folders that it needs are.
        own = {name: value.removesuffix(f":{here[name]}") for name, value in found.items()}
        folders = here["LD_LIBRARY_PATH"]
        return {"LD_LIBRARY_PATH": folders, **own} if folders else own
    return {name: value for name, value in here.items() if value} if _is_preloaded() else {}


def _has_reference_blas() -> bool:
    try:
        importlib.metadata.distribution("mlx-cuda")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        return False  # the device multiplies
    try:
        libraries = importlib.metadata.distribution("mlx-cpu").locate_file("mlx_cpu.libs")
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(Path(str(libraries)).glob("libblas*"))


def _is_preloaded() -> bool:
    """Whether this process has another BLAS in front of the one that MLX brings."""
    return hasattr(ctypes.CDLL(None), "cblas_sgemm")


def _install() -> str:
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return f"uv pip install --python {sys.executable} --no-deps {WHEEL}"
    return f"{sys.executable} -m pip install --no-deps {WHEEL}"
