"""A process that was started without standard streams: what is printed there hits no file of ours.

The system gives the lowest free descriptor to the next file that is opened.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from persist_cache import Store
from tests.cli import SCRIPT, fill
from tests.fakes import put

ROOT = Path(__file__).parent.parent
CLOSED = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")

PRINTS = """
import os, sys
from pathlib import Path
from persist_cache import Store
from tests.fakes import put

with Store.open(sys.argv[1], min_free_bytes=0) as store:
    put(store, range(100))
    for number in range(3):
        try:
            os.write(number, b"a library's warning, or what a dying process says\\n" * 400)
        except OSError:
            pass
    put(store, range(1000, 1100))
    places = map("/proc/self/fd/{}".format, range(3))
    left = [os.readlink(one) for one in places if os.path.exists(one)]
    Path(sys.argv[2]).write_text("\\n".join(left))
"""


def test_what_a_library_prints_reaches_no_file_of_the_store(tmp_path: Path) -> None:
    root, note = tmp_path / "store", tmp_path / "note"
    with Store.open(root, min_free_bytes=0) as store:
        put(store, range(5000, 5100))

    done = subprocess.run(
        [*CLOSED, sys.executable, "-c", PRINTS, str(root), str(note)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )

    assert done.returncode == 0
    assert str(root) not in note.read_text()
    with Store.open(root) as store:
        assert store.check(read_data=True) == []
        assert len(store.entries()) == 3


@pytest.mark.parametrize("line", ["--version", "list", "stats --json", "show {id}", "doctor", "gc"])
def test_command_without_standard_streams_does_the_same(tmp_path: Path, line: str) -> None:
    """As cron and services may start it."""
    ids = fill(tmp_path / "store")
    words = line.format(id=ids["question"]).split() if "{" in line else line.split()
    command = [str(SCRIPT), "--store", str(tmp_path / "store"), *words]
    plain = subprocess.run(command, capture_output=True, check=False)

    done = subprocess.run([*CLOSED, *command], check=False)

    assert done.returncode == plain.returncode
