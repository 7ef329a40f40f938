"""Which versions of packages are installed, and whether mlx-lm is one that this package knows."""

from __future__ import annotations

KNOWN_MLX_LM = ((0, 32), (0, 33))
"""From which release of mlx-lm on, and before which one; pyproject.toml says the same to pip."""


def installed_version(distribution: str) -> str:
    """Version of an installed package without importing it; "" if it is not there."""
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def unknown_mlx_lm() -> str:
    """What is wrong with the mlx-lm that is installed, and how to mend that; "" if nothing is."""
    found = installed_version("mlx-lm")
    least, beyond = KNOWN_MLX_LM
    if not found or least <= _release(found) < beyond:
        return ""
    wanted = f"mlx-lm>={least[0]}.{least[1]},<{beyond[0]}.{beyond[1]}"
    return (
        f"mlx-lm {found} is installed, and this version of persist-cache is made for "
        f'{least[0]}.{least[1]}: install that (pip install "{wanted}"), or a persist-cache that '
        "knows the other"
    )


def _release(version: str) -> tuple[int, int]:
    import re

    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
