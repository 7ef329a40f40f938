"""What lies in the folder of a store beside blobs and index, by name.

All of it counts against the budget; docs/format.md says what each is for.
"""

from __future__ import annotations

import re

TAG_FILE = "CACHEDIR.TAG"
"""Tells backup programs to leave the folder out."""
UNSEARCHED_FILE = ".metadata_never_index"
"""Tells Spotlight to leave the folder out."""
PRESENCE_FILE = "store.lock"
"""Locked shared by every process that has the store open."""
SUSPECT_FILE = "index.suspect"
"""There while the index is known to be damaged: whoever opens the store alone makes a new one."""
MEMO_FILE = "weights.json"
"""What the identities of files were, by their stamps."""
TOKEN_FILE = "admin.token"
"""The secret of the admin API."""
NEW_TOKEN_FILE = "admin.token.new"
"""The secret while it is being written."""
SERVER_FILE = re.compile(r"server\.[0-9a-f]{16}(\.new)?")
"""Where a running server answers; the longer name is that of one that is being written."""
STRAY_PROBE = re.compile(r"doctor\.[0-9a-f]{16}")
"""What `doctor` of earlier versions wrote to measure the disk, and left when it was killed."""
STRAY_MEMO = re.compile(r"\." + re.escape(MEMO_FILE) + r"\.[0-9a-f]{16}\.tmp")
"""A memo of which the writer was killed."""

_SMALL = {
    TAG_FILE,
    UNSEARCHED_FILE,
    PRESENCE_FILE,
    SUSPECT_FILE,
    MEMO_FILE,
    TOKEN_FILE,
    NEW_TOKEN_FILE,
}


def is_small(name: str) -> bool:
    """Whether `name` is one of the small files of a store, a stray one included."""
    return name in _SMALL or SERVER_FILE.fullmatch(name) is not None or is_stray(name)


def is_stray(name: str) -> bool:
    """Whether `name` is a file that nobody needs any more once its writer is dead."""
    return STRAY_PROBE.fullmatch(name) is not None or STRAY_MEMO.fullmatch(name) is not None
