"""What a store has to live with: versions, disk, limits, the model's cache classes.

Everything is looked at or measured, never assumed. Nothing here imports MLX unless it is asked
about a model. The only thing written is a small file without a name in the store's folder.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from persist_cache import __version__, fs
from persist_cache.fingerprint.versions import installed_version
from persist_cache.prefill.clock import Rate
from persist_cache.system import volumes
from persist_cache.system.mounts import Mounts

if TYPE_CHECKING:
    from persist_cache.queries.totals import Survey
    from persist_cache.store.store import Store
    from persist_cache.tensors import LayerStatus

PACKAGES = ("mlx", "mlx-lm", "lmdb", "safetensors", "msgspec", "xxhash", "click")
PROBE_BYTES = 8 << 20
MLX_LM_OPEN_FILES = (2048, 4096)
"""Soft and hard limit of open files that mlx-lm sets when it is imported."""
_SYNCS = 5
_MAX_EXAMINED = 64


@dataclass(frozen=True, slots=True)
class Machine:
    """What the programs run on; `memory_bytes` is 0 where it cannot be told."""

    system: str
    machine: str
    cpus: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of a store, or the place where it would be made.

    Attributes:
        path: The folder.
        exists: It is there, and is a folder.
        is_taken: Something that is no folder has its name.
        owner: Name of its owner; of the nearest folder above while it does not exist.
        is_ours: The owner is who asks.
        mode: Permission bits, None while it does not exist.
        writable: Files can be made in it, or it can be made.
        file_system: Type, such as `apfs`; "" where it cannot be told.
        free_bytes: That may be written to the file system.
        total_bytes: Size of the file system.
    """

    path: str
    exists: bool
    is_taken: bool
    owner: str
    is_ours: bool
    mode: int | None
    writable: bool
    file_system: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Measured in the store's folder.

    Attributes:
        nbytes: Length of the file.
        write_bytes_per_s: Written and made durable.
        read_bytes_per_s: Read again, past the page cache where that can be asked for.
        sync_s: Median time of making a small write durable.
    """

    nbytes: int
    write_bytes_per_s: float
    read_bytes_per_s: float
    sync_s: float


@dataclass(frozen=True, slots=True)
class ModelCache:
    """How the KV cache of a model can be stored.

    Attributes:
        model: As it was named.
        fingerprint: Hex digest of its identity, "" when it cannot be identified.
        reason: Why it cannot be identified or loaded, or "".
        layers: Per layer, in order; empty when it cannot be loaded.
        device: Where MLX would run it, or "".
    """

    model: str
    fingerprint: str
    reason: str
    layers: tuple[LayerStatus, ...] = ()
    device: str = ""

    @property
    def storable(self) -> bool:
        return bool(self.fingerprint and self.layers) and all(
            layer.storage != "unsupported" for layer in self.layers
        )


@dataclass(frozen=True, slots=True)
class BreakEven:
    """From which length on reading a prompt from disk is faster than computing it.

    Attributes:
        fingerprint: Of the model.
        model: Its name.
        prefill_tokens_per_s: Measured when its entries were computed; long pieces count for more.
        bytes_per_token: Of its KV on disk.
        tokens: The length; None when computing is always faster.
    """

    fingerprint: str
    model: str
    prefill_tokens_per_s: float
    bytes_per_token: float
    tokens: int | None


def versions() -> dict[str, str]:
    """Of Python, this package and what it builds on; "" for what is not installed."""
    return {
        "python": platform.python_version(),
        "persist-cache": __version__,
        **{name: installed_version(name) for name in PACKAGES},
    }


def machine() -> Machine:
    """Look at the machine."""
    memory = 0
    with contextlib.suppress(ValueError, OSError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    system = os.uname()
    return Machine(
        f"{system.sysname} {system.release}", system.machine, os.cpu_count() or 1, memory
    )


def open_files_limit() -> tuple[int, int]:
    """Soft and hard limit of open files; -1 for none."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        -1 if soft == resource.RLIM_INFINITY else soft,
        -1 if hard == resource.RLIM_INFINITY else hard,
    )


def look_at_folder(path: Path) -> Folder:
    """Look at a store's folder; changes nothing."""
    place = path
    while not _exists(place) and place != place.parent:
        place = place.parent
    status = place.stat()
    exists = place == path and stat.S_ISDIR(status.st_mode)
    space = volumes.space(place)
    may_write = os.access(place, os.W_OK | os.X_OK) and stat.S_ISDIR(status.st_mode)
    return Folder(
        path=str(path),
        exists=exists,
        is_taken=place == path and not exists,
        owner=_user(status.st_uid),
        is_ours=status.st_uid == os.geteuid(),
        mode=stat.S_IMODE(status.st_mode) if exists else None,
        writable=may_write and not space.read_only,
        file_system=Mounts().kind(place),
        free_bytes=space.free_bytes,
        total_bytes=space.total_bytes,
    )


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        return False
    return True


