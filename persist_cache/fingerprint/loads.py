"""What a model's files were while it was loaded: the identity belongs to the load.

KV is right only for the weights that computed it, and files can be replaced at any time. So the
files are looked at before a model is loaded, and identified after; if they were changed in
between, nobody knows what was loaded. What `persist_cache.load` has loaded is remembered here
for the whole process, as long as the model lives.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from persist_cache.fingerprint.contents import ChangedMeanwhile, Contents
from persist_cache.fingerprint.memo import default_memo_path
from persist_cache.fingerprint.model_files import Parts, describe
from persist_cache.fingerprint.reading import CannotIdentify, printable

log = logging.getLogger(__name__)

T = TypeVar("T")

LOAD_NUMBERS = itertools.count(1)
"""Numbers of loads; none is given twice in a process."""


class Description(NamedTuple):
    """Fields and info of a model's files; the options of the KV are still missing."""

    fields: dict[str, str]
    info: dict[str, str]


@dataclass(frozen=True, slots=True)
class Unidentified:
    """Why a model has no fingerprint; false in a condition. Its KV stays in memory only."""

    reason: str

    def __bool__(self) -> bool:
        return False


class Files(NamedTuple):
    """Where and how to look at the files of a model.

    Attributes:
        parts: The model key.
        memo_path: Memo of file stamps, None for the default one.
        paranoid: Read every byte.
        folder: Where the model is, if `parts` does not say.
    """

    parts: Parts
    memo_path: Path | None = None
    paranoid: bool = False
    folder: Path | None = None

    def describe(self) -> Description | Unidentified:
        """Describe the files as they are now."""
        return self.describe_with(self.contents())

    def describe_with(self, contents: Contents) -> Description | Unidentified:
        """Describe the files; `contents` looks at them and takes notes."""
        try:
            return Description(*describe(self.parts, contents, self.folder))
        except ChangedMeanwhile as error:
            return _Changed(str(error))
        except CannotIdentify as error:
            return Unidentified(str(error))
        except OSError as error:
            where = f": {printable(error.filename)}" if error.filename is not None else ""
            return Unidentified(f"{error.strerror or error}{where}")
        except (ValueError, RuntimeError) as error:
            # Undecodable or absurdly nested files; a user without a home folder.
            return Unidentified(f"{printable(self.parts[0])}: {error}")

    def contents(self, *, only_look: bool = False) -> Contents:
        """Make what looks at the files."""
        memo_path = self.memo_path or default_memo_path()
        return Contents(memo_path, self.paranoid, only_look=only_look)


def around_load(files: Files, load: Callable[[], T]) -> tuple[T, Description | Unidentified]:
    """Load a model, and describe the files that it was loaded from.

    If files are changed meanwhile, the model is loaded once more.

    Args:
        files: What the model is made of.
        load: Loads it. All of its weights must have been read when this returns: MLX reads
            lazily, until `mx.eval`. What it raises goes through.

    Returns:
        What `load` returned last, and the description, or why there is none.
    """
    value, described, changed = _load_once(files, load)
    if changed:
        log.warning("%s was changed while the model was loaded; it is loaded again", changed)
        del value  # two of them may not fit
        value, described, changed = _load_once(files, load)
    if changed:
        described = Unidentified(
            f"{printable(files.parts[0])}: {changed} was changed while the model was loaded, "
            "twice in a row"
        )
    return value, described


def _load_once(files: Files, load: Callable[[], T]) -> tuple[T, Description | Unidentified, str]:
    """As `around_load`; returns also which file was changed meanwhile, "" if none was."""
    before = files.contents(only_look=True)
    files.describe_with(before)
    stale = _stale_module(before.code)
    value = load()
    after = files.contents()
    described = files.describe_with(after)
    if isinstance(described, Unidentified) and not isinstance(described, _Changed):
        # Nothing that another load would change.
        return value, described, ""
    changed = printable(after.changed_since(before))
    stale = stale or _stale_module(after.code)
    if stale and not changed:
        described = Unidentified(
            f"{printable(files.parts[0])}: this process has loaded another module {stale!r}, "
            "whose code takes the place of the model's; restart it"
        )
    return value, described, changed


class _Changed(Unidentified):
    """For now only: a file was changed while it was looked at."""


# Modules -----------------------------------------------------------------------------------

_offered: dict[str, str] = {}
"""Digests of the importable files of the models that this process loaded, by relative path."""


def _stale_module(code: Mapping[str, str]) -> str:
    """Name a module that Python has loaded from elsewhere, and will not load from a model's file.

    An import is served from `sys.modules`, whatever has become of the file since.
    """
    for path, digest in code.items():
        parts = list(Path(path).with_suffix("").parts)
        parts[-1] = parts[-1].partition(".")[0]
        if parts[-1] == "__init__":
            parts.pop()
        # Any folder on the way may be the one that is searched.
        names = {".".join(parts[start:]) for start in range(len(parts))}
        for name in sorted(names & sys.modules.keys()):
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and _offered.get(path) != digest:
                return name
        _offered[path] = digest
    return ""


# What this process has loaded --------------------------------------------------------------


class Load(NamedTuple):
    """One load by `persist_cache.load`.

    Attributes:
        number: Of `LOAD_NUMBERS`.
        described: What was loaded.
        model: The model, while it lives.
        beyond_files: Why the files of its model key do not tell what was loaded; "" if they do.
    """

    number: int
    described: Description | Unidentified
    model: weakref.ReferenceType[object]
    beyond_files: str = ""


_loads: dict[tuple[str, str | None], Load] = {}
_loads_lock = threading.Lock()


def remember(
    model: str,
    adapter: str | None,
    loaded: object,
    described: Description | Unidentified,
    beyond_files: str = "",
) -> None:
    """Remember what `loaded` is made of, for all who ask, as long as it lives."""
    with _loads_lock:
        number = next(LOAD_NUMBERS)
        _loads[model, adapter] = Load(number, described, weakref.ref(loaded), beyond_files)


def latest_load(model: str, adapter: str | None) -> Load | None:
    """Return the latest load of a model that lives; None when it was not loaded here."""
    with _loads_lock:
        for key in [key for key, load in _loads.items() if load.model() is None]:
            del _loads[key]
        found = _loads.get((model, adapter))
        if found is None and adapter is None:
            for (name, other), load in _loads.items():
                if name == model:
                    reason = (
                        f"{printable(name)}: it was loaded with the adapter "
                        f"{printable(other or '')}, which the model key has to name"
                    )
                    return load._replace(described=Unidentified(reason), beyond_files=reason)
        return found
