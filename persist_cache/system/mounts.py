"""The mounted file systems: of which type one is, and whether the stamp of a file proves anything.

A stamp (device, inode, size, mtime, ctime) stands for a file's content because the kernel sets
ctime at each change. It does not where ctime is a copy of mtime (FAT, squashfs), where nothing
can change through the mount but the medium can be exchanged (images, read-only mounts), or where
another machine keeps the clock. So a stamp is believed on the file systems known to keep ctime
themselves, and only when it looks like one that a clock has set: an image that was built with
fixed dates has whole seconds.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

KEEPS_CTIME = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "nilfs2"}
    | {"tmpfs", "overlay", "apfs", "hfs"}
)
"""File systems whose ctime moves with each change, by the names of Linux and macOS.

Network file systems and those in user space are not among them: what they say about ctime
depends on a server that cannot be seen from here.
"""

_SECOND_NS = 1_000_000_000


class Mount(NamedTuple):
    """One mounted file system.

    Attributes:
        point: Where it is mounted.
        kind: Its type, such as `ext4`.
        read_only: Nothing can be written to it through any mount.
        lower: Folders that an overlay takes its files from.
    """

    point: str
    kind: str
    read_only: bool = False
    lower: tuple[str, ...] = ()


class Mounts:
    """The mounted file systems, as they were when this was made."""

    def __init__(self, mounts: Iterable[Mount] | None = None) -> None:
        self._mounts = list(_mounted() if mounts is None else mounts)

    def ctime_proves(self, path: Path, status: os.stat_result) -> bool:
        """Return whether a change of the file would have moved its ctime.

        Args:
            path: The file, or a link to it.
            status: What `stat` says of the file.
        """
        if status.st_ctime_ns % _SECOND_NS == 0:
            # Set by what built an image, or by a file system of whole seconds, or never.
            return False
        return self._keeps_ctime(os.path.realpath(path))

    def kind(self, place: Path) -> str:
        """Type of the file system that holds `place`; "" where it cannot be told."""
        mount = self._of(os.path.realpath(place))
        return "" if mount is None else mount.kind

    def _keeps_ctime(self, path: str, depth: int = 0) -> bool:
        mount = self._of(path)
        if mount is None or mount.kind not in KEEPS_CTIME or mount.read_only or depth > 8:
            return False
        # Folders of the host cannot be seen from within a container; there the overlay is believed.
        return all(
            self._keeps_ctime(os.path.realpath(folder), depth + 1)
            for folder in mount.lower
            if os.path.isdir(folder)
        )

    def _of(self, path: str) -> Mount | None:
        found = None
        for mount in self._mounts:
            # Of several at one point the last one is on top.
            if found is None or len(mount.point) >= len(found.point):
                found = mount if _holds(mount, path) else found
        return found


def _holds(mount: Mount, path: str) -> bool:
    if sys.platform == "darwin":
        # Firmlinks: a path of the data volume does not begin with its mount point.
        return _device(mount.point) == _device(path)
    return path == mount.point or path.startswith(mount.point.rstrip("/") + "/")


def parse_mountinfo(text: str) -> list[Mount]:
    """Read Linux's `/proc/self/mountinfo`; lines of another shape are left out."""
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if len(left) < 6 or len(right) < 3:
            continue
        options = right[2].split(",")
        lower = [
            _unescape(folder.replace("\\:", "\0")).replace("\0", ":")
            for option in options
            if option.startswith(("lowerdir=", "lowerdir+="))
            for folder in re.split(r"(?<!\\):", option.partition("=")[2])
            if folder
        ]
        # The options of the file system, not those of the mount: a volume that a container may
        # only read can be written from outside, and its ctime moves.
        mounts.append(Mount(_unescape(left[4]), right[0], "ro" in options, tuple(lower)))
    return mounts


def parse_mount_command(text: str) -> list[Mount]:
    """Read what macOS's `mount` prints: `/dev/disk3s5 on /Volumes/x (apfs, local, journaled)`."""
    mounts = []
    for line in text.splitlines():
        if found := re.fullmatch(r".*? on (/.*) \(([^()]*)\)", line):
            kind, *options = found[2].split(", ")
            mounts.append(Mount(found[1], kind, "read-only" in options))
    return mounts


def _mounted() -> list[Mount]:
    if sys.platform == "darwin":
        return parse_mount_command(_mount_command())
    try:
        return parse_mountinfo(os.fsdecode(Path("/proc/self/mountinfo").read_bytes()))
    except OSError:
        return []


def _mount_command() -> str:
    import subprocess

    try:
        done = subprocess.run(["/sbin/mount"], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return os.fsdecode(done.stdout)


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def _device(path: str) -> int | None:
    try:
        return os.stat(path).st_dev
    except OSError:
        return None
