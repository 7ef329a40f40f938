"""Where a prompt is cut: into its system part and its turns, and where it leaves what is known."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

log = logging.getLogger(__name__)


def system_tokens(segments: Sequence[Sequence[int]], kinds: Sequence[str]) -> int:
    """Length of the system part of a prompt that was cut into segments."""
    system = itertools.takewhile(lambda one: one[1] == "system", zip(segments, kinds, strict=True))
    return sum(len(segment) for segment, _ in system)


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
