"""The list of checks, and what one of them says."""

from __future__ import annotations

import contextlib
import getpass
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from persist_cache import __version__

Number = int | float | str | bool | None
Verdict = Literal["ok", "FAILED", "not applicable"]


class Failed(Exception):
    """Something is not as it has to be; says what, in a sentence."""


class NotApplicable(Exception):
    """There is nothing to check here; says why."""


class Result(NamedTuple):
    """What a check that passed found.

    Attributes:
        line: For people.
        numbers: What was measured; never a path, a name or a text of the user's.
    """

    line: str
    numbers: dict[str, Number]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a check works.

    Attributes:
        folder: Its own, empty, on the file system that is to be checked.
        quick: Do less of everything that is done many times or with many bytes.
    """

    folder: Path
    quick: bool = False

    def some(self, number: int) -> int:
        """How often to do what is to be done `number` times."""
        return max(4, number // 20) if self.quick else number


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        name: In output and JSON.
        area: Module of this package.
        function: Its function, of a `Setting`.
        limit_s: A check that takes longer hangs.
    """

    name: str
    area: str
    function: str
    limit_s: float = 120.0

    def load(self) -> Callable[[Setting], Result]:
        """Import its function."""
        found: Callable[[Setting], Result] = getattr(
            import_module(f"persist_cache.selftest.{self.area}"), self.function
        )
        return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a check ended.

    Attributes:
        name: Of the check.
        verdict: Whether all is well.
        line: What was found, for people; of a red one, what is wrong.
        numbers: What was measured.
        seconds: What it took.
    """

    name: str
    verdict: Verdict
    line: str
    numbers: dict[str, Number] = field(default_factory=dict)
    seconds: float = 0.0


CHECKS = (
    Check("platform", "machine", "platform_is_supported"),
    Check("bytes", "files", "bytes_are_exact", 300.0),
    Check("sync", "files", "syncs_are_durable"),
    Check("space", "files", "space_returns"),
    Check("read-ahead", "files", "read_ahead_works"),
    Check("read-speed", "files", "reads_come_from_the_disk"),
    Check("index", "commits", "index_is_as_expected"),
    Check("kills", "commits", "kills_are_survived", 900.0),
    Check("semaphores", "commits", "abandoned_semaphores_are_recovered"),
    Check("opens", "commits", "opens_and_closes_do_not_clash", 300.0),
    Check("growth", "commits", "growth_is_within_the_slack"),
    Check("locks", "processes", "locks_end_with_their_holder"),
    Check("caches", "caches", "caches_continue_bit_for_bit", 300.0),
    Check("writer", "device", "writer_reads_while_the_device_decodes", 300.0),
    Check("arrays", "device", "filled_arrays_reach_the_device"),
    Check("names", "serving", "names_are_not_waited_for"),
    Check("sigterm", "serving", "sigterm_saves", 300.0),
    Check("restart", "restarting", "killed_server_goes_on", 300.0),
    Check("unload", "restarting", "idle_server_lets_go", 300.0),
    Check("full-disk", "small_disk", "full_disk_is_survived"),
    Check("backups", "machine", "backups_leave_it_out"),
    Check("descriptors", "machine", "descriptors_suffice"),
)


def find(name: str) -> Check:
    """The check called `name`.

    Raises:
        KeyError: There is none.
    """
    for check in CHECKS:
        if check.name == name:
            return check
    raise KeyError(name)


def as_json(outcomes: Sequence[Outcome], *, quick: bool, place: Path) -> dict[str, Any]:
    """All outcomes as JSON that can be shown to anybody: no path, no name, no prompt.

    Args:
        outcomes: Of the checks.
        quick: As `Setting.quick`.
        place: Where they worked.
    """
    folders = _folders(place)
    return {
        "format": 1,
        "persist_cache": __version__,
        "quick": quick,
        "ok": all(one.verdict != "FAILED" for one in outcomes),
        "checks": [
            {
                "name": one.name,
                "verdict": one.verdict,
                "line": without_names(one.line, folders),
                "seconds": round(one.seconds, 3),
                "numbers": {
                    key: without_names(value, folders) if isinstance(value, str) else value
                    for key, value in one.numbers.items()
                },
            }
            for one in outcomes
        ],
    }


def without_names(text: str, folders: Sequence[str] = ()) -> str:
    """Take paths, and the names of user and machine, out of a sentence.

    Args:
        text: The sentence.
        folders: Paths that may be in it, the longest first: the end of one that has blanks in it
            cannot be told from the words after it.
    """
    for folder in folders:
        text = text.replace(folder, "/")
    text = re.sub(r"(?:(?<=[\s'\"(:=\[])|^)~?/[^\s'\"()]*", "<path>", text)
    # The longer one first: a host is named with and without its domain.
    for name in sorted(_names(), key=len, reverse=True):
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "<name>", text)
    return text


def _folders(place: Path) -> list[str]:
    """Folders that errors may name, in each way that they may be written."""
    known = {place, Path.cwd(), Path(tempfile.gettempdir()), Path(sys.prefix)}
    known |= {Path(sys.base_prefix), Path(__file__).parents[2]}
    with contextlib.suppress(RuntimeError):
        known.add(Path.home())
    spelled = {str(way) for one in known for way in (one.absolute(), one.resolve())}
    spelled |= {repr(one)[1:-1] for one in spelled}
    return sorted(spelled - {"/"}, key=len, reverse=True)


def _names() -> set[str]:
    found = set()
    with contextlib.suppress(Exception):
        found.add(getpass.getuser())
    with contextlib.suppress(Exception):
        found.add(Path.home().name)
    with contextlib.suppress(OSError):
        found |= {socket.gethostname(), socket.gethostname().partition(".")[0]}
    # "root" is nobody's name, and a word of sentences.
    return {name for name in found if len(name) > 1 and name != "root"}
