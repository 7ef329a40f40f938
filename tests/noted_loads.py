"""A server as of `tests.server_process` that notes each load of a model: `LoadsServer`.

`python -m tests.noted_loads JOB.json` is its process; it writes the path of each model that mlx-lm
loads into JOB.loads, one a line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.server_process import ServerProcess, main


class LoadsServer(ServerProcess):
    """A server whose loads can be read."""

    def __init__(self, model: Path | None, store: Path, folder: Path, **options: Any) -> None:
        """As `ServerProcess`."""
        super().__init__(model, store, folder, module="tests.noted_loads", **options)
        self._loads = self.log.with_suffix(".loads")

    def loads(self) -> list[str]:
        """What was loaded so far, in order."""
        return self._loads.read_text().splitlines() if self._loads.exists() else []


def note_loads(path: Path) -> None:
    """Have mlx_lm.server note each model that it loads in a file."""
    from mlx_lm import server

    load = server.load

    def noting(name: str, *args: Any, **options: Any) -> Any:
        with path.open("a") as file:
            file.write(f"{name}\n")
        return load(name, *args, **options)

    server.load = noting


if __name__ == "__main__":
    note_loads(Path(sys.argv[1]).with_suffix(".loads"))
    main()
