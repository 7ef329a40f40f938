"""macOS: keep a folder out of Time Machine's backups and Spotlight's index.

Neither knows CACHEDIR.TAG. What a store holds changes all day and can be computed again, and
local snapshots keep the blocks of files that were evicted. All of this is a courtesy to the user:
what fails is not an error.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from persist_cache import fs
from persist_cache.filenames import UNSEARCHED_FILE
from persist_cache.system import volumes

ATTRIBUTE = b"com.apple.metadata:com_apple_backup_excludeItem"
_BACKED_UP = ("apfs", "hfs")


def exclude(folder: Path) -> None:
    """Keep `folder` out of backups and the search index, where there are such; never fails."""
    with contextlib.suppress(OSError):
        kind = volumes.kind(folder)
        if not kind:
            return
        with contextlib.suppress(FileExistsError):
            os.close(fs.create(folder / UNSEARCHED_FILE))
        # On other file systems attributes become files of their own, and nothing is backed up.
        if kind in _BACKED_UP and not is_excluded(folder):
            _set_attribute(os.fsencode(folder), ATTRIBUTE, _value())


def is_excluded(folder: Path) -> bool:
    """Whether the folder carries the mark that keeps it out of backups."""
    with contextlib.suppress(OSError):
        return _attribute(os.fsencode(folder), ATTRIBUTE) == _value()
    return False


def _value() -> bytes:
    """What `tmutil addexclusion` sets on a folder, and backups look for."""
    import plistlib

    return plistlib.dumps("com.apple.backupd", fmt=plistlib.FMT_BINARY)


def _set_attribute(path: bytes, name: bytes, value: bytes) -> None:
    """macOS's `setxattr`, which Python does not have there."""
    _call("setxattr", path, name, value, len(value))


def _attribute(path: bytes, name: bytes) -> bytes:
    """macOS's `getxattr`."""
    import ctypes

    buffer = bytearray(1024)
    memory = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    nbytes = _call("getxattr", path, name, memory, len(buffer))
    return bytes(buffer[:nbytes])


def _call(function: str, path: bytes, name: bytes, value: Any, nbytes: int) -> int:
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), function)
    call.restype = ctypes.c_ssize_t if function == "getxattr" else ctypes.c_int
    done: int = call(
        ctypes.c_char_p(path),
        ctypes.c_char_p(name),
        value,
        ctypes.c_size_t(nbytes),
        ctypes.c_uint32(0),
        ctypes.c_int(0),
    )
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(path))
    return done
