"""The secret of the admin API.

It is a small file in the store's folder, for its owner alone, so that whoever may read the prompts
there may also use the admin API, and nobody else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from pathlib import Path

from persist_cache import fs
from persist_cache.errors import StoreAccessError
from persist_cache.filenames import NEW_TOKEN_FILE, TOKEN_FILE
from persist_cache.server.own_files import locked, read_own, reason

log = logging.getLogger(__name__)

_TOKEN = re.compile(r"[A-Za-z0-9_-]{32,128}")


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
                self.trouble = reason(error, folder)

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

    def renew(self) -> None:
        """See that it is in the folder, if there is one: it may have been unusable before."""
        if self.is_given or not os.path.isdir(self._folder):  # Path.is_dir may raise
            return
        if self.trouble or _read(self._folder / TOKEN_FILE) != self._last:
            try:
                self._last = _keep(self._folder, self._last)
                self.trouble = ""
            except (OSError, StoreAccessError) as error:
                self.trouble = reason(error, self._folder)


def stored_token(folder: Path) -> str | None:
    """The store's secret, or None if it has none that can be trusted."""
    return _read(folder / TOKEN_FILE)


def _keep(folder: Path, proposal: str) -> str:
    """The secret that is kept in `folder`; `proposal`, if there is none yet.

    Raises:
        StoreAccessError: The folder is another user's, or others may write there.
        OSError: It cannot be read or written.
    """
    with locked(folder):
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
    raw = read_own(path)
    text = "" if raw is None else raw.decode("ascii", "replace").strip()
    return text if _TOKEN.fullmatch(text) else None
