"""The file-system calls of the store, in one place.

Everything that changes the disk goes through here, so that durability rules and platform limits
are written once, and so that a test can cut any single step. Callers use `fs.name(...)`, never
`from fs import name`: replacing a function of this module replaces it everywhere. That is why
it is one module, however long.

Limits handled: at most `IOV_MAX` buffers and 1 GiB a call (macOS fails above 2 GiB), short reads
and writes, `F_FULLFSYNC` where plain fsync does not reach the platter (macOS).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from persist_cache.errors import StoreAccessError, StoreError, StoreFullError
from persist_cache.system import volumes

FILE_MODE = 0o600
FOLDER_MODE = 0o700
_MAX_BUFFERS = 1000  # IOV_MAX is 1024 on Linux and macOS
_MAX_BYTES = 1 << 30
_ADVISED_BYTES = 128 << 10  # Linux reads no more for one piece of advice, on some devices
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = (
    (2 << 30 | struct.calcsize("l") << 16 | ord("f") << 8 | 1),
    (1 << 30 | struct.calcsize("l") << 16 | ord("f") << 8 | 2),
)  # Linux, <linux/fs.h>; Python does not name them
_FSXATTR = struct.Struct("=IIIII8x")
_FS_IOC_FSGETXATTR, _FS_IOC_FSSETXATTR = (
    (2 << 30 | _FSXATTR.size << 16 | ord("X") << 8 | 31),
    (1 << 30 | _FSXATTR.size << 16 | ord("X") << 8 | 32),
)
_FS_XFLAG_EXTSIZE = 0x800
_AT_FDCWD, _AT_SYMLINK_FOLLOW = -100, 0x400  # Linux, <fcntl.h>
_FS_NOCOW_FL = 0x00800000
_LONGEST_NAP_S = 0.02
_NOT_OFFERED = frozenset((errno.ENOTSUP, errno.ENOTTY, errno.EINVAL))
"""What a file system says that knows no F_FULLFSYNC, such as exFAT."""
_F_RDADVISE = 44  # macOS, <sys/fcntl.h>; Python does not name it
_OVERWRITTEN_AT_ONCE = 1 << 20
_OF_THE_FILE = frozenset(
    (errno.EIO, errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.EACCES, errno.EPERM)
)

_NO_MODES = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a file system says that has no room, or none for us."""
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
"""What a file system says that is read-only, or not ours."""


def create(path: Path) -> int:
    """Create `path`, which must not exist, for its owner alone; returns a descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    restrict(fd, FILE_MODE)  # the umask may have taken the owner's rights as well
    return fd


def create_nameless(folder: Path) -> int:
    """Create a file in `folder` that goes with its descriptor unless `give_name` gives it a name.

    Raises:
        OSError: The system has no such files, or not there.
    """
    if sys.platform != "linux":
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    fd = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, FILE_MODE)
    restrict(fd, FILE_MODE)
    return fd


def give_name(fd: int, path: Path) -> None:
    """Give a file of `create_nameless` the name `path`, which must not exist."""
    import ctypes

    # Not os.link, which does not follow the link to the file without a name.
    call = ctypes.CDLL(None, use_errno=True).linkat
    source = os.fsencode(f"/proc/self/fd/{fd}")
    if call(_AT_FDCWD, source, _AT_FDCWD, os.fsencode(path), _AT_SYMLINK_FOLLOW):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))


def open_shared(path: Path) -> int:
    """Open `path`, which several processes lock, creating it for its owner alone."""
    try:
        return create(path)
    except FileExistsError:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)


def open_read(path: Path) -> int:
    """Open `path` for reading, refusing a symbolic link in its last part."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def allocate(fd: int, nbytes: int) -> None:
    """Make the file exactly `nbytes` long, or longer if it is, with room for all of them.

    Room that is taken piece by piece comes in larger pieces on some file systems (XFS), which
    `du` counts. Where room cannot be taken in advance, the file only gets its length.
    """
    if nbytes <= 0:
        return
    if sys.platform == "linux":
        code = _fallocate(fd, nbytes)
        if code == 0:
            return
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
    if os.fstat(fd).st_size < nbytes:
        os.ftruncate(fd, nbytes)


def _fallocate(fd: int, nbytes: int) -> int:
    """Linux's call of that name; returns its error, or 0.

    `os.posix_fallocate` writes to every block where the file system knows no such call.
    """
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while call(fd, 0, 0, nbytes):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            return code
    return 0


def write_in_place(fd: int) -> None:
    """Have an empty file written in place where the file system would copy (btrfs).

    Where it knows no such thing, nothing happens.
    """
    if sys.platform == "linux":
        flags = bytearray(struct.calcsize("l"))
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
            wanted = struct.unpack("l", flags)[0] | _FS_NOCOW_FL
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("l", wanted))


