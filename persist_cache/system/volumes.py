"""What the system says of the volume that a path is on: its room, and what it can be known by.

macOS needs calls of its own. Its `statvfs` counts blocks in 32 bits, so older Pythons see a large
volume modulo 4 or 16 TiB (python/cpython#87804), and an almost empty one as full. And on APFS the
device number that `stat` gives is dealt out at each mount; what lasts is the volume's UUID.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

DARWIN = os.uname().sysname == "Darwin"
"""The kernel is macOS's: its structures are read here, so the name of a platform is not enough."""

# struct statfs with 64-bit inodes, <sys/mount.h>: block size, then (after the size of a transfer)
# blocks, free, available, files, free files; file system id, owner, type, flags, subtype; then the
# names of type, mount point and source.
_STATFS = struct.Struct("=I4x5Q8x4xIII16s1024s1024s")
_STATFS_BYTES = 4096
_MNT_RDONLY = 1
_NO_LIMIT = 0xFFFF_FFFF
# struct attrlist, <sys/attr.h>: five groups, and of the volume's its UUID.
_ATTRIBUTES = struct.pack("=HHIIIII", 5, 0, 0, 0x8000_0000 | 0x0004_0000, 0, 0, 0)
_UUID = struct.Struct("=I16s")


class Space(NamedTuple):
    """Room on a volume.

    Attributes:
        free_bytes: That an unprivileged process may still write.
        total_bytes: Its size.
        free_files: Files that may still be made; None where there is no limit.
        read_only: Nothing can be written to it.
    """

    free_bytes: int
    total_bytes: int
    free_files: int | None
    read_only: bool


class _Statfs(NamedTuple):
    space: Space
    kind: bytes
    mount_point: bytes


def space(path: Path) -> Space:
    """Look at the room on the volume of `path`.

    Raises:
        OSError: The system does not say.
    """
    if DARWIN:
        return _statfs(path).space
    status = os.statvfs(path)
    return Space(
        free_bytes=status.f_bavail * status.f_frsize,
        total_bytes=status.f_blocks * status.f_frsize,
        free_files=status.f_favail if status.f_files else None,
        read_only=bool(status.f_flag & os.ST_RDONLY),
    )


def kind(path: Path) -> str:
    """The type of the file system of `path`, on macOS; "" elsewhere.

    Raises:
        OSError: The system does not say.
    """
    return os.fsdecode(_statfs(path).kind) if DARWIN else ""


def lasting_device(path: Path, device: int) -> int:
    """A number for the volume of `path` that is the same after a restart of the machine.

    Args:
        path: A file or folder on it.
        device: What `stat` says, which serves where there is nothing better.
    """
    if not DARWIN:
        return device
    try:
        uuid = _uuid(_statfs(path).mount_point)
    except OSError:
        return device
    if not any(uuid):
        return device
    import hashlib

    # No device number has this bit.
    return 1 << 63 | int.from_bytes(hashlib.blake2b(uuid, digest_size=8).digest())


def _statfs(path: Path) -> _Statfs:
    return parse_statfs(_ask_statfs(os.fsencode(path)))


def parse_statfs(raw: bytes) -> _Statfs:
    """Read macOS's `struct statfs`."""
    size, blocks, _, available, files, free_files, _, flags, _, *names = _STATFS.unpack_from(raw)
    return _Statfs(
        Space(
            free_bytes=available * size,
            total_bytes=blocks * size,
            # File systems that make inodes as they need them say a very large number, or none.
            free_files=free_files if 0 < files < _NO_LIMIT else None,
            read_only=bool(flags & _MNT_RDONLY),
        ),
        *(name.partition(b"\0")[0] for name in names[:2]),
    )


def _uuid(mount_point: bytes) -> bytes:
    """The UUID of the volume that is mounted there; zeros where it has none."""
    length, uuid = _UUID.unpack_from(_ask_attributes(mount_point))
    return uuid if length >= _UUID.size else bytes(16)


def _ask_statfs(path: bytes) -> bytes:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    # On Intel the plain name is the old call, with 32-bit inodes and another structure.
    call = getattr(libc, "statfs$INODE64", None) or libc.statfs
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    _succeed(call(ctypes.c_char_p(path), buffer), path)
    return buffer.raw


def _ask_attributes(path: bytes) -> bytes:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_UUID.size)
    wanted = ctypes.create_string_buffer(_ATTRIBUTES, len(_ATTRIBUTES))
    size, options = ctypes.c_size_t(len(buffer)), ctypes.c_ulong(0)
    _succeed(libc.getattrlist(ctypes.c_char_p(path), wanted, buffer, size, options), path)
    return buffer.raw


def _succeed(status: int, path: bytes) -> None:
    if status:
        import ctypes

        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(path))
