"""What may be done about prefixes that break: exact edits of a request, each told by its name.

Each takes one known shape out of the one place where a client puts it, and leaves everything else
as it is. All are idempotent.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from msgspec import Struct

from persist_cache.stability.lines import lines_of
from persist_cache.stability.names import BILLING, COUNTDOWN, DEFAULTS, INLINE_SYSTEM

_BILLING_HEAD = "x-anthropic-billing-header: "
_BILLING = re.compile(
    r"x-anthropic-billing-header: cc_version=[0-9A-Za-z.-]+; cc_entrypoint=[0-9A-Za-z_-]+;"
    r"(?: cch=[0-9a-f]{5};)?(?: cc_workload=[0-9A-Za-z_-]{1,128};)?(?: cc_is_subagent=true;)?"
)
"""The digest is sent to Anthropic's own servers; elsewhere the version alone changes."""
_COUNTDOWN_END = " tokens left</total_tokens>"
_COUNTDOWN = re.compile(r"<total_tokens>[0-9]+ tokens left</total_tokens>\Z")


class Repaired(Struct, frozen=True):
    """A text after its repairs.

    Attributes:
        text: What is left of it.
        names: Of the repairs that changed it.
    """

    text: str
    names: tuple[str, ...] = ()


def system_text(text: str, chosen: Collection[str] = DEFAULTS) -> Repaired:
    """Take out of a system text what says nothing about the model that reads it.

    Args:
        text: A whole system prompt, one block of it, or a system message in mid-conversation.
            Texts of any other role are none of this function's business.
        chosen: Names of the repairs that may be done.
    """
    names, before = [], None
    while text != before:  # what one of them leaves at the end may be the other one's
        before = text
        for name, repair in ((BILLING, without_billing), (COUNTDOWN, without_countdown)):
            if name in chosen and (found := repair(text)) != text:
                text = found
                names.append(name)
    return Repaired(text, tuple(sorted(set(names))))


def without_billing(text: str) -> str:
    """Drop the lines in which a client accounts for its requests.

    A line that is indented, quoted, within a code fence or within a tag that says example stays.
    """
    if _BILLING_HEAD not in text:
        return text
    kept = [
        line.text for line in lines_of(text) if line.is_example or not _BILLING.fullmatch(line.text)
    ]
    return "\n".join(kept)


def without_countdown(text: str) -> str:
    """Drop the count of tokens left in a hosted budget from the end, and the white space there."""
    while True:
        ended = text.rstrip()
        if not ended.endswith(_COUNTDOWN_END):
            return text
        # The number is short: there is no need to look through all of a long text.
        found = _COUNTDOWN.search(ended, max(0, len(ended) - 100))
        if found is None:
            return text
        text = ended[: found.start()].rstrip()


def inline_system_as_user(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], tuple[str, ...]]:
    """Say system messages in mid-conversation as the user, for templates that refuse them there.

    They stay in their place, in a tag of their own: what follows keeps its prefix, and a reminder
    gains no authority. The system messages at the head are left alone.

    Args:
        messages: Of a chat; content is text.

    Returns:
        The messages, and the names of the repairs that changed them.
    """
    head = 0
    while head < len(messages) and messages[head].get("role") == "system":
        head += 1
    said = [
        as_user(message) if message.get("role") == "system" else message
        for message in messages[head:]
    ]
    changed = any(a is not b for a, b in zip(said, messages[head:], strict=True))
    return [*messages[:head], *said], (INLINE_SYSTEM,) if changed else ()


def as_user(message: Mapping[str, Any]) -> dict[str, Any]:
    """A system message as one of the user's, in a tag that says what it was."""
    text = message.get("content") or ""
    return {**message, "role": "user", "content": f"<system-message>\n{text}\n</system-message>"}
