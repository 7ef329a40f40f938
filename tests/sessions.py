"""Sessions of an agent over Anthropic's Messages, made up, and how much of them is reused.

`python -m tests.sessions JOB.json` holds a part of one, and is killed by itself.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
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
from tests.anthropic_bodies import BILLING, COUNTDOWN, EPHEMERAL, prose, tool
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
_REMINDER_EVERY = 7


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


def session(
    *, user_turns: int = 3, tool_turns: int = 10, tools: int = 20, words: int = 300, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Bodies as an agent sends them, one after the other; `words` is the size of a tool.

    Each ends in a count of the tokens that are left. In the middle of a turn there is a task with
    the same head, and one of a sub-agent with a head of its own.
    """
    drawn = random.Random(seed)
    known = [tool(drawn, place, words) for place in range(tools)]
    system, other = prose(drawn, 15 * words), prose(drawn, 5 * words)
    messages: list[dict[str, Any]] = []
    number = 0

    def said(**more: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        left = COUNTDOWN.format(200_000 - number * 100)
        head = [
            {"type": "text", "text": BILLING.format(f"f{number:02x}", f"{number:05x}")},
            {"type": "text", "text": prose(random.Random(1), 20)},
        ]
        body = {
            "model": "claude-large",
            "max_tokens": 1,
            "system": [
                *head,
                {
                    "type": "text",
                    "text": f"{more.pop('about', system)}\n{left}",
                    "cache_control": EPHEMERAL,
                },
            ],
            "tools": known,
            "messages": copy.deepcopy(messages),
            **more,
        }
        last = body["messages"][-1]["content"]
        if isinstance(last, list):
            last[-1]["cache_control"] = EPHEMERAL
        body["messages"].append({"role": "system", "content": left})
        return body

    for turn in range(user_turns):
        reminder = f"<system-reminder>\n{prose(drawn, 20)}\n</system-reminder>"
        text = [{"type": "text", "text": reminder}, {"type": "text", "text": prose(drawn, 15)}]
        messages.append({"role": "user", "content": text})
        title = [{"role": "user", "content": f"Name this: {prose(drawn, 20)}"}]
        yield said(system="Write a title of five words.", tools=None, messages=title)
        yield said()
        for step in range(tool_turns):
            call = f"toolu_{turn:02d}{step:02d}"
            content = [
                {"type": "text", "text": prose(drawn, 10)},
                {
                    "type": "tool_use",
                    "id": call,
                    "name": f"tool_{step % tools}",
                    "input": {"path": f"src/{turn}_{step}.py"},
                },
            ]
            result = {"type": "tool_result", "tool_use_id": call, "content": prose(drawn, 60)}
            step_taken: list[dict[str, Any]] = [
                {"role": "assistant", "content": content},
                {"role": "user", "content": [result]},
            ]
            messages += copy.deepcopy(step_taken)
            if len(messages) % _REMINDER_EVERY == 0:
                messages.append({"role": "system", "content": f"Reminder: {prose(drawn, 12)}"})
            yield said()
            if step == tool_turns // 2:
                task = [{"role": "user", "content": [{"type": "text", "text": prose(drawn, 40)}]}]
                yield said(messages=copy.deepcopy(task))
                yield said(messages=copy.deepcopy(task), about=other, tools=known[::2])
                task += step_taken
                yield said(messages=task, about=other, tools=known[::2])
        messages.append({"role": "assistant", "content": prose(drawn, 30)})


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
