"""What a request of a protocol of ours asks for, whatever its protocol: a chat, and how to answer.

A reader of bodies makes it; from then on nothing depends on how the client said it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

BETWEEN_BLOCKS = "\n\n"
"""What separates texts that a protocol keeps in blocks of their own."""
THINKING_FIELD = "reasoning_content"
"""What most templates call what the model thought."""
SERVER_TOOLS = "server-tools"
"""Names, among what is ignored, what tools did that this server does not have."""


class Mark(Struct, frozen=True):
    """A place up to which the client asks for its prompt to be kept.

    Attributes:
        message: Index among the messages of the chat; -1 stands for the tools in front of them.
        characters: Of that message's content, in front of the mark; None for the whole message.
        ttl_s: For how long the client would keep it.
    """

    message: int
    characters: int | None
    ttl_s: int


class Caching(Struct, frozen=True):
    """What is asked of the cache.

    Attributes:
        group: That the request belongs to, or "".
        only_marked: Nothing is kept but what ends at a place that the client marks.
        ttl_s: For how long after each use the client would keep the prompt; 0 for no matter.
        prewarm: The prompt is to be computed and kept, and nothing generated.
        salt: Only requests with the same one share anything; "" for none.
    """

    group: str = ""
    only_marked: bool = False
    ttl_s: int = 0
    prewarm: bool = False
    salt: str = ""


class Asked(Struct, frozen=True):
    """A request that was understood.

    Attributes:
        model: As the client names it.
        messages: Of a chat, as templates take them; system prompts at the head are among them.
        tools: Definitions of functions, or None.
        template_args: Options of the chat template, those that not all templates have among them.
        option_names: What the client calls them, where that is something else.
        max_tokens: Of the answer; 0 only fills the cache, None is the server's default.
        stream: The answer is wanted as events.
        stop_words: That end the answer.
        sampling: Temperature, `top_p` and `top_k`, where they are given.
        may_call: What looks like a tool call is one.
        one_call: The answer ends with its first tool call.
        marks: Places up to which the prompt is to be kept, in order.
        caching: What else is asked of the cache.
        repaired: Names of the repairs that changed it.
        ignored: Names of what was asked for and is not done.
    """

    model: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_args: dict[str, Any] = field(default_factory=dict)
    option_names: Mapping[str, str] = field(default_factory=dict)
    max_tokens: int | None = 0
    stream: bool = False
    stop_words: list[str] = field(default_factory=list)
    sampling: dict[str, float | int] = field(default_factory=dict)
    may_call: bool = False
    one_call: bool = False
    marks: list[Mark] = field(default_factory=list)
    caching: Caching = field(default_factory=Caching)
    repaired: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def joined(before: str, text: str) -> str:
    """Two blocks of text as one text."""
    return f"{before}{BETWEEN_BLOCKS}{text}" if before and text else before or text
