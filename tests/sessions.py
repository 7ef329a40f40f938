"""Sessions of an agent over Anthropic's Messages, made up, and how much of them is reused.

`python -m tests.sessions JOB.json` holds a part of one, and is killed by itself.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persist_cache.server.form import Form
from persist_cache.server.protocols.anthropic_request import read_messages
from persist_cache.server.protocols.recognized import RESPONSES, protocol_of
from persist_cache.server.protocols.responses_request import read_responses
from persist_cache.server.ticket import Ticket
from persist_cache.stability.names import DEFAULTS
from persist_cache.tokens import common_prefix_tokens, pack_tokens
from persist_cache_cli.bench.sessions import session as session
from tests.loops import Loop
from tests.waiting import until

SERVER: dict[str, Any] = {
    "temp": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "num_draft_tokens": 3,
}
"""Options of the server that a chat's request brings along."""


@dataclass
class Reuse:
    """What a row of requests had in common with earlier ones.

    Attributes:
        common: Tokens that each shares with the longest prefix of an earlier one.
        read: Tokens that it needed not compute.
        written: Tokens behind those that it said are on their way to the disk.
        total: Tokens of all prompts.
        computed: Tokens of prompts that the model was called with.
    """

    common: int = 0
    read: int = 0
    written: int = 0
    total: int = 0
    computed: int = 0

    @property
    def share(self) -> float:
        """How much of what could be reused was, by the model's calls."""
        return (self.total - self.computed) / self.common if self.common else 1.0


def converse(
    loop: Loop, bodies: Iterable[dict[str, Any]], before: list[bytes] | None = None
) -> Reuse:
    """Send bodies, one after the other.

    Args:
        loop: Answers.
        bodies: As their client sends them.
        before: Prompts of earlier requests; those of these are added.
    """
    found, prompts = Reuse(), [] if before is None else before
    until(lambda: loop.provider.model is not None, "no model was loaded")
    loop.count()
    loop.prefilled()
    for body in bodies:
        ticket = ask(loop, body)
        assert ticket.prompt is not None
        assert ticket.fetch is not None
        packed = pack_tokens(ticket.prompt.tokens)
        longest = max((common_prefix_tokens(packed, one) for one in prompts), default=0)
        found.common += min(longest, len(ticket.prompt.tokens) - 1)
        found.read += ticket.fetch.num_tokens
        found.written += ticket.written_tokens
        found.total += len(ticket.prompt.tokens)
        found.computed += loop.prefilled() + 1  # the last one is computed by the call that samples
        prompts.append(packed)
    return found


def ask(loop: Loop, body: dict[str, Any], stabilize: frozenset[str] = DEFAULTS) -> Ticket:
    """Have one body answered, of whichever protocol it is, with these repairs."""
    is_response = protocol_of(body) == RESPONSES
    request = read_responses(body)[0] if is_response else read_messages(body, stabilize=stabilize)
    ticket = Ticket(form=Form(request, loop.generator.templates, {}))
    ticket.stabilize = stabilize
    with loop.generator.in_flight():
        context, pieces = loop.generator.answer(request, ticket)
        for _ in pieces:
            pass
        context.stop()
    return ticket


def converse_until_killed(
    folder: Path, model: Path, store: Path, size: dict[str, Any], count: int
) -> tuple[Reuse, list[bytes]]:
    """Send the first bodies of a session in another process, which is killed after the last answer.

    Args:
        folder: For what the process says.
        model: Folder of the model.
        store: Of its cache; what waits for the disk is there when the process is killed.
        size: Of the session.
        count: Of the bodies.

    Returns:
        What was reused, and the prompts.
    """
    job, said = folder / "session.json", folder / "session.pickle"
    work = {"model": str(model), "store": str(store), "size": size, "count": count}
    job.write_text(json.dumps({**work, "said": str(said)}))
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", __name__, str(job)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    found: tuple[Reuse, list[bytes]] = pickle.loads(said.read_bytes())
    return found


def main(job: Path) -> None:
    work = json.loads(job.read_text())
    prompts: list[bytes] = []
    with Loop(Path(work["model"]), Path(work["store"]), **SERVER) as loop:
        found = converse(loop, list(session(**work["size"]))[: work["count"]], prompts)
        until(lambda: not loop.cache.queued_jobs, "what was queued is not saved")
        Path(work["said"]).write_bytes(pickle.dumps((found, prompts)))
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    # The classes of what is pickled are those of the module that reads it.
    from tests import sessions

    sessions.main(Path(sys.argv[1]))