def is_written_in_place(fd: int) -> bool:
    """Whether `write_in_place` had its effect on the file."""
    if sys.platform != "linux":
        return False
    flags = bytearray(struct.calcsize("l"))
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
    return bool(struct.unpack("l", flags)[0] & _FS_NOCOW_FL)


def grow_exactly(fd: int) -> None:
    """Have an empty file take what is written to it, and nothing ahead of that (XFS).

    For a file that grows piece by piece while it is open; where its length is known, see
    `allocate`. Where the file system knows no such thing, nothing happens.
    """
    if sys.platform == "linux":
        attributes = bytearray(_FSXATTR.size)
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, attributes)
            flags, _, *others = _FSXATTR.unpack(attributes)
            unit = os.fstatvfs(fd).f_frsize
            wanted = _FSXATTR.pack(flags | _FS_XFLAG_EXTSIZE, unit, *others)
            fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, wanted)


def bytes_behind(fd: int) -> int:
    """Bytes that the file system took behind the end of the file; `trim` gives them back."""
    status = os.fstat(fd)
    unit = os.fstatvfs(fd).f_frsize
    return max(0, status.st_blocks * 512 - -(-status.st_size // unit) * unit)


def trim(fd: int) -> None:
    """Give back what lies behind the end of the file. Nobody may write to it meanwhile."""
    os.ftruncate(fd, os.fstat(fd).st_size)


def sync_file_system(path: Path) -> None:
    """Have the file system of `path` finish what it postponed, such as to free what was removed.

    Where the system has no such call, or it fails, nothing happens.
    """
    if sys.platform != "linux":
        return
    import ctypes

    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            ctypes.CDLL(None).syncfs(fd)
        finally:
            os.close(fd)


def write_all(fd: int, buffers: Sequence[memoryview]) -> int:
    """Write `buffers` one after the other at the file's position; returns the bytes written."""
    written = 0
    for batch in _batches(buffers):
        pending = batch
        while pending:
            count = os.writev(fd, pending)
            if count == 0:
                raise OSError(errno.EIO, "the file system wrote nothing")
            written += count
            pending = _advance(pending, count)
    return written


def write_at(fd: int, offset: int, content: bytes) -> None:
    """Write `content` at `offset`, wherever the file's position is."""
    view = memoryview(content)
    while view:
        count = os.pwrite(fd, view[:_MAX_BYTES], offset)
        if count == 0:
            raise OSError(errno.EIO, "the file system wrote nothing")
        view, offset = view[count:], offset + count


def read_into(fd: int, offset: int, buffers: Sequence[memoryview]) -> int:
    """Fill `buffers` from `offset`; returns the bytes read, fewer only at the end of the file."""
    done = 0
    for batch in _batches(buffers):
        pending = batch
        while pending:
            count = os.preadv(fd, pending, offset + done)
            if count == 0:
                return done
            done += count
            pending = _advance(pending, count)
    return done


def sync(fd: int) -> None:
    """Make the file's bytes durable, as far as its file system can."""
    if sys.platform != "darwin" or not syncs_fully(fd):
        os.fsync(fd)


def syncs_fully(fd: int) -> bool:
    """Make the file's bytes durable on the platter itself (macOS); False if that is not offered.

    Elsewhere `fsync` does so, and nothing happens here.

    Raises:
        OSError: It is, and failed.
    """
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
            return False
    return True


def volume(path: Path) -> str:
    """The mount point of the file system that holds `path`."""
    place = path.resolve()
    while not os.path.ismount(place) and place != place.parent:
        place = place.parent
    return str(place)


def sync_folder(path: Path) -> None:
    """Make creations, renames and removals in the folder `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Move `source` to `target`; within one file system this is atomic."""
    os.rename(source, target)


def unlink(path: Path) -> None:
    """Remove the name `path`; processes that have the file open keep reading it."""
    os.unlink(path)


def overwrite(path: Path) -> bool:
    """Put zeros in the place of a file's bytes; processes that have it open read those.

    Returns:
        False for what is not ours alone: a link, or a file with other names.
    """
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            return False
        zeros = memoryview(bytes(min(status.st_size, _OVERWRITTEN_AT_ONCE)))
        left = status.st_size
        while left > 0:
            left -= write_all(fd, [zeros[:left]])
        sync(fd)
    finally:
        os.close(fd)
    return True


def remove_folder(path: Path) -> None:
    """Remove the folder `path`, which must be empty."""
    os.rmdir(path)


def make_folder(path: Path) -> None:
    """Create the folder `path` for its owner alone, whatever the umask, unless it exists."""
    try:
        os.mkdir(path, FOLDER_MODE)
    except FileExistsError:
        return
    restrict(path, FOLDER_MODE)


def restrict(target: Path | int, mode: int) -> bool:
    """Give a file or folder of ours this mode; returns whether other users are kept out now.

    A file system without permissions (exFAT) refuses or, on macOS, ignores that.
    """
    try:
        os.chmod(target, mode)
    except OSError as error:
        if error.errno not in _NO_MODES:
            raise
    return not os.stat(target).st_mode & 0o077


def try_lock(fd: int) -> bool:
    """Take the exclusive `flock` of `fd` if nobody holds it; it ends with the descriptor."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock(fd: int, patience_s: float) -> bool:
    """Wait up to `patience_s` for the exclusive `flock` of `fd`; returns whether it is ours.

    The system has no such call with a limit, and the holder may be a process that was stopped.
    """
    return _wait_for_lock(fd, fcntl.LOCK_EX, patience_s)


def lock_shared(fd: int, patience_s: float) -> bool:
    """Wait likewise for a shared `flock` of `fd`, giving up an exclusive one at once."""
    return _wait_for_lock(fd, fcntl.LOCK_SH, patience_s)


def _wait_for_lock(fd: int, kind: int, patience_s: float) -> bool:
    give_up = time.monotonic() + patience_s
    nap_s = 0.0005
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return True
        left_s = give_up - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(nap_s, left_s))
        nap_s = min(1.5 * nap_s, _LONGEST_NAP_S)


def unlock(fd: int) -> None:
    """Give the `flock` of `fd` back."""
    fcntl.flock(fd, fcntl.LOCK_UN)


def read_ahead(path: Path) -> int:
    """Have the system read `path` into its page cache meanwhile; returns its bytes.

    Advice only: where the system takes none, nothing happens.
    """
    fd = open_read(path)
    try:
        nbytes = os.fstat(fd).st_size
        for start in range(0, nbytes, _ADVISED_BYTES):
            if sys.platform == "darwin":
                # struct radvisory: where, and how much.
                fcntl.fcntl(fd, _F_RDADVISE, struct.pack("qi4x", start, _ADVISED_BYTES))
            elif hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, start, _ADVISED_BYTES, os.POSIX_FADV_WILLNEED)
        return nbytes
    finally:
        os.close(fd)


def bypass_cache(fd: int) -> None:
    """Have what is written and read through `fd` from now on leave nothing in the page cache.

    macOS: it does not remove what is there, so say it before the first byte is written.
    Elsewhere `drop_cache` is enough.
    """
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)


def drop_cache(fd: int) -> None:
    """Have the next read of a synced file come from the disk, where the system can be asked."""
    if sys.platform == "linux":
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def free_bytes(path: Path) -> int:
    """Bytes that an unprivileged process may still write to the file system of `path`."""
    return volumes.space(path).free_bytes


def free_files(path: Path) -> int | None:
    """Files that may still be made on the file system of `path`; None where there is no limit."""
    return volumes.space(path).free_files


def disk_bytes(path: Path | str) -> int:
    """Bytes the file `path` occupies, as `du` counts them; 0 when it does not exist."""
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def is_passing(error: OSError) -> bool:
    """Whether `error`, from reading a file, says nothing of that file: it may be sound."""
    return error.errno not in _OF_THE_FILE


def translated(error: OSError, doing: str) -> StoreError:
    """What the user is told about `error`, which came up while `doing` something."""
    if error.errno in FULL:
        return StoreFullError(f"The disk is full ({doing}); nothing was changed.")
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in FORBIDDEN:
        return StoreAccessError(f"The disk may not be used ({doing}): {reason}.")
    return StoreError(f"The disk failed ({doing}): {reason}.")


@contextlib.contextmanager
def errors_translated(doing: str) -> Iterator[None]:
    """Raise what the file system says in the block as the user is told it."""
    try:
        yield
    except OSError as error:
        raise translated(error, doing) from error


def _batches(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Cut `buffers` to what one call takes."""
    if sum(map(len, buffers)) > _MAX_BYTES:
        # Slices so small that even a full batch of them is within the limit.
        size = _MAX_BYTES // _MAX_BUFFERS
        buffers = [
            buffer[start : start + size]
            for buffer in buffers
            for start in range(0, len(buffer), size)
        ]
    buffers = [buffer for buffer in buffers if buffer.nbytes]
    for start in range(0, len(buffers), _MAX_BUFFERS):
        yield buffers[start : start + _MAX_BUFFERS]


def _advance(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Drop the first `count` bytes of `buffers`."""
    if count == sum(map(len, buffers)):
        return []
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []
