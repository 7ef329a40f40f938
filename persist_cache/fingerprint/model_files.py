"""Which files a model is made of, by the rules of mlx-lm, and the fields that they give.

What decides about the KV is in the fields; what only helps a reader is in the info.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from persist_cache.fingerprint.contents import Contents, blake2b, one_identity, pack
from persist_cache.fingerprint.reading import CannotIdentify, printable, read_regular

ModelKey: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str] | None]
"""What `mlx_lm.server` uses: `(model, adapter or None, draft model or None)`, or just a model."""

Parts: TypeAlias = tuple[str, str | None, str | None]
"""A model key in full: model, adapter, draft model."""

CODE_SUFFIXES = (".py", ".pyc", ".so", ".pyd", ".dylib", ".zip", ".egg", ".whl")
"""Ends of the names of what Python, or a Python file, can import."""

_MOST_CODE_FILES = 10_000
_MOST_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format."""


def split_model_key(model_key: ModelKey | None) -> Parts:
    """Return the parts of a model key.

    Raises:
        CannotIdentify: It is no model key.
    """
    if isinstance(model_key, str | os.PathLike):
        model_key = (model_key,)
    if not isinstance(model_key, tuple | list) or not model_key or model_key[0] is None:
        raise CannotIdentify("no model is named")
    if len(model_key) > 3:
        # A later mlx-lm would say here what else its KV depends on.
        raise CannotIdentify(f"a model key of {len(model_key)} parts is not known")
    parts = [os.fspath(part) if isinstance(part, os.PathLike) else part for part in model_key]
    if not all(part is None or (isinstance(part, str) and part) for part in parts):
        raise CannotIdentify("a part of the model key is empty or not a text")
    model, adapter, draft = [*parts, None, None][:3]
    assert model is not None
    return model, adapter, draft


