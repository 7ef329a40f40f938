"""Which model a request means, whatever it calls it, and whether that one can be loaded.

mlx-lm compares names as they were typed, and drops the model that is loaded before it looks at
another. So a name becomes a key here that is the same for all spellings of a model, and a key that
cannot be loaded is refused before it reaches the thread that runs models.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from persist_cache.errors import PersistCacheError
from persist_cache.fingerprint.model_files import folder_of, is_folder
from persist_cache.prefill import loadable, loading
from persist_cache.server.validation import RefusedError

DEFAULT = "default_model"
"""What upstream calls the model of the command line."""
_MOST_CHECKED = 16


class Key(NamedTuple):
    """A model as mlx-lm's provider loads it; its draft model and adapter may be none."""

    model: str
    adapter: str | None
    draft: str | None


class Names:
    """The names of one server's models.

    Thread safety: may be asked by many threads at once; `_lock` is held while the files of a model
    are looked at, so that many requests for the same one look once.
    """

    def __init__(
        self,
        default: str | None,
        *,
        adapter: str | None = None,
        draft: str | None = None,
        aliases: Mapping[str, str] | None = None,
        trust_remote_code: bool = False,
        loaded: Callable[[], object] = lambda: None,
    ) -> None:
        """Know the models of a command line.

        Args:
            default: `--model`, as it was typed; None for a server without one.
            adapter: `--adapter-path`.
            draft: `--draft-model`.
            aliases: Further names, and the models that they stand for.
            trust_remote_code: `--trust-remote-code`.
            loaded: Tells the key of the model that is loaded now, or None.
        """
        self._own = None if default is None else Key(default, adapter, draft)
        self._aliases = dict(aliases or {})
        self._trust_remote_code = trust_remote_code
        self._loaded = loaded
        self._lock = threading.Lock()
        self._checked: dict[Path, object] = {}

    # ---- what a name means -------------------------------------------------------------------

    def key(self, model: str | None, adapter: str | None = None, draft: str | None = None) -> Key:
        """The key of a model that a request names; None stands for what the server has.

        Raises:
            RefusedError: No model is named, and the server has none of its own.
        """
        own = self._own_key()
        name = self._meant(model)
        is_own = own is not None and name == own.model
        if adapter is None:
            adapter = own.adapter if own is not None and is_own else None
        elif own is not None and _is_same_folder(adapter, own.adapter):
            adapter = own.adapter
        else:
            adapter = _resolved(adapter)
        if draft is None or draft == DEFAULT:
            draft = None if own is None else own.draft
        else:
            draft = self._meant(draft)
        return Key(name, adapter, draft)

    def is_here(self, name: str) -> bool:
        """Whether a name stands for a model that is on this machine."""
        return name == DEFAULT or name in self._aliases or _local(name) is not None

    def _own_key(self) -> Key | None:
        """The model of the command line; without one, what is loaded."""
        if self._own is not None:
            return self._own
        loaded = self._loaded()
        return Key(*loaded) if isinstance(loaded, tuple) and len(loaded) == 3 else None

    def of(self, body: Mapping[str, Any]) -> Key:
        """The key of the model that a body names, whose names were checked."""
        return self.key(body.get("model"), body.get("adapters"), body.get("draft_model"))

    def _meant(self, name: str | None) -> str:
        if name is None or name == DEFAULT:
            if (own := self._own_key()) is None:
                _refuse("This server was started without a model; name one in the field model.")
            return own.model
        name = self._aliases.get(name, name)
        if not name.strip():
            _refuse("An empty text names no model; leave the field out, or name one.")
        for known in self._known():
            if name == known or _is_same_model(name, known):
                return known
        return _resolved(name)

    def _known(self) -> Iterator[str]:
        """Models whose name stays as it is."""
        for key in (self._own, self._loaded()):
            if isinstance(key, tuple):
                yield from (one for one in (key[0], *key[2:3]) if isinstance(one, str))

    # ---- whether it can be loaded ------------------------------------------------------------

    def check(self, key: Key) -> None:
        """See that a model could be loaded, if it is not the one that is loaded.

        A hub id that is not here yet is downloaded.

        Raises:
            RefusedError: It could not; with the reason.
        """
        loaded = self._loaded()
        if key == loaded or (loaded is None and key == self._own):
            return  # or it is being loaded, which ends the server if it fails
        for param, name in (("model", key.model), ("draft_model", key.draft)):
            if name is not None:
                self._check_model(name, param)
        if key.adapter is not None:
            try:
                loadable.check_adapter(Path(key.adapter))
            except PersistCacheError as error:
                _refuse(str(error), "adapters", error)

    def _check_model(self, name: str, param: str) -> None:
        try:
            folder = folder_of(name)
            if folder is None or not folder.is_dir():
                with loading.model_errors(name):
                    folder = loading.fetch(name)
            with self._lock:
                seen = loadable.stamps(folder)
                if seen and self._checked.get(folder) == seen:
                    return
                loadable.check_files(name, folder, trust_remote_code=self._trust_remote_code)
                if len(self._checked) >= _MOST_CHECKED:
                    self._checked.clear()
                self._checked[folder] = seen
        except PersistCacheError as error:
            _refuse(str(error), param, error)

    def check_aliases(self) -> None:
        """See that each alias can be loaded.

        Raises:
            PersistCacheError: One cannot, or it is no use as a name.
        """
        for alias, model in self._aliases.items():
            if model in self._aliases:
                raise PersistCacheError(
                    f"--alias {alias}={model}: {model} is an alias itself; name the model."
                )
            try:
                self._check_model(self._meant(model), "model")
            except RefusedError as refusal:
                raise PersistCacheError(f"--alias {alias}={model}: {refusal}") from refusal

    # ---- what there is -----------------------------------------------------------------------

    def listed(self) -> list[str]:
        """Names to be told: the server's own model, aliases, what was downloaded from the hub."""
        found = [] if self._own is None else [public_name(self._own.model)]
        return list(dict.fromkeys([*found, *self._aliases, *_downloaded()]))

    def is_listed(self, name: str) -> bool:
        """Whether a name is one of those, or another spelling of one."""
        own = self._own
        return name in self.listed() or (own is not None and self._meant(name) == own.model)


