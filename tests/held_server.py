"""A server in a process of its own whose model can be held up in the midst of a prefill.

Also run as `python -m tests.held_server JOB.json`, which is that process: a server as of
`tests.computed` that waits before a chunk while there is a file JOB.held with the number of tokens
that may be computed before.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.computed import Call, CountedServer, counting_main
from tests.waiting import until


class HeldServer(CountedServer):
    """A server that computes no more than it is let."""

    module = "tests.held_server"

    def __init__(
        self,
        model: Path,
        store: Path,
        folder: Path,
        *,
        patched: dict[str, float] | None = None,
        refusing_s: float = 0,
        **options: Any,
    ) -> None:
        """As `CountedServer`.

        Args:
            model: Folder of the model.
            store: Folder of its store.
            folder: Where the log and the job file go.
            patched: Constants of `persist_cache.server.underway` that are others there.
            refusing_s: What a refusal takes to be sent, as on a busy machine.
            options: Further fields of `ServeOptions`, and flags.
        """
        super().__init__(model, store, folder, **options)
        self._held = self.log.with_suffix(".held")
        self.log.with_suffix(".patched").write_text(json.dumps([patched or {}, refusing_s]))

    @contextmanager
    def held_up(self, num_tokens: int) -> Iterator[None]:
        """Hold prefills up behind so many tokens from now on, until the end of the block."""
        made = self._held.with_suffix(".new")
        made.write_text(str(num_tokens))
        made.rename(self._held)
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Let prefills go on."""
        self._held.unlink(missing_ok=True)

    def wait_for(self, num_tokens: int) -> int:
        """Wait until so many tokens of prompts are computed since `prefilled` was asked.

        Returns:
            How many there are.
        """
        seen = 0

        def is_there() -> bool:
            nonlocal seen
            seen += sum(map(len, self.prefilled()))
            return seen >= num_tokens

        until(is_there, "so much is not computed")
        return seen


def main() -> None:
    from persist_cache.server import underway
    from persist_cache.server.upstream.handler import Handler

    job = Path(sys.argv[1])
    held = job.with_suffix(".held")
    patched, refusing_s = json.loads(job.with_suffix(".patched").read_text())
    for name, value in patched.items():
        assert hasattr(underway, name), name
        setattr(underway, name, value)
    send = Handler.send_response

    def send_slowly(handler: Handler, code: int, message: str | None = None) -> None:
        if code >= 500:
            threading.Event().wait(refusing_s)
        send(handler, code, message)

    Handler.send_response = send_slowly  # type: ignore[assignment, method-assign]
    computed = 0

    def wait(call: Call) -> None:
        nonlocal computed
        try:
            limit = int(held.read_text())
        except FileNotFoundError:
            computed = 0
            return
        if call.sampling:
            return
        if computed >= limit:
            until(lambda: not held.exists(), "it was held up for ever", timeout_s=120)
        computed += sum(map(len, call.rows))

    counting_main(wait)


if __name__ == "__main__":
    main()