def describe(
    parts: Parts, contents: Contents, folder: Path | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the fields and the info of all files that belong to a model key.

    Args:
        parts: The model key.
        contents: Looks at the files, and notes them.
        folder: Where the model's files are, if `parts` does not say.

    Raises:
        CannotIdentify: With the reason.
        OSError, ValueError, RuntimeError: Files are missing, unreadable, or absurd.
    """
    model, adapter, draft = parts
    fields, info = _describe_model(model, contents, folder)
    if adapter is not None:
        fields |= _prefixed("adapter.", _describe_adapter(Path(adapter), contents))
        info["adapter"] = printable(adapter)
    if draft is not None:
        draft_fields, draft_info = _describe_model(draft, contents)
        fields |= _prefixed("draft.", draft_fields)
        info |= _prefixed("draft.", draft_info)
    return fields, info


def is_folder(name: str) -> bool:
    """Return whether mlx-lm takes `name` for a path rather than for a hub id."""
    return Path(name).exists()


def folder_of(name: str) -> Path | None:
    """Return where a model's files are on this machine, as far as it has them; else None."""
    try:
        return _locate(name, read_regular)[0]
    except (CannotIdentify, OSError, ValueError):
        return None


def _prefixed(prefix: str, fields: Mapping[str, str]) -> dict[str, str]:
    return {prefix + name: value for name, value in fields.items()}


def _describe_model(
    name: str, contents: Contents, folder: Path | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the fields and the info of one model, as `mlx_lm.utils.load_model` reads it."""
    commit = ""
    if folder is None:
        folder, commit = _locate(name, contents.read)
    elif folder.parent.name == "snapshots":
        commit = folder.name
    config = _read_config(folder / "config.json", contents)
    model_type = config.get("model_type")
    fields = {
        "model_type": printable(model_type) if isinstance(model_type, str) else "",
        "config": digest_json(config),
        "weights": _identify_weights(name, _weights_of(name, folder), contents),
    }
    # ModelOpt exports keep their quantization here; mlx-lm merges it into the config.
    quantization = folder / "hf_quant_config.json"
    if quantization.exists():
        fields["quant_config"] = digest_json(_read_config(quantization, contents))
    if (model_file := config.get("model_file")) is not None:
        fields |= _describe_code(folder, str(model_file), contents)
    if contents.only_look:
        return fields, {}
    info = {
        "name": printable(name),
        "path": printable(folder.absolute()),
        "tokenizer": _digest_tokenizer(folder, contents),
        "chat_template": _digest_chat_template(folder),
    }
    if commit:
        info["commit"] = commit
    return fields, {key: value for key, value in info.items() if value}


def _describe_adapter(folder: Path, contents: Contents) -> dict[str, str]:
    return {
        "config": digest_json(_read_config(folder / "adapter_config.json", contents)),
        "weights": contents.identify([folder / "adapters.safetensors"]),
    }


# Weights -----------------------------------------------------------------------------------


def _weights_of(name: str, folder: Path) -> list[Path]:
    weights = sorted(
        path
        for path in folder.iterdir()
        if path.name.startswith("model") and path.name.endswith(".safetensors")
    )
    # mlx-lm takes the folder's own name for a pattern, too.
    loaded = sorted(Path(found) for found in glob.glob(str(folder / "model*.safetensors")))
    if loaded and loaded != weights:
        raise CannotIdentify(
            f"{printable(name)}: mlx-lm takes this path for a pattern and loads other files"
        )
    if not weights:
        raise CannotIdentify(f"{printable(name)}: no model*.safetensors")
    return weights


def _identify_weights(name: str, weights: Sequence[Path], contents: Contents) -> str:
    identities = contents.identify_each(weights)
    if not contents.only_look:
        # Files with the same content hold the same tensors, and it does not matter whose are used.
        differing = {identity: path for path, identity in identities.items()}
        _refuse_doubled_tensors(name, sorted(differing.values()))
    return one_identity(identities.values())


def _refuse_doubled_tensors(name: str, shards: Sequence[Path]) -> None:
    """Refuse a model in which the order of a folder decides which tensor is used."""
    if len(shards) < 2:
        return
    home: dict[str, str] = {}
    for shard in shards:
        for tensor in _tensors_in(shard):
            if tensor in home:
                raise CannotIdentify(
                    f"{printable(name)}: the tensor {printable(tensor)} is in {home[tensor]} "
                    f"and in {printable(shard.name)}, and chance decides which one is loaded"
                )
            home[tensor] = printable(shard.name)


def _tensors_in(shard: Path) -> list[str]:
    import msgspec

    with shard.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= _MOST_HEADER_BYTES else b""
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise CannotIdentify(f"{printable(shard)} is not a safetensors file") from None
    return [tensor for tensor in entries if tensor != "__metadata__"]


# Custom code -------------------------------------------------------------------------------


def _describe_code(folder: Path, model_file: str, contents: Contents) -> dict[str, str]:
    """Return the fields of a model that brings its own Python code.

    What the code imports is found out only by running it. So every file that it could import
    from its own folder counts; a model whose code is a single file has only that field.
    """
    path = folder / model_file
    root = Path(os.path.normpath(folder))
    if not Path(os.path.normpath(path)).is_relative_to(root):
        raise CannotIdentify(f"{printable(model_file)}: code outside of the model's folder")
    fields = {"model_file": blake2b(contents.read(path))}
    beside = [one for one in _code_in(root) if one != Path(os.path.normpath(path))]
    if beside:
        texts = []
        for one in beside:
            relative = printable(one.relative_to(root))
            digest = contents.read_code(one, relative)
            texts += [relative, digest]
        fields["model_code"] = blake2b(pack(texts))
    return fields


def _code_in(root: Path) -> list[Path]:
    found: list[Path] = []
    walked: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in walked:
            subfolders.clear()  # a link to where we are already
            continue
        walked.add((status.st_dev, status.st_ino))
        # Compiled files in there are used for their sources only.
        subfolders[:] = sorted(name for name in subfolders if name != "__pycache__")
        found += [Path(folder, name) for name in sorted(names) if name.endswith(CODE_SUFFIXES)]
        if len(found) > _MOST_CODE_FILES:
            raise CannotIdentify(f"{printable(root)}: too many files that its code could import")
    return found


# The hub's cache ---------------------------------------------------------------------------


def _locate(name: str, read: Callable[[Path], bytes]) -> tuple[Path, str]:
    """Return a model's folder and, for a hub id, its commit; by the rules of mlx-lm."""
    if is_folder(name):
        return Path(name), ""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise CannotIdentify(f"{printable(name)}: no such folder")
    if os.environ.get("MLXLM_USE_MODELSCOPE", "").lower() == "true":
        raise CannotIdentify(f"{name}: models of ModelScope are identified by their folder only")
    repository = _hub_cache() / f"models--{name.replace('/', '--')}"
    try:
        commit = read(repository / "refs" / "main").decode().strip()
    except FileNotFoundError:
        fetch = (
            f"; `persist-cache warm` or `serve` with it, or `hf download {name}`, fetches it"
            if "/" in name
            else ""
        )
        raise CannotIdentify(
            f"{name}: no such folder, and not in the Hugging Face cache{fetch}"
        ) from None
    if not re.fullmatch(r"\w+", commit):
        raise CannotIdentify(f"{name}: refs/main in the Hugging Face cache names no commit")
    return repository / "snapshots" / commit, commit


def _hub_cache() -> Path:
    """Return the folder that huggingface_hub uses; importing it takes a third of a second."""

    def expand(path: str) -> str:
        return os.path.expandvars(Path(path).expanduser())

    env = os.environ
    home = env.get("HF_HOME") or str(Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE")
    return Path(expand(hub)) if hub else Path(expand(home)) / "hub"


# Configurations ----------------------------------------------------------------------------


def digest_json(value: object) -> str:
    """Return a digest of a JSON value, whatever its layout and the order of its names."""
    import json

    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return blake2b(canonical.encode())


def _read_config(path: Path, contents: Contents) -> dict[str, object]:
    return _decode_config(path, contents.read(path))


def _decode_config(path: Path, encoded: bytes) -> dict[str, object]:
    import json

    try:
        config = json.loads(encoded)
    except ValueError as error:
        raise CannotIdentify(f"{printable(path)} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CannotIdentify(f"{printable(path)} is not a JSON object")
    return config


def _digest_tokenizer(folder: Path, contents: Contents) -> str:
    for name in ("tokenizer.json", "tokenizer.model"):
        try:
            return contents.identify([folder / name], note=False)
        except (OSError, CannotIdentify):
            continue
    return ""


def _digest_chat_template(folder: Path) -> str:
    try:
        return blake2b(read_regular(folder / "chat_template.jinja"))
    except (OSError, CannotIdentify):
        pass
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        try:
            template = _decode_config(path, read_regular(path)).get("chat_template")
        except (OSError, RecursionError, CannotIdentify):
            continue
        if template:
            return digest_json({"chat_template": template})
    return ""
