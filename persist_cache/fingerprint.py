"""Everything that makes a KV cache reusable, as one digest and as readable fields.

A fingerprint is built from *content*, never from a path or a name: a model that is copied,
moved or renamed keeps its cache, and a model whose bytes change under the same name loses it.

How a weights file is identified, in this order:

1. A link into the Hugging Face cache carries the SHA-256 of its content in the blob's name;
   it is believed the first time the blob is seen.
2. A file whose stamp (device, inode, size, mtime, ctime) was seen before keeps the identity
   it had then. The memo of stamps is one small file shared by all processes.
3. Any other file is read to the end. Samples would be cheaper but miss a flipped byte, and
   the bytes have just been, or are about to be, read by the model itself: xxh3-128 keeps up
   with any disk, so the digest costs no more than one more read of warm pages, once per file.

So any change made through the file system is seen, also one of a single byte that restores
mtime: ctime cannot be set. What is not seen, unless `paranoid` reads every byte each time:
a clock turned back or a disk written beneath the file system so that all five numbers repeat,
a writer that keeps the file mapped, and a hub blob damaged before it was first seen. Nor is
an mlx-lm that was edited without a new version; use a `salt` while developing one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeAlias, TypedDict, Unpack

# json, msgspec, importlib.metadata, platformdirs and concurrent.futures are imported where they
# are used: they would more than double the time of this import, and `list` needs none of them.

LAYOUT_VERSION = 1
"""Version of the blob layout; part of every key, so a new layout starts with clean misses."""

ModelKey: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str] | None]
"""What `mlx_lm.server` uses: `(model, adapter or None, draft model or None)`, or just a model."""

Scalar: TypeAlias = str | int | float | bool | None


class FieldChange(NamedTuple):
    """One field that differs; None stands for a field that is absent on that side."""

    name: str
    old: str | None
    new: str | None


@dataclass(frozen=True)
class Fingerprint:
    """Identity of all that makes KV reusable. Equal digests mean: the KV may be shared.

    Build it with `from_fields`, which also makes the values canonical.

    Attributes:
        fields: What is in the key, readable.
        info: Recorded next to it, not in the key: names, paths, versions that do not matter.
        digest: BLAKE2b-256 over the length-prefixed, sorted fields.
    """

    fields: Mapping[str, str] = field(compare=False)
    info: Mapping[str, str] = field(default_factory=dict, compare=False)
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # A caller's dict may change later; the digest could not follow.
        object.__setattr__(self, "fields", MappingProxyType(dict(sorted(self.fields.items()))))
        object.__setattr__(self, "info", MappingProxyType(dict(sorted(self.info.items()))))
        packed = _pack(text for item in self.fields.items() for text in item)
        digest = hashlib.blake2b(packed, digest_size=32, person=b"persist-cache.fp").digest()
        object.__setattr__(self, "digest", digest)

    @property
    def hex(self) -> str:
        return self.digest.hex()

    @classmethod
    def from_fields(
        cls, fields: Mapping[str, Scalar], info: Mapping[str, Scalar] | None = None
    ) -> Fingerprint:
        """Build a fingerprint from named values, in any order.

        The layout version is added unless `fields` has a "layout". Canonical strings stay as
        they are, so building again from `.fields` gives the same digest.

        Raises:
            TypeError: a value is not a str, int, float, bool or None.
            ValueError: a name is empty, or a text is not valid Unicode.
        """
        return cls(
            _canonical_fields({"layout": LAYOUT_VERSION, **fields}), _canonical_fields(info or {})
        )

    def diff(self, other_fields: Mapping[str, str]) -> list[FieldChange]:
        """Name the fields that differ, sorted: from `other_fields` (old) to these (new)."""
        return [
            FieldChange(name, other_fields.get(name), self.fields.get(name))
            for name in sorted(self.fields.keys() | other_fields.keys())
            if other_fields.get(name) != self.fields.get(name)
        ]

    def to_json(self) -> bytes:
        """Encode fields and info; the digest follows from them."""
        import msgspec

        return msgspec.json.encode({"fields": dict(self.fields), "info": dict(self.info)})

    @classmethod
    def from_json(cls, encoded: bytes) -> Fingerprint:
        """Decode what `to_json` made.

        Raises:
            ValueError: `encoded` is something else.
        """
        import msgspec

        try:
            record = msgspec.json.decode(encoded, type=dict[str, dict[str, str]])
            return cls(record["fields"], record.get("info", {}))
        except (msgspec.MsgspecError, KeyError) as error:
            raise ValueError(f"not a stored fingerprint: {error}") from error


@dataclass(frozen=True, slots=True)
class Unidentified:
    """Why a model has no fingerprint; false in a condition. Its KV stays in memory only."""

    reason: str

    def __bool__(self) -> bool:
        return False


class Options(TypedDict, total=False):
    """The keywords of `Identifier`, for functions that pass them on."""

    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
    max_kv_size: int | None
    salt: str
    paranoid: bool
    memo_path: Path | None


class Identifier:
    """Identifies models, each once, for one set of KV options.

    The weights in a process's memory do not change when their files do. So the first answer
    for a model key stands, good or bad, until `forget`: a later look at the files could name
    bytes that the loaded model never had, and store its KV under them. Ask as soon as a model
    is loaded (a hub id may only then be in the local cache), and `forget` before loading one
    again.

    Thread safety: one lock is held while a model is identified, so that two threads never
    read the same weights at once; after that a call is a dictionary look-up.

    Args:
        kv_bits: Bits of the quantized KV cache, or None.
        kv_group_size: Its group size; in the key only with `kv_bits`.
        quantized_kv_start: Token at which quantization begins; in the key only with `kv_bits`.
        max_kv_size: Size of a rotating KV cache, or None.
        salt: Isolates users from each other. Only its digest is kept.
        paranoid: Believe neither the memo nor blob names; read all bytes with SHA-256. Plain
            files then get another identity than without, so switching is a clean miss.
        memo_path: Memo of file stamps. Default: `weights.json` in `$PERSIST_CACHE_HOME` or
            else in the user's cache folder.

    Raises:
        TypeError: an option is not of its type.
    """

    def __init__(
        self,
        *,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 5000,
        max_kv_size: int | None = None,
        salt: str = "",
        paranoid: bool = False,
        memo_path: Path | None = None,
    ) -> None:
        fields: dict[str, Scalar] = {"kv_bits": kv_bits, "max_kv_size": max_kv_size}
        if kv_bits is not None:
            fields |= {"kv_group_size": kv_group_size, "quantized_kv_start": quantized_kv_start}
        if salt:
            fields["salt"] = _blake2b(salt.encode("utf-8", "surrogatepass"))
        self._option_fields = _canonical_fields(fields)
        self._paranoid = paranoid
        self._memo_path = memo_path
        self._lock = threading.Lock()
        self._results: dict[_Parts, Fingerprint | Unidentified] = {}
        self._loads: Counter[_Parts | None] = Counter()

    def __call__(self, model_key: ModelKey | None) -> Fingerprint | None:
        """Return the model's fingerprint, or None when it cannot be identified.

        Never raises for anything found, or not found, on the disk.
        """
        result = self.look_up(model_key)
        return result if isinstance(result, Fingerprint) else None

    def reason(self, model_key: ModelKey | None) -> str:
        """Say why the model cannot be identified; "" when it can."""
        result = self.look_up(model_key)
        return result.reason if isinstance(result, Unidentified) else ""

    def look_up(self, model_key: ModelKey | None) -> Fingerprint | Unidentified:
        """Return the model's fingerprint, or the reason why it has none."""
        try:
            parts = _split_model_key(model_key)
        except _CannotIdentify as error:
            return Unidentified(str(error))
        with self._lock:
            if parts not in self._results:
                self._results[parts] = self._identify(*parts)
            return self._results[parts]

    def settled(self, model_key: ModelKey | None) -> Fingerprint | Unidentified | None:
        """Return the answer that stands for a model; None when there is none. Reads no file."""
        try:
            return self._results.get(_split_model_key(model_key))
        except _CannotIdentify as error:
            return Unidentified(str(error))

    def load_number(self, model_key: ModelKey | None) -> int:
        """Return a number that grows whenever the answer for a model was forgotten."""
        try:
            return self._loads[None] + self._loads[_split_model_key(model_key)]
        except _CannotIdentify:
            return self._loads[None]

    def forget(self, model_key: ModelKey | None = None) -> None:
        """Look at the files again when a model is asked for next.

        Args:
            model_key: The only one to be forgotten; all are when it is None.
        """
        try:
            parts = None if model_key is None else _split_model_key(model_key)
        except _CannotIdentify:
            return  # it never had an answer
        with self._lock:
            self._loads[parts] += 1
            if parts is None:
                self._results.clear()
            else:
                self._results.pop(parts, None)

    def _identify(
        self, model: str, adapter: str | None, draft: str | None
    ) -> Fingerprint | Unidentified:
        try:
            contents = _Contents(self._memo_path or _default_memo_path(), self._paranoid)
            fields, info = _describe_model(model, contents)
            if adapter is not None:
                fields |= _prefixed("adapter.", _describe_adapter(Path(adapter), contents))
                info["adapter"] = _printable(adapter)
            if draft is not None:
                draft_fields, draft_info = _describe_model(draft, contents)
                fields |= _prefixed("draft.", draft_fields)
                info |= _prefixed("draft.", draft_info)
            fields |= {"mlx_lm": _installed_version("mlx-lm"), **self._option_fields}
            info |= {"mlx": _installed_version("mlx"), "device": _device()}
            return Fingerprint.from_fields(fields, info)
        except _CannotIdentify as error:
            return Unidentified(str(error))
        except OSError as error:
            where = f": {_printable(error.filename)}" if error.filename is not None else ""
            return Unidentified(f"{error.strerror or error}{where}")
        except (ValueError, RuntimeError) as error:
            # Undecodable or absurdly nested files; a user without a home folder.
            return Unidentified(f"{_printable(model)}: {error}")


