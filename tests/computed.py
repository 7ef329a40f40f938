"""What a model computes, noted at its call: all that is said of a cache is held against that.

`python -m tests.computed JOB.json` is a server as of `tests.server_process` whose models note their
calls in JOB.calls, one a line. A call either samples, within one of mlx-lm's `_step` functions, or
it prefills. Prefilling leaves the last token of a prompt to the first call that samples. So for a
request of which `n` tokens were cached it has to be exactly `prompt[n:-1]`: were it less, something
else had been made use of; were it more, something had been computed that was said to be there.
Drafted tokens that the model refuses are in calls that sample. What the draft model itself computes
is noted under its own name.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.server_process import ServerProcess, main

PADDING = 0
"""What mlx-lm fills the shorter rows of a batch with, on the right; no prompt here has it."""
_NEAREST_FRAMES = 4


@dataclass(frozen=True)
class Call:
    """One call of a model.

    Attributes:
        model: Path that it was loaded from.
        sampling: Whether a token was sampled from what it returned.
        shape: Sequences and tokens of each, padding included.
        rows: The tokens without padding; of a call that prefills only.
    """

    model: str
    sampling: bool
    shape: tuple[int, int]
    rows: tuple[tuple[int, ...], ...]


def count_calls(model: Any, name: str, note: Callable[[Call], None]) -> None:
    """Have `model` tell `note` of each call of it."""
    kind = type(model)

    class Counted(kind):  # type: ignore[misc,valid-type]
        @functools.wraps(kind.__call__)
        def __call__(self, inputs: Any, *args: Any, **options: Any) -> Any:
            note(_call(name, inputs))
            return super().__call__(inputs, *args, **options)

    model.__class__ = Counted


def _call(name: str, inputs: Any) -> Call:
    batch, length = inputs.shape
    frame, sampling = sys._getframe(2), False
    for _ in range(_NEAREST_FRAMES):
        if frame.f_back is None:
            break
        sampling = sampling or frame.f_code.co_name == "_step"
        frame = frame.f_back
    rows: list[tuple[int, ...]] = []
    if not sampling:
        for row in inputs.tolist():
            while row and row[-1] == PADDING:
                row.pop()
            if row:
                rows.append(tuple(row))
    return Call(name, sampling, (batch, length), tuple(rows))


class CountedServer(ServerProcess):
    """A server whose models' calls can be read."""

    module = "tests.computed"
    """What its process runs."""

    def __init__(self, model: Path, store: Path, folder: Path, **options: Any) -> None:
        """As `ServerProcess`."""
        super().__init__(model, store, folder, module=self.module, **options)
        self.model = model
        self._calls = self.log.with_suffix(".calls")
        self._read = 0

    def calls(self) -> list[Call]:
        """Calls since this was asked last."""
        if not self._calls.exists():
            return []
        with self._calls.open() as file:
            file.seek(self._read)
            lines = file.readlines()
            self._read = file.tell()
        found = []
        for line in lines:
            said = json.loads(line)
            rows = tuple(tuple(row) for row in said["rows"])
            found.append(Call(said["model"], said["sampling"], tuple(said["shape"]), rows))
        return found

    def prefilled(self) -> list[tuple[int, ...]]:
        """Pieces of prompts that the model (not the draft model) computed since asked last."""
        return [
            row
            for call in self.calls()
            if call.model == str(self.model) and not call.sampling
            for row in call.rows
        ]


@dataclass(frozen=True)
class Told:
    """What an answer says of the cache.

    Attributes:
        source: `memory`, `disk` or `miss`, by the header.
        num_tokens: Cached tokens, by the header.
        reason: Why no more, by the header; "" when it says nothing.
        cached_tokens: Cached tokens, by the usage.
        prompt_tokens: Length of the prompt, by the usage.
        text: The answer itself.
    """

    source: str
    num_tokens: int
    reason: str
    cached_tokens: int
    prompt_tokens: int
    text: str


_HEADER = re.compile(r'(memory|disk|miss); tokens=(\d+)(?:; reason="([^"]+)")?')


def told(answer: requests.Response) -> Told:
    """Read an answer of status 200, streamed or not; a stream has to include its usage."""
    assert answer.status_code == 200, answer.text
    said = answer.headers.get("x-persist-cache") or comment(answer)
    header = _HEADER.fullmatch(said)
    assert header is not None, f"x-persist-cache: {said}"
    if answer.headers["Content-Type"].startswith("text/event-stream"):
        events = [
            json.loads(line.removeprefix(b"data: "))
            for line in answer.content.splitlines()
            if line.startswith(b"data: {")
        ]
        (usage,) = [event["usage"] for event in events if "usage" in event]
    else:
        events = [answer.json()]
        usage = events[0]["usage"]
    choices = [choice for event in events for choice in event["choices"]]
    texts = [one.get("text") or _content(one) for one in choices]
    return Told(
        source=header[1],
        num_tokens=int(header[2]),
        reason=header[3] or "",
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        prompt_tokens=usage["prompt_tokens"],
        text="".join(texts),
    )


def comment(answer: requests.Response) -> str:
    """What a stream that began before its look says of the cache, in the place of its header."""
    lines = answer.text.splitlines()
    start = ": x-persist-cache: "
    return next((one.removeprefix(start) for one in lines if one.startswith(start)), "")


def _content(choice: dict[str, Any]) -> str:
    return (choice.get("delta") or choice.get("message") or {}).get("content") or ""


def prompt_of(tokenizer: Any, body: dict[str, Any]) -> list[int]:
    """The tokens of a request, read with nothing of ours."""
    from mlx_lm.server import process_message_content

    if "prompt" in body:
        return list(tokenizer.encode(body["prompt"]))
    messages = copy.deepcopy(body["messages"])
    process_message_content(messages)
    tokens = tokenizer.apply_chat_template(
        messages,
        tools=body.get("tools") or None,
        add_generation_prompt=True,
        tokenize=True,
        **body.get("chat_template_kwargs", {}),
    )
    return list(tokens)


def accounts_for(pieces: Sequence[tuple[int, ...]], wanted: Sequence[Sequence[int]]) -> bool:
    """Whether pieces are just these sequences, each cut anywhere and computed in order."""
    return _fits(tuple(pieces), tuple(sorted(tuple(one) for one in wanted if one)))


def _fits(pieces: tuple[tuple[int, ...], ...], left: tuple[tuple[int, ...], ...]) -> bool:
    if not pieces:
        return not left
    first, others = pieces[0], pieces[1:]
    for index, one in enumerate(left):
        # Equal ones are next to each other, and it does not matter which is taken.
        if one[: len(first)] != first or (index and one == left[index - 1]):
            continue
        rest = one[len(first) :]
        after = sorted((*left[:index], *left[index + 1 :], *((rest,) if rest else ())))
        if _fits(others, tuple(after)):
            return True
    return False


def counting_main(before: Callable[[Call], None] = lambda call: None) -> None:
    """Be a server whose models note their calls, after `before` was called with each."""
    from mlx_lm import server as upstream

    job = Path(sys.argv[1])
    log = job.with_suffix(".calls").open("a", buffering=1)
    load = upstream.load

    def note(call: Call) -> None:
        before(call)
        log.write(
            json.dumps(
                {
                    "model": call.model,
                    "sampling": call.sampling,
                    "shape": call.shape,
                    "rows": call.rows,
                }
            )
            + "\n"
        )

    def counting(path: str, *args: Any, **options: Any) -> Any:
        loaded = load(path, *args, **options)
        count_calls(loaded[0], path, note)
        return loaded

    upstream.load = counting
    main()


if __name__ == "__main__":
    counting_main()