def _user(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def measure_disk(root: Path, nbytes: int = PROBE_BYTES) -> DiskSpeed:
    """Write, sync and read a file in the folder `root`.

    It has no name while there is anything in it, so it goes with this process in any case; a
    store removes the empty one that is left if the process dies in between.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    path = root / f"doctor.{secrets.token_hex(8)}"
    content = memoryview(os.urandom(1 << 20) * (nbytes >> 20))  # random: some disks compress
    fd = fs.create(path)
    try:
        fs.unlink(path)
        fs.bypass_cache(fd)
        fs.allocate(fd, len(content))
        started = time.perf_counter()
        fs.write_all(fd, [content])
        fs.sync(fd)
        written = time.perf_counter() - started
        fs.drop_cache(fd)
        buffer = memoryview(bytearray(len(content)))
        started = time.perf_counter()
        fs.read_into(fd, 0, [buffer])
        read = time.perf_counter() - started
        syncs = sorted(_time_sync(fd) for _ in range(_SYNCS))
    finally:
        os.close(fd)
    return DiskSpeed(len(content), len(content) / written, len(content) / read, syncs[_SYNCS // 2])


def _time_sync(fd: int) -> float:
    started = time.perf_counter()
    os.pwrite(fd, os.urandom(4096), 0)
    fs.sync(fd)
    return time.perf_counter() - started


def break_even(store: Store, survey: Survey, disk: DiskSpeed) -> list[BreakEven]:
    """Estimate, per model, from how many tokens on the disk beats prefill.

    Prefill rates come from entries whose computation was timed, each by what it cost beyond the
    one it continues; models without any are left out. Reading costs a fixed time (a look-up and
    opening the first blob, measured) and then goes at the speed of the disk.
    """
    from persist_cache.queries.details import details_of

    found = []
    for fingerprint, rate in _rates(survey).items():
        example = max(
            (one for one in survey.entries if one.fingerprint == fingerprint),
            key=lambda one: one.num_tokens,
        )
        details = details_of(store, example.id)
        if details is None:
            continue  # evicted meanwhile
        nbytes = sum(run.nbytes * run.num_tokens / run.blob_tokens for run in details.runs)
        if details.checkpoint is not None:
            nbytes += details.checkpoint.nbytes
        per_token = nbytes / example.num_tokens
        gained = rate.token_s - per_token / disk.read_bytes_per_s
        fixed = _time_open(store, Path(details.runs[0].path))
        tokens = max(1, round(fixed / gained)) if gained > 0 else None
        name = details.model.name
        found.append(BreakEven(fingerprint, name, 1 / rate.token_s, per_token, tokens))
    return sorted(found, key=lambda one: one.model)


def _rates(survey: Survey) -> dict[str, Rate]:
    """Per fingerprint the speed of prefill, where any was timed."""
    entries = {entry.id: entry for entry in survey.entries}
    rates: dict[str, Rate] = {}
    for entry in entries.values():
        if entry.prefill_s > 0:
            above = entries.get(entry.parent or "")
            while above is not None and above.prefill_s <= 0:
                above = entries.get(above.parent or "")
            start, cost = (0, 0.0) if above is None else (above.num_tokens, above.prefill_s)
            rate = rates.setdefault(entry.fingerprint, Rate())
            rate.add(entry.num_tokens - start, entry.prefill_s - cost)
    return {fingerprint: rate for fingerprint, rate in rates.items() if rate.num_tokens}


def _time_open(store: Store, blob: Path) -> float:
    """Seconds until the first byte of KV could be read."""
    from persist_cache.blobs.reader import BlobReader
    from persist_cache.errors import StoreError

    started = time.perf_counter()
    with store.read() as txn:
        txn.blob_number(bytes.fromhex(blob.stem))
    with contextlib.suppress(OSError, StoreError), BlobReader(blob):
        pass
    return time.perf_counter() - started


def look_at_model(model: str, folder: Path, fingerprint: str) -> ModelCache:
    """Make a model's empty cache, without reading its weights, and see which layers can be saved.

    Args:
        model: As the user named it.
        folder: Where its files are.
        fingerprint: Hex digest of its identity.

    Raises:
        MissingDependencyError: MLX or mlx-lm is not installed.
    """
    from persist_cache import tensors

    try:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        loaded, _ = load_model(folder, lazy=True)
        layers = tuple(tensors.supported(list(make_prompt_cache(loaded))))
        device = str(mx.default_device())
    except Exception as error:  # mlx-lm raises whatever it likes
        said = str(error).strip().splitlines()
        return ModelCache(model, fingerprint, said[0] if said else type(error).__name__)
    return ModelCache(model, fingerprint, "", layers, device)