def identify_or_reason(
    model_key: ModelKey | None, **options: Unpack[Options]
) -> Fingerprint | Unidentified:
    """Identify a model by its files, or say why that cannot be done.

    Args:
        model_key: See `ModelKey`. A hub id is resolved through the local cache only.
        **options: The keywords of `Identifier`.
    """
    return Identifier(**options).look_up(model_key)


def identify(model_key: ModelKey | None, **options: Unpack[Options]) -> Fingerprint | None:
    """Identify a model by its files; None when it cannot be identified.

    Args:
        model_key: See `ModelKey`. A hub id is resolved through the local cache only.
        **options: The keywords of `Identifier`.
    """
    return Identifier(**options)(model_key)


class _CannotIdentify(Exception):
    """Carries the reason from where it is found to `Identifier`; never leaves this module."""


# Fields ------------------------------------------------------------------------------------


def _canonical_fields(fields: Mapping[str, Scalar]) -> dict[str, str]:
    for name in fields:
        if not isinstance(name, str) or not name:
            raise ValueError(f"a field needs a name, not {name!r}")
    return {name: _canonical(value) for name, value in fields.items()}


def _canonical(value: Scalar) -> str:
    # bool before int, and no repr() of subclasses: enums and NumPy scalars print differently.
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return int.__repr__(value)
        case float():
            return float.__repr__(value)
        case str():
            return str.__str__(value)
    raise TypeError(f"a field is str, int, float, bool or None, not {type(value).__name__}")


