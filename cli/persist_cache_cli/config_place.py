"""Where persist-cache.toml is; what is in it is read by `config`, which most calls do not need."""

from __future__ import annotations

import os
from pathlib import Path

import click

VARIABLE = "PERSIST_CACHE_CONFIG"
NAME = "persist-cache.toml"


def default_path() -> Path:
    """The file in the platform's place for settings."""
    import platformdirs

    return Path(platformdirs.user_config_dir("persist-cache")) / NAME


def apply(root: click.Context, given: str | None) -> None:
    """Let a call of `persist-cache` have what its file of settings says.

    Args:
        root: The context of the group.
        given: The file, if one was named.

    Raises:
        click.UsageError: It is not there, or cannot be understood.
    """
    if (file := find(given)) is None:
        return
    from persist_cache_cli.config import read_config, use

    settings = read_config(file)
    use(root, settings)
    if given is not None and root.invoked_subcommand == "launch":
        os.environ[VARIABLE] = str(file)  # the server that it starts reads the same
    if root.params.get("store") is None:
        root.obj = settings.store


def find(given: str | None) -> Path | None:
    """The file that is to be read, if there is one.

    Args:
        given: Its path; None for `$PERSIST_CACHE_CONFIG`, or without that the platform's place.
            An empty variable stands for none at all.

    Raises:
        click.UsageError: One was named, and is not there.
    """
    if given == "":
        raise click.UsageError("--config needs a file, not an empty name.")
    named = os.environ.get(VARIABLE) if given is None else given
    if named == "":
        return None
    path = default_path() if named is None else Path(named).expanduser().absolute()
    if path.exists():
        return path
    if named is None:
        return None
    what = VARIABLE if given is None else "--config"
    raise click.UsageError(f"{what}: there is no file {path}.")
