"""Whether a model could be loaded, found out without its weights and without touching another.

`check_files` looks at files alone and runs on any thread; `build` has mlx-lm put the model together
without reading a weight, which only the thread may do that runs models: what MLX makes belongs to
the thread that made it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persist_cache.errors import ModelError
from persist_cache.fingerprint.model_files import folder_of
from persist_cache.fingerprint.reading import CannotIdentify, open_regular, read_regular
from persist_cache.prefill.loading import model_errors
from persist_cache.prefill.tokenizer_file import read_in_part

_MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format."""


def check_files(name: str, folder: Path, *, trust_remote_code: bool = False) -> None:
    """See that a model's configuration, class, tokenizer and weights are there and whole.

    Args:
        name: What the user calls it.
        folder: Where its files are.
        trust_remote_code: Whether code in the model's folder may be run.

    Raises:
        ModelError: They are not; with the reason.
    """
    with model_errors(name):
        config = read_config(folder)
        _check_class(folder, config, trust_remote_code)
        _check_weights(folder)
        from mlx_lm.utils import load_tokenizer

        with read_in_part():
            load_tokenizer(folder, {"trust_remote_code": trust_remote_code})


def check_adapter(folder: Path) -> None:
    """See that an adapter's files are there and whole.

    Raises:
        ModelError: They are not; with the reason.
    """
    try:
        _read_object(folder / "adapter_config.json")
        _check_shard(folder / "adapters.safetensors")
    except (OSError, CannotIdentify, ValueError, RecursionError) as error:
        raise ModelError(f"The adapter in {folder} cannot be loaded: {_said(error)}.") from error


def build(name: str, folder: Path, adapter: str | None, *, trust_remote_code: bool) -> Any:
    """Put a model together as `mlx_lm.load` does, reading none of its weights.

    Returns:
        The model.

    Raises:
        ModelError: Its weights do not fit its configuration, or the adapter's do not fit it.
    """
    with model_errors(name):
        from mlx_lm.utils import load_adapters, load_model

        model, _ = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
        if adapter is not None:
            load_adapters(model, adapter)
        return model


def stamps(*folders: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What changes when a file of these folders does; empty where they cannot be read."""
    found = []
    for folder in folders:
        try:
            with os.scandir(folder) as files:
                for file in files:
                    status = file.stat()
                    found.append(
                        (file.path, status.st_ino, status.st_size, status.st_mtime_ns),
                    )
        except OSError:
            return ()
    return tuple(sorted(found))


def reads_images(name: str) -> bool:
    """Whether a model that is on this machine reads images, by its configuration."""
    folder = folder_of(name)
    try:
        return folder is not None and bool(read_config(folder).get("vision_config"))
    except (OSError, CannotIdentify, ValueError):
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """A model's `config.json`.

    Raises:
        OSError, CannotIdentify, ValueError: There is none that could be used.
    """
    return _read_object(folder / "config.json")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_regular(path))
    except FileNotFoundError:
        raise ValueError(f"it has no {path.name}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name} is not valid JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return found


def _check_class(folder: Path, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    from mlx_lm.utils import _get_classes

    if (code := config.get("model_file")) is not None:
        if not trust_remote_code:
            raise ValueError("it brings code of its own, and --trust-remote-code was not given")
        with open_regular(folder / str(code)):
            return
    if not isinstance(config.get("model_type"), str):
        raise ValueError("config.json names no model_type")
    _, arguments = _get_classes(config)
    arguments.from_dict(config)


def _check_weights(folder: Path) -> None:
    shards = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = _read_object(index).get("weight_map", {})
        names = set(listed.values()) if isinstance(listed, dict) else set()
        missing = sorted(names - {shard.name for shard in shards}, key=str)
        if missing:
            raise ValueError(f"{missing[0]} is missing")
    if not shards:
        raise ValueError("it has no model*.safetensors")
    for shard in shards:
        _check_shard(shard)


def _check_shard(path: Path) -> None:
    """See that a safetensors file has the length that its header tells."""
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= min(_MAX_HEADER_BYTES, length - 8):
            raise ValueError(f"{path.name} is cut short, or no safetensors file")
        header = file.read(size)
    try:
        entries = json.loads(header)
        ends = [one["data_offsets"][1] for name, one in entries.items() if name != "__metadata__"]
        whole = 8 + size + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError(f"{path.name} is no safetensors file") from None
    if whole > length:
        raise ValueError(f"{path.name} is cut short: {length} of {whole} bytes are there")


def _said(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return said[0].rstrip(".") if said else type(error).__name__
