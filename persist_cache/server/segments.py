"""Where a prompt is cut: into its system part and its turns, and where it leaves what is known."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

log = logging.getLogger(__name__)

_MAX_THOUGHT_TOKENS = 11
"""Of the open thought at the end of a prompt; as many as upstream looks for."""


def system_tokens(segments: Sequence[Sequence[int]], kinds: Sequence[str]) -> int:
    """Length of the system part of a prompt that was cut into segments."""
    system = itertools.takewhile(lambda one: one[1] == "system", zip(segments, kinds, strict=True))
    return sum(len(segment) for segment, _ in system)


def cut_turn(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template_args: Mapping[str, Any],
    prompt: list[int],
) -> tuple[list[list[int]], list[str]]:
    """Cut a prompt as upstream cuts one whose last message is a user's.

    For all others, of which upstream makes one `assistant` piece: an agent's loop, whose last
    message is a tool's result, and texts would leave nothing that can be resumed.

    Args:
        tokenizer: As mlx-lm loads it.
        messages: Of the prompt, prepared for the template; empty for a text.
        tools: Tool definitions, or None.
        template_args: All arguments of the template.
        prompt: The rendered prompt.

    Returns:
        The pieces, and the kind of each.
    """
    start = system_end(tokenizer, messages, tools, template_args, prompt)
    end = thought_start(tokenizer, prompt) if messages else len(prompt)
    cuts = [("system", 0, start), ("user", start, end), ("assistant", end, len(prompt))]
    kept = [(kind, prompt[first:last]) for kind, first, last in cuts if first < last]
    return [piece for _, piece in kept], [kind for kind, _ in kept]


def as_system(end: int, segments: Sequence[Sequence[int]], kinds: Sequence[str]) -> list[str]:
    """The kinds of a prompt's pieces when all that end by `end` are of its system part."""
    ends = itertools.accumulate(map(len, segments))
    return ["system" if place <= end else kind for place, kind in zip(ends, kinds, strict=True)]


def thought_start(tokenizer: Any, prompt: Sequence[int]) -> int:
    """Where the thought begins that a prompt ends with; its length when it ends with none.

    The next request of a conversation leaves it out.
    """
    if not tokenizer.has_thinking:
        return len(prompt)
    start = tokenizer.rfind_think_start(prompt, start=max(0, len(prompt) - _MAX_THOUGHT_TOKENS))
    return int(start) if start > 0 else len(prompt)


def checkpoints(
    segments: Sequence[Sequence[int]], kinds: Sequence[str], leave_tokens: int
) -> list[tuple[int, str]]:
    """Where the cache of a prompt is kept: the end of each piece but an open thought, and its kind.

    Args:
        segments: The pieces of the prompt.
        kinds: The kind of each.
        leave_tokens: Tokens at the end of the prompt that no checkpoint holds, at least one.
    """
    last = sum(map(len, segments)) - max(1, leave_tokens)
    found: list[tuple[int, str]] = []
    for end, kind in zip(itertools.accumulate(map(len, segments)), kinds, strict=True):
        place = min(end, last)
        if kind != "assistant" and place > (found[-1][0] if found else 0):
            found.append((place, kind))
    return found


def system_end(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template_args: Mapping[str, Any],
    prompt: Sequence[int],
) -> int:
    """Tokens of `prompt` that any conversation with the same system messages shares.

    For a prompt that upstream does not cut, because its last message is no user's.

    Args:
        tokenizer: As mlx-lm loads it.
        messages: Of the prompt, prepared for the template.
        tools: Tool definitions, or None.
        template_args: All arguments of the template.
        prompt: The rendered prompt.
    """
    head = list(itertools.takewhile(lambda one: one.get("role") == "system", messages))
    if not head or not tokenizer.has_chat_template:
        return 0
    try:
        probe = tokenizer.apply_chat_template(
            [*head, {"role": "user", "content": ""}],
            tools=tools,
            add_generation_prompt=False,
            tokenize=True,
            **template_args,
        )
    except Exception as error:  # a template is a program of its own
        log.debug("no system part could be rendered: %s", error)
        return 0
    for index, (a, b) in enumerate(zip(probe, prompt, strict=False)):
        if a != b:
            return index
    return 0


def cut_at(
    position: int, segments: list[list[int]], types: list[str]
) -> tuple[list[list[int]], list[str]]:
    """Cut the segment that goes on beyond `position` in two of its kind; 0 cuts none."""
    start = 0
    for index, segment in enumerate(segments):
        end = start + len(segment)
        if start < position < end:
            halves = [segment[: position - start], segment[position - start :]]
            kind = types[index]
            return (
                [*segments[:index], *halves, *segments[index + 1 :]],
                [*types[:index], kind, *types[index:]],
            )
        start = end
    return segments, types


def cut_only_at(places: Sequence[int], prompt: Sequence[int]) -> tuple[list[list[int]], list[str]]:
    """Cut a prompt at these places, in order, and have nothing kept of what is behind them."""
    inner = [place for place in places if 0 < place < len(prompt)]
    cuts = list(itertools.pairwise([0, *inner, len(prompt)]))
    pieces = [list(prompt[start:end]) for start, end in cuts]
    return pieces, [*("user" for _ in inner), "assistant"]
