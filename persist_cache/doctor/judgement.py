"""What the facts mean for a store, and what to do about them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from persist_cache.doctor.facts import MLX_LM_OPEN_FILES, Folder, ModelCache
from persist_cache.fingerprint.versions import unknown_mlx_lm

_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afpfs", "webdav", "9p", "ceph", "glusterfs", "lustre"}
)


_WITHOUT_MODES = frozenset({"exfat", "msdos", "vfat"})


_VOLATILE = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about the environment that the user should know.

    Attributes:
        level: `problem`: the store cannot do its work. `note`: it can, but not at its best.
        message: What is so, and what to do.
    """

    level: Literal["problem", "note"]
    message: str


def judge(
    folder: Folder,
    *,
    limits: tuple[int, int],
    packages: dict[str, str],
    max_bytes: int,
    min_free_bytes: int,
    used_bytes: int,
) -> Iterator[Finding]:
    """What is wrong with the place, and what to do about it."""
    for name in ("mlx", "mlx-lm"):
        if not packages[name]:
            yield Finding(
                "note", f"{name} is not installed: pip install {name} to compute or serve prompts."
            )
    if unknown := unknown_mlx_lm():
        yield Finding("problem", f"{unknown}.")
    where = f"{folder.path} " if folder.exists else f"The place for {folder.path} "
    if folder.is_taken:
        yield Finding(
            "problem", f"{folder.path} is not a folder; use a folder of your own (--store PATH)."
        )
    elif folder.exists and not folder.is_ours:
        yield Finding(
            "problem",
            f"{folder.path} belongs to {folder.owner}; use a folder of your own (--store PATH).",
        )
    elif not folder.writable:
        yield Finding("problem", f"{where}cannot be written; mend its rights, or use --store PATH.")
    if folder.exists and folder.mode is not None and folder.mode & 0o077:
        mend = f"chmod 700 {folder.path}"
        if folder.file_system in _WITHOUT_MODES:
            mend = (
                f"{folder.file_system} keeps no permissions, so use a folder on another disk "
                "(--store PATH) where others may use this one"
            )
        yield Finding(
            "note",
            f"{folder.path} is open to other users ({folder.mode:o}), and KV reveals prompts: "
            f"{mend}.",
        )
    if folder.file_system in _NETWORK or folder.file_system.startswith("fuse.sshfs"):
        yield Finding(
            "problem",
            f"{where}is on {folder.file_system}, where the index's locks do not hold; "
            "use a local folder (--store PATH).",
        )
    if folder.file_system in _VOLATILE:
        yield Finding(
            "note",
            f"{where}is on {folder.file_system}, which a restart of the machine empties; "
            "use --store PATH to keep what is stored.",
        )
    yield from _judge_space(folder, max_bytes, min_free_bytes, used_bytes)
    if packages["mlx-lm"]:
        yield from judge_open_files(limits)


def judge_open_files(limits: tuple[int, int]) -> list[Finding]:
    """Say whether mlx-lm can be imported under these limits, soft and hard.

    It sets both when it is imported. The soft limit is therefore its own business; but only root
    may raise a hard limit, and `ulimit -n N` lowers the hard one as well.
    """
    _, hard = limits
    wanted = MLX_LM_OPEN_FILES[1]
    if not 0 <= hard < wanted or os.geteuid() == 0:
        return []
    return [
        Finding(
            "problem",
            f"At most {hard} files may be open at once, and mlx-lm fails when it is imported "
            f"where it cannot set that limit to {wanted}; raise the hard limit (`ulimit -Hn` "
            "prints it; `ulimit -n` without -S lowers it).",
        )
    ]


def _judge_space(
    folder: Folder, max_bytes: int, min_free_bytes: int, used_bytes: int
) -> Iterator[Finding]:
    if folder.free_bytes < min_free_bytes:
        yield Finding(
            "problem",
            f"The disk is off: {folder.free_bytes:,} bytes are free, {min_free_bytes:,} are to be "
            "left alone; free some space, or lower the floor.",
        )
    elif folder.free_bytes - min_free_bytes < max_bytes - used_bytes:
        yield Finding(
            "note",
            f"The budget of {max_bytes:,} bytes cannot be used in full: "
            f"{folder.free_bytes - min_free_bytes:,} more bytes may be written to this disk.",
        )


def judge_model(found: ModelCache) -> list[Finding]:
    """Say what is wrong with storing a model's caches."""
    if found.reason:
        reason = found.reason.removeprefix(f"{found.model}: ").rstrip(".")
        what = "" if found.fingerprint else " cannot be identified"
        return [Finding("problem", f"The model {found.model!r}{what}: {reason}.")]
    bad = sorted({one.class_name for one in found.layers if one.storage == "unsupported"})
    if bad:
        return [
            Finding(
                "problem",
                f"Caches of {found.model} stay in memory, because {_join(bad)} cannot be saved; "
                "use another model to have its prompts survive a restart.",
            )
        ]
    return []


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
