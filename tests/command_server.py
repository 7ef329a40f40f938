"""The command `persist-cache serve` in a process of its own, with flags as they are typed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from tests import prepared
from tests.server_process import ServerProcess


class CommandServer(ServerProcess):
    """A server that was started by the command; a context manager that stops it."""

    def __init__(self, model: Path | None, store: Path, folder: Path, *flags: str) -> None:
        """Prepare it; `flags` are those of `persist-cache serve`."""
        super().__init__(model, store, folder)
        self._arguments = ["--store", str(store), "serve", "--port", str(self.port), *flags]
        if model is not None:
            self._arguments += ["--model", str(model)]

    def launch(self) -> prepared.Program | subprocess.Popen[bytes]:
        """Start the process."""
        return prepared.start("persist_cache_cli", self._arguments, self.log)

    def ps(self) -> Any:
        """What it has in memory."""
        return self.get("/v1/cache/ps")
