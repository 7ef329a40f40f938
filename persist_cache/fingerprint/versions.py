"""Which versions of packages are installed."""

from __future__ import annotations


def installed_version(distribution: str) -> str:
    """Version of an installed package without importing it; "" if it is not there."""
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
