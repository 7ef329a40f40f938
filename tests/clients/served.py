"""The server that clients are driven against: it notes each prompt, and each call of its model.

`python -m tests.clients.served JOB.json` is its process. What was reused is what the model did not
compute; what could be is the longest prefix that a prompt shares with an earlier one.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persist_cache.tokens import common_prefix_tokens, pack_tokens
from tests.computed import CountedServer, counting_main


@dataclass
class Reuse:
    """What some requests had in common with earlier ones.

    Attributes:
        requests: How many there were.
        total: Tokens of their prompts.
        common: Tokens that each shares with the longest prefix of an earlier one.
        computed: Tokens of prompts that the model was called with.
        opening: Tokens found for the first request, and asked by it; one for a title is none.
    """

    requests: int = 0
    total: int = 0
    common: int = 0
    computed: int = 0
    opening: tuple[int, int] = (0, 0)

    @property
    def reused(self) -> int:
        return self.total - self.computed

    @property
    def share(self) -> float:
        """How much of what could be reused was."""
        return self.reused / self.common if self.common else 1.0


class NotingServer(CountedServer):
    """A server whose prompts can be read."""

    module = "tests.clients.served"

    def __init__(self, model: Path, store: Path, folder: Path, **options: Any) -> None:
        """As `ServerProcess`."""
        super().__init__(model, store, folder, **options)
        self._prompts = self.log.with_suffix(".prompts")
        self._read_prompts = 0
        self._earlier: list[bytes] = []

    def reuse(self) -> Reuse:
        """Of the requests since this was asked last."""
        found = Reuse(computed=sum(map(len, self.prefilled())))
        if not self._prompts.exists():
            return found
        with self._prompts.open() as file:
            file.seek(self._read_prompts)
            looks = list(map(json.loads, file.readlines()))
            self._read_prompts = file.tell()
        longest_prompt = max((len(look["tokens"]) for look in looks), default=0)
        for look in looks:
            tokens = look["tokens"]
            if not found.opening[1] and 2 * len(tokens) > longest_prompt:
                found.opening = look["found"], len(tokens)
            packed = pack_tokens(tokens)
            longest = max((common_prefix_tokens(packed, one) for one in self._earlier), default=0)
            found.requests += 1
            found.total += len(tokens)
            found.common += min(longest, len(tokens) - 1)
            found.computed += 1  # the last one is computed by the call that samples
            self._earlier.append(packed)
        return found

    def settle(self) -> None:
        """Have all that it computed written."""
        answer = self.request("POST", "/v1/cache/flush", timeout=120)
        assert answer.status_code == 200, answer.text

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()


def main() -> None:
    from persist_cache.server.ticket import Ticket

    log = Path(sys.argv[1]).with_suffix(".prompts").open("a", buffering=1)
    looked = Ticket.looked

    def noting(ticket: Ticket, fetch: Any) -> None:
        if ticket.fetch is None and ticket.prompt is not None and not ticket.keeps:
            tokens = list(map(int, ticket.prompt.tokens))
            log.write(json.dumps({"tokens": tokens, "found": fetch.num_tokens}) + "\n")
        looked(ticket, fetch)

    Ticket.looked = noting  # type: ignore[method-assign, assignment]
    counting_main()


if __name__ == "__main__":
    main()
