"""What each process says it did, in a file of its own, so that the judge need not ask the store.

A line is one `write`: it is there even when the process is killed right behind it.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """The file of one process."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(self, what: str, **fields: Any) -> None:
        """Add a line; `at` is the same clock in all processes of the machine."""
        line = json.dumps({"what": what, "at": time.monotonic(), **fields})
        os.write(self._fd, line.encode() + b"\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """All lines of a journal, or of all journals in a folder, each with the `file` it is from."""
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        for line in file.read_bytes().splitlines() if file.exists() else ():
            yield {**json.loads(line), "file": file.name}


class Tally:
    """Counts that survive a kill: memory shared by the processes, one row for each of them."""

    _ROWS = 16

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = {name: place for place, name in enumerate(names)}
        self._memory = mmap.mmap(-1, self._ROWS * len(names) * 8)
        self.row = 0

    def add(self, name: str, amount: int = 1) -> None:
        """Count in the row of this process; no two living ones may have the same."""
        at = (self.row * len(self._names) + self._names[name]) * 8
        (value,) = struct.unpack_from("<q", self._memory, at)
        struct.pack_into("<q", self._memory, at, value + amount)

    def totals(self) -> Counter[str]:
        width = len(self._names)
        values = struct.unpack(f"<{self._ROWS * width}q", self._memory[:])
        return Counter({name: sum(values[place::width]) for name, place in self._names.items()})
