"""`load`: mlx-lm's `load`, settling which files the model in memory was made of."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, overload

from persist_cache.errors import MissingDependencyError, ModelError
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.fingerprint.loads import Description, Files, Unidentified, around_load, remember
from persist_cache.fingerprint.model_files import digest_json, is_folder
from persist_cache.fingerprint.reading import printable
from persist_cache.prefill.tokenizer_file import read_in_part


@overload
def load(
    path_or_hf_repo: str | os.PathLike[str],
    *,
    adapter_path: str | os.PathLike[str] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    return_config: Literal[False] = False,
) -> tuple[Any, Any]: ...


@overload
def load(
    path_or_hf_repo: str | os.PathLike[str],
    *,
    adapter_path: str | os.PathLike[str] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    return_config: Literal[True],
) -> tuple[Any, Any, dict[str, Any]]: ...


def load(
    path_or_hf_repo: str | os.PathLike[str],
    *,
    adapter_path: str | os.PathLike[str] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    return_config: bool = False,
) -> Any:
    """Load a model and its tokenizer as `mlx_lm.load` does, and settle the model's identity.

    The identity is that of the files the weights were read from, whatever becomes of the files
    later. While the model lives, each `PromptCache` and `Identifier` of this process uses it for
    the model key `path_or_hf_repo`, or `(path_or_hf_repo, adapter_path, None)` with an adapter.
    Load the model in this way again when its files have changed: the latest load counts.

    All weights are read before this returns, also the adapter's; there is no `lazy`. A model
    whose files are replaced while it is loaded is loaded once more.

    Args:
        path_or_hf_repo: Folder or hub id.
        adapter_path: Folder of an adapter, or None.
        tokenizer_config: As in `mlx_lm.load`.
        model_config: Replaces fields of the model's configuration; part of the identity.
        revision: Of a hub id.
        trust_remote_code: Whether code in the model's folder may be run.
        return_config: Return the configuration, too.

    Returns:
        `(model, tokenizer)`, or `(model, tokenizer, config)`.

    Raises:
        MissingDependencyError: MLX or mlx-lm is not installed.
        Exception: What `mlx_lm.load` raises.
    """
    try:
        import mlx_lm
    except ImportError as error:
        raise MissingDependencyError(
            "Running a model needs MLX and mlx-lm: pip install mlx mlx-lm."
        ) from error
    name = os.fspath(path_or_hf_repo)
    adapter = None if adapter_path is None else os.fspath(adapter_path)
    folder = fetch(name, revision)

    def read() -> Any:
        # By its folder: a hub id might name another commit by now.
        with read_in_part():
            loaded = mlx_lm.load(
                str(folder),
                tokenizer_config=dict(tokenizer_config or {}),
                model_config=dict(model_config or {}),
                adapter_path=adapter,
                return_config=True,
                trust_remote_code=trust_remote_code,
            )
        evaluate(loaded[0])
        return loaded

    loaded, described = around_load(Files((name, adapter, None), folder=folder), read)
    beyond_files = ""
    if model_config or revision:
        option = "model_config" if model_config else "revision"
        beyond_files = f"{printable(name)}: it was loaded with a {option}, which no file tells"
    described = _with_model_config(described, model_config)
    remember(name, adapter, loaded[0], described, beyond_files)
    return loaded if return_config else loaded[:2]


def fetch(name: str, revision: str | None = None) -> Path:
    """Return a model's folder, after downloading what a hub id names and is not here yet.

    Raises:
        ImportError: mlx-lm is not installed.
        Exception: What the hub's client raises.
    """
    if is_folder(name):
        return Path(name)
    from mlx_lm.utils import _download

    return Path(_download(name, revision=revision))


def evaluate(*models: Any) -> None:
    """Read all weights now: MLX does so lazily, and mlx-lm leaves an adapter's to be read.

    mlx-lm draws random weights first. Those are never made, but the generator's keys are
    evaluated, or each load would leave the operations of its draws in memory: 0.45 MiB for 30
    layers.
    """
    import mlx.core as mx

    mx.eval([model.parameters() for model in models if model is not None], mx.random.state)


def _with_model_config(
    described: Description | Unidentified, model_config: Mapping[str, Any] | None
) -> Description | Unidentified:
    if not model_config or isinstance(described, Unidentified):
        return described
    try:
        fields = {**described.fields, "model_config": digest_json(dict(model_config))}
    except (TypeError, ValueError) as error:
        return Unidentified(f"model_config is not JSON: {error}")
    return Description(fields, described.info)


def load_model(
    model: str, adapter_path: str | None = None, *, identifier: Identifier | None = None
) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder or a hub id, and settle its identity.

    Args:
        model: Folder or hub id.
        adapter_path: Folder of an adapter, or None.
        identifier: Where the identity of `(model, adapter_path, None)` is settled; without one,
            for the whole process, as `persist_cache.load` does.

    Raises:
        ModelError: It cannot be found or loaded.
        MissingDependencyError: mlx-lm is not installed.
    """
    with model_errors(model):
        if identifier is None:
            return load(model, adapter_path=adapter_path)
        import mlx_lm

        def read() -> tuple[Any, Any]:
            with read_in_part():
                loaded = mlx_lm.load(model, adapter_path=adapter_path)
            evaluate(loaded[0])
            return loaded[0], loaded[1]

        # First, or a hub id that is not here yet would be loaded twice.
        fetch(model)
        return identifier.around_load((model, adapter_path, None), read)


def load_tokenizer(model: str, *, chat_template: str | None = None) -> Any:
    """Load a model's tokenizer without its weights.

    Args:
        model: Folder or hub id.
        chat_template: What to use instead of the model's own, or None.

    Raises:
        ModelError: It cannot be found or loaded.
        MissingDependencyError: mlx-lm is not installed.
    """
    with model_errors(model):
        from mlx_lm.utils import load_tokenizer

        with read_in_part():
            return load_tokenizer(
                model, {"chat_template": chat_template} if chat_template else None
            )


@contextlib.contextmanager
def model_errors(model: str) -> Iterator[None]:
    """mlx-lm, transformers and the hub raise whatever they like; the user gets one sentence."""
    try:
        yield
    except (MissingDependencyError, ModelError):
        raise
    except ImportError as error:
        raise MissingDependencyError(
            "Running a model needs MLX and mlx-lm: pip install mlx mlx-lm."
        ) from error
    except Exception as error:
        if not Path(model).exists():
            raise ModelError(
                f"The model {model!r} is no folder here, and the hub does not know it or cannot be "
                "reached; name a folder with a model's files, or a hub id."
            ) from error
        said = str(error).strip().splitlines()
        detail = said[0].rstrip(".") if said else type(error).__name__
        raise ModelError(f"The model in {model} cannot be loaded: {detail}.") from error