def names_of(provider: Any, aliases: Mapping[str, str] | None = None) -> Names:
    """The names of the models of upstream's model provider."""
    args = provider.cli_args
    return Names(
        args.model,
        adapter=getattr(args, "adapter_path", None),
        draft=getattr(args, "draft_model", None),
        aliases=aliases,
        trust_remote_code=getattr(args, "trust_remote_code", False),
        loaded=lambda: getattr(provider, "known_key", provider.model_key),
    )


def parse_aliases(given: tuple[str, ...]) -> dict[str, str]:
    """Read `NAME=MODEL` as often as it was given.

    Raises:
        ValueError: One is none, or two give one name to different models.
    """
    found: dict[str, str] = {}
    for one in given:
        name, is_pair, model = (part.strip() for part in one.partition("="))
        if not (name and is_pair and model and name.isprintable()):
            raise ValueError(f"{one!r} is not NAME=MODEL")
        if name == DEFAULT:
            raise ValueError(f"{DEFAULT} is the name of the server's own model already")
        if found.setdefault(name, model) != model:
            raise ValueError(f"{name!r} is given to two models")
    return found


def public_name(model: str) -> str:
    """What a model is listed as: a folder by its whole path, as upstream does."""
    return str(Path(model).expanduser().resolve()) if is_folder(model) else model


def _downloaded() -> list[str]:
    """Models in the hub's cache that look like ones of mlx-lm; none where there is no cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    wanted = {"config.json", "model.safetensors.index.json", "tokenizer_config.json"}
    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return []
    return sorted(
        one.repo_id
        for one in repositories
        if one.repo_type == "model"
        and "main" in one.refs
        and wanted <= {file.file_path.name for file in one.refs["main"].files}
    )


def _resolved(name: str) -> str:
    """One spelling for a folder; any other name as it is."""
    try:
        path = Path(name).expanduser()
        return os.path.realpath(path) if path.exists() else name
    except (OSError, ValueError, RuntimeError):
        return name


def _is_same_model(name: str, other: str) -> bool:
    return _is_same_folder(_local(name), _local(other))


def _local(name: str) -> Path | None:
    """Where a model is on this machine, by a path or a hub id; None if it is not."""
    found = Path(_resolved(name))
    return found if os.path.isabs(found) else folder_of(name)


def _is_same_folder(one: str | Path | None, other: str | Path | None) -> bool:
    if one is None or other is None:
        return False
    try:
        return os.path.samefile(Path(one).expanduser(), Path(other).expanduser())
    except (OSError, ValueError, RuntimeError):
        return False


def _refuse(sentence: str, param: str = "model", error: Exception | None = None) -> NoReturn:
    raise RefusedError(404, sentence, code="model_not_found", param=param) from error
