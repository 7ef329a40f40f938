"""macOS: keep a folder out of Time Machine's backups and Spotlight's index.

Neither knows CACHEDIR.TAG. What a store holds changes all day and can be computed again, and
local snapshots keep the blocks of files that were evicted. All of this is a courtesy to the user:
what fails is not an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import plistlib
from pathlib import Path

from persist_cache import fs, volumes

INDEX_FILE = ".metadata_never_index"
"""Tells Spotlight to leave the folder out."""
ATTRIBUTE = b"com.apple.metadata:com_apple_backup_excludeItem"
VALUE = plistlib.dumps("com.apple.backupd", fmt=plistlib.FMT_BINARY)
"""What `tmutil addexclusion` sets on a folder, and backups look for."""
_BACKED_UP = ("apfs", "hfs")
_PARAMETERS = (
    *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p),
    *(ctypes.c_size_t, ctypes.c_uint32, ctypes.c_int),
)
"""Path, name, value, its length, position, options."""


def exclude(folder: Path) -> None:
    """Keep `folder` out of backups and the search index, where there are such; never fails."""
    with contextlib.suppress(OSError):
        kind = volumes.kind(folder)
        if not kind:
            return
        with contextlib.suppress(FileExistsError):
            os.close(fs.create(folder / INDEX_FILE))
        # On other file systems attributes become files of their own, and nothing is backed up.
        if kind in _BACKED_UP and not is_excluded(folder):
            _set_attribute(os.fsencode(folder), ATTRIBUTE, VALUE)


def is_excluded(folder: Path) -> bool:
    """Whether the folder carries the mark that keeps it out of backups."""
    with contextlib.suppress(OSError):
        return _attribute(os.fsencode(folder), ATTRIBUTE) == VALUE
    return False


def _set_attribute(path: bytes, name: bytes, value: bytes) -> None:
    """macOS's `setxattr`, which Python does not have there."""
    call = ctypes.CDLL(None, use_errno=True).setxattr
    call.argtypes = _PARAMETERS
    if call(path, name, value, len(value), 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(path))


def _attribute(path: bytes, name: bytes) -> bytes:
    call = ctypes.CDLL(None, use_errno=True).getxattr
    call.argtypes = _PARAMETERS
    call.restype = ctypes.c_ssize_t
    buffer = ctypes.create_string_buffer(1024)
    nbytes = call(path, name, buffer, len(buffer), 0, 0)
    if nbytes < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(path))
    return buffer.raw[:nbytes]