def _pack(texts: Iterable[str]) -> bytes:
    """Join texts so that no other list of texts gives the same bytes."""
    encoded = [text.encode() for text in texts]
    return b"".join(len(text).to_bytes(8, "little") + text for text in encoded)


def _prefixed(prefix: str, fields: Mapping[str, str]) -> dict[str, str]:
    return {prefix + name: value for name, value in fields.items()}


def _blake2b(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def _printable(text: str | os.PathLike[str]) -> str:
    """Make a text storable: paths and JSON may hold what is not valid Unicode."""
    return os.fspath(text).encode("utf-8", "backslashreplace").decode()


def _installed_version(distribution: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _device() -> str:
    system = os.uname()
    return f"{system.sysname} {system.machine}"


# Models ------------------------------------------------------------------------------------


_Parts: TypeAlias = tuple[str, str | None, str | None]


def _split_model_key(model_key: ModelKey | None) -> _Parts:
    if isinstance(model_key, str | os.PathLike):
        model_key = (model_key,)
    if not isinstance(model_key, tuple | list) or not model_key or model_key[0] is None:
        raise _CannotIdentify("no model is named")
    if len(model_key) > 3:
        # A later mlx-lm would say here what else its KV depends on.
        raise _CannotIdentify(f"a model key of {len(model_key)} parts is not known")
    parts = [os.fspath(part) if isinstance(part, os.PathLike) else part for part in model_key]
    if not all(part is None or (isinstance(part, str) and part) for part in parts):
        raise _CannotIdentify("a part of the model key is empty or not a text")
    model, adapter, draft = [*parts, None, None][:3]
    assert model is not None
    return model, adapter, draft


def _describe_model(name: str, contents: _Contents) -> tuple[dict[str, str], dict[str, str]]:
    """Return the fields and the info of one model, as `mlx_lm.utils.load_model` reads it."""
    folder, commit = _locate(name)
    config = _read_config(folder / "config.json")
    model_type = config.get("model_type")
    weights = sorted(
        path
        for path in folder.iterdir()
        if path.name.startswith("model") and path.name.endswith(".safetensors")
    )
    if not weights:
        raise _CannotIdentify(f"{_printable(name)}: no model*.safetensors")
    fields = {
        "model_type": _printable(model_type) if isinstance(model_type, str) else "",
        "config": _digest_config(config),
        "weights": contents.identify(weights),
    }
    # ModelOpt exports keep their quantization here; mlx-lm merges it into the config.
    quantization = folder / "hf_quant_config.json"
    if quantization.exists():
        fields["quant_config"] = _digest_config(_read_config(quantization))
    if (model_file := config.get("model_file")) is not None:
        fields["model_file"] = _blake2b(_read_regular(folder / str(model_file)))
    info = {
        "name": _printable(name),
        "path": _printable(folder.absolute()),
        "tokenizer": _digest_tokenizer(folder, contents),
        "chat_template": _digest_chat_template(folder),
    }
    if commit:
        info["commit"] = commit
    return fields, {key: value for key, value in info.items() if value}


def _describe_adapter(folder: Path, contents: _Contents) -> dict[str, str]:
    return {
        "config": _digest_config(_read_config(folder / "adapter_config.json")),
        "weights": contents.identify([folder / "adapters.safetensors"]),
    }


def _locate(name: str) -> tuple[Path, str]:
    """Return a model's folder and, for a hub id, its commit; by the rules of mlx-lm."""
    path = Path(name)
    if path.exists():
        return path, ""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise _CannotIdentify(f"{_printable(name)}: no such folder")
    if os.environ.get("MLXLM_USE_MODELSCOPE", "").lower() == "true":
        raise _CannotIdentify(f"{name}: models of ModelScope are identified by their folder only")
    repository = _hub_cache() / f"models--{name.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except FileNotFoundError:
        raise _CannotIdentify(
            f"{name}: no such folder, and not in the Hugging Face cache"
        ) from None
    if not re.fullmatch(r"\w+", commit):
        raise _CannotIdentify(f"{name}: refs/main in the Hugging Face cache names no commit")
    return repository / "snapshots" / commit, commit


def _hub_cache() -> Path:
    """Return the folder that huggingface_hub uses; importing it takes a third of a second."""

    def expand(path: str) -> str:
        return os.path.expandvars(Path(path).expanduser())

    env = os.environ
    home = env.get("HF_HOME") or str(Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE")
    return Path(expand(hub)) if hub else Path(expand(home)) / "hub"


def _read_config(path: Path) -> dict[str, object]:
    import json

    try:
        config = json.loads(_read_regular(path))
    except ValueError as error:
        raise _CannotIdentify(f"{_printable(path)} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise _CannotIdentify(f"{_printable(path)} is not a JSON object")
    return config


def _digest_config(config: dict[str, object]) -> str:
    import json

    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return _blake2b(canonical.encode())


def _read_regular(path: Path) -> bytes:
    # Opening a FIFO would block the caller for ever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise _CannotIdentify(f"{_printable(path)} is not a file")
    return path.read_bytes()


def _digest_tokenizer(folder: Path, contents: _Contents) -> str:
    for name in ("tokenizer.json", "tokenizer.model"):
        try:
            return contents.identify([folder / name])
        except (OSError, _CannotIdentify):
            continue
    return ""


def _digest_chat_template(folder: Path) -> str:
    try:
        return _blake2b(_read_regular(folder / "chat_template.jinja"))
    except (OSError, _CannotIdentify):
        pass
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            template = _read_config(folder / name).get("chat_template")
        except (OSError, RecursionError, _CannotIdentify):
            continue
        if template:
            return _digest_config({"chat_template": template})
    return ""


# Contents ----------------------------------------------------------------------------------

_MEMO_VERSION = 1
_MEMO_RECORDS = 1024
"""Bounds the memo to about 150 KiB; the largest models have some 160 weights files."""

_SETTLED_NS = 2_000_000_000
"""A file changed again within the tick of its file system's clock (2 s on FAT) keeps its stamp.

Only a stamp older than this is remembered: git's "racy" rule.
"""

_HASH_THREADS = 4
_IDENTITY = re.compile(r"sha256:[0-9a-f]{64}|xxh3-128:[0-9a-f]{32}")

_SHA256 = "sha256"
_XXH3 = "xxh3-128"


class _Stamp(NamedTuple):
    """What the file system changes whenever it changes a file."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Stamp:
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )


class _Record(NamedTuple):
    """The identity (`algorithm:hex`) that a file had when it had this stamp."""

    stamp: _Stamp
    identity: str

    @property
    def slot(self) -> tuple[int, int, str]:
        return self.stamp.device, self.stamp.inode, self.identity.partition(":")[0]


class _MemoFile(TypedDict):
    version: int
    records: list[_Record]


class _Contents:
    """Content identities of files: from blob names, from the memo, or by reading them."""

    def __init__(self, memo_path: Path, paranoid: bool) -> None:
        self._memo = _Memo(memo_path)
        self._paranoid = paranoid

    def identify(self, paths: Sequence[Path]) -> str:
        """Return one identity for a set of files, whatever their names and order.

        Raises:
            OSError: a file is missing or unreadable.
            _CannotIdentify: a path is no regular file, or the file changes while it is read.
        """
        asked_ns = time.time_ns()
        known: list[_Record] = []
        unread: list[tuple[Path, str]] = []
        for path in paths:
            record = self._recall(path)
            if isinstance(record, _Record):
                known.append(record)
            else:
                unread.append((path, record))
        known += self._read_all(unread)
        self._memo.learn(
            record
            for record in known
            if asked_ns - max(record.stamp.mtime_ns, record.stamp.ctime_ns) >= _SETTLED_NS
        )
        identities = sorted(record.identity for record in known)
        return identities[0] if len(identities) == 1 else "blake2b:" + _blake2b(_pack(identities))

    def _recall(self, path: Path) -> _Record | str:
        """Return what is known of the file, or the algorithm to read it with."""
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _CannotIdentify(f"{_printable(path)} is not a file")
        stamp = _Stamp.of(status)
        blob_name = _hub_blob_name(path)
        # The algorithm follows from the file alone, never from what the memo happens to hold.
        algorithm = _SHA256 if blob_name or self._paranoid else _XXH3
        if self._paranoid:
            return algorithm
        record = self._memo.get(stamp, algorithm)
        if record is not None and record.stamp == stamp:
            return record
        if record is None and blob_name:
            return _Record(stamp, f"{_SHA256}:{blob_name}")
        # A blob is written once and renamed; if its stamp moved, its name proves nothing.
        return algorithm

    def _read_all(self, files: Sequence[tuple[Path, str]]) -> list[_Record]:
        if len(files) < 2:
            return [_read_identity(*file) for file in files]
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(_HASH_THREADS, "persist-cache-fingerprint") as pool:
            return list(pool.map(lambda file: _read_identity(*file), files))


def _read_identity(path: Path, algorithm: str) -> _Record:
    import xxhash

    with path.open("rb", buffering=0) as file:
        stamp = _Stamp.of(os.fstat(file.fileno()))
        digest = hashlib.file_digest(
            file, hashlib.sha256 if algorithm == _SHA256 else xxhash.xxh3_128
        )
        if _Stamp.of(os.fstat(file.fileno())) != stamp:
            raise _CannotIdentify(f"{_printable(path)} was changed while it was read")
    return _Record(stamp, f"{algorithm}:{digest.hexdigest()}")


def _hub_blob_name(path: Path) -> str | None:
    """Return the SHA-256 in the name of the hub blob that `path` links to, if it does.

    Follows link by link: since huggingface_hub 2 a repository's blob may itself be a link into
    a store shared by all repositories, where the 64 hex digits are a Xet hash instead.
    """
    link = path
    for _ in range(8):
        if not link.is_symlink():
            return None
        target = link.parent / link.readlink()
        link = target.parent.resolve() / target.name
        if (
            re.fullmatch(r"[0-9a-f]{64}", link.name)
            and link.parent.name == "blobs"
            and link.parent.parent.name.startswith("models--")
        ):
            return link.name
    return None


class _Memo:
    """Identities of files by stamp, in one JSON file.

    A hint that saves reading: when it is missing, damaged or read-only, files are read again.
    Processes share it without a lock: it is replaced whole, and what the last writer
    overwrites is only learnt again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[tuple[int, int, str], _Record] | None = None

    def get(self, stamp: _Stamp, algorithm: str) -> _Record | None:
        """Return the record of the same inode; its stamp may be an older one."""
        if self._records is None:
            self._records = self._load()
        return self._records.get((stamp.device, stamp.inode, algorithm))

    def learn(self, records: Iterable[_Record]) -> None:
        """Remember `records`, the newest `_MEMO_RECORDS` of all; writes only what is new."""
        learnt = {record.slot: record for record in records}
        if not learnt or learnt.items() <= (self._records or {}).items():
            return
        older = {slot: record for slot, record in self._load().items() if slot not in learnt}
        newest = [*older.values(), *learnt.values()][-_MEMO_RECORDS:]
        self._records = {record.slot: record for record in newest}
        self._store(newest)

    def _load(self) -> dict[tuple[int, int, str], _Record]:
        import msgspec

        try:
            memo = msgspec.json.decode(_read_regular(self._path), type=_MemoFile)
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError, _CannotIdentify):
            return {}
        if memo["version"] != _MEMO_VERSION:
            return {}
        return {
            record.slot: record
            for record in memo["records"]
            if _IDENTITY.fullmatch(record.identity)
        }

    def _store(self, records: list[_Record]) -> None:
        import msgspec

        encoded = msgspec.json.encode(_MemoFile(version=_MEMO_VERSION, records=records))
        temporary = self._path.with_name(f".{self._path.name}.{os.urandom(8).hex()}.tmp")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Not synced: a memo torn by a power cut is read as none.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(encoded)
            temporary.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _default_memo_path() -> Path:
    if home := os.environ.get("PERSIST_CACHE_HOME"):
        return Path(home).expanduser() / "weights.json"
    import platformdirs

    return Path(platformdirs.user_cache_dir("persist-cache", appauthor=False)) / "weights.json"
