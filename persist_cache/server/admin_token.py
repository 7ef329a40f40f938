"""The secret of the admin API, and where the servers of a store answer.

Both are small files in the store's folder, for their owner alone, so that whoever may read the
prompts there may also use the admin API, and nobody else. What is written holds the folder's
`flock`; what is read does not need it, because files are replaced as a whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from persist_cache import fs
from persist_cache.errors import StoreAccessError
from persist_cache.filenames import NEW_TOKEN_FILE, SERVER_FILE, TOKEN_FILE

log = logging.getLogger(__name__)

_TOKEN = re.compile(r"[A-Za-z0-9_-]{32,128}")
_MAX_BYTES = 4096
_PATIENCE_S = 5.0


class AdminToken:
    """The secret of one server: the one given, else the store's, else one in memory alone.

    Thread safety: may be asked by many threads at once.
    """

    def __init__(self, folder: Path, given: str | None = None) -> None:
        """Find the secret, and make one if there is none.

        Args:
            folder: The store's; created for its owner alone if it does not exist.
            given: Use this one instead; nothing is read or written.
        """
        self.is_given = given is not None
        self.trouble = ""
        """Why commands cannot find it, or ""."""
        self._folder = folder
        self._last = given if given is not None else secrets.token_urlsafe(32)
        if given is None:
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                fs.make_folder(folder)
                self._last = _keep(folder, self._last)
            except (OSError, StoreAccessError) as error:
                self.trouble = _reason(error)

    def __call__(self) -> str:
        """The secret as of now: the file may have been replaced, or lost with its folder."""
        if (
            not self.is_given
            and not self.trouble
            and _read(self._folder / TOKEN_FILE) != self._last
        ):
            with contextlib.suppress(OSError, StoreAccessError):
                self._last = _keep(self._folder, self._last)
        return self._last


class Serving(msgspec.Struct, frozen=True):
    """A server that runs, as it says of itself.

    Attributes:
        url: Where it answers.
        own_token: It was given its secret, so the store's is not its.
    """

    url: str
    own_token: bool = False


@contextlib.contextmanager
def announced(folder: Path, serving: Serving) -> Iterator[None]:
    """Let commands know of a server, as long as the block and the process last.

    The file's lock ends with the process, so one that is not locked is that of a dead server.
    """
    path = folder / f"server.{secrets.token_hex(8)}"
    fd = -1
    try:
        with _locked(folder):
            for dead, _ in _server_files(folder, living=False):
                fs.unlink(dead)
            fd = fs.create(path)
            fs.try_lock(fd)
            fs.write_all(fd, [memoryview(msgspec.json.encode(serving))])
    except (OSError, StoreAccessError) as error:
        log.warning("commands cannot find this server: %s", _reason(error))
    try:
        yield
    finally:
        if fd >= 0:
            with contextlib.suppress(OSError):
                fs.unlink(path)
            os.close(fd)


def running_servers(folder: Path) -> list[Serving]:
    """The servers of a store that run, the one that was started last first."""
    found = []
    with contextlib.suppress(OSError):
        files = [(path.stat().st_mtime_ns, raw) for path, raw in _server_files(folder, living=True)]
        for _, raw in sorted(files, reverse=True):
            with contextlib.suppress(msgspec.DecodeError):
                found.append(msgspec.json.decode(raw, type=Serving))
    return found


def stored_token(folder: Path) -> str | None:
    """The store's secret, or None if it has none that can be trusted."""
    return _read(folder / TOKEN_FILE)


def _keep(folder: Path, proposal: str) -> str:
    """The secret that is kept in `folder`; `proposal`, if there is none yet.

    Raises:
        StoreAccessError: The folder is another user's, or others may write there.
        OSError: It cannot be read or written.
    """
    with _locked(folder):
        path = folder / TOKEN_FILE
        found = _read(path)
        if found is not None:
            return found
        if os.path.lexists(path):
            log.warning("%s may have been read by others or is damaged: it is replaced", path)
            proposal = secrets.token_urlsafe(32)
        new = folder / NEW_TOKEN_FILE
        with contextlib.suppress(FileNotFoundError):
            fs.unlink(new)  # whoever left it died
        fd = fs.create(new)
        try:
            fs.write_all(fd, [memoryview(f"{proposal}\n".encode())])
            fs.sync(fd)
        finally:
            os.close(fd)
        fs.rename(new, path)
        fs.sync_folder(folder)
        return proposal


def _read(path: Path) -> str | None:
    """The secret in a file of ours that nobody else can read; None for anything else."""
    raw = _read_own(path)
    text = "" if raw is None else raw.decode("ascii", "replace").strip()
    return text if _TOKEN.fullmatch(text) else None


def _read_own(path: Path) -> bytes | None:
    try:
        # What a pipe says is nothing to wait for.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if not mine or status.st_mode & 0o077:
            return None
        return os.read(fd, _MAX_BYTES)
    except OSError:
        return None
    finally:
        os.close(fd)


def _server_files(folder: Path, *, living: bool) -> list[tuple[Path, bytes]]:
    found = []
    for name in os.listdir(folder):
        path = folder / name
        if not SERVER_FILE.fullmatch(name) or (raw := _read_own(path)) is None:
            continue
        with contextlib.suppress(OSError):
            fd = fs.open_read(path)
            try:
                if fs.try_lock(fd) != living:
                    found.append((path, raw))
            finally:
                os.close(fd)
    return found


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, if it is ours alone to write.

    Raises:
        StoreAccessError: It is not, or somebody holds the lock for long.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            raise StoreAccessError(f"{folder} belongs to another user.")
        if status.st_mode & 0o022:
            raise StoreAccessError(f"Other users may write to {folder}.")
        deadline = time.monotonic() + _PATIENCE_S
        while not fs.try_lock(fd):
            if time.monotonic() > deadline:
                raise StoreAccessError(f"Another process holds {folder} locked.")
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _reason(error: OSError | StoreAccessError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename} cannot be used ({error.strerror})."
    return str(error)
