"""The kinds of causes: a sentence for each, the repair that would help, and the client's switch."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from persist_cache.stability import names


class Known(NamedTuple):
    """What is known of a kind.

    Attributes:
        sentence: What it is, for people.
        repair: The name of the option of `--stabilize` that mends it, or "".
        switch: What turns it off in a client that has a switch, or "".
        code: Its number in docs/agents.md, or "".
    """

    sentence: str
    repair: str = ""
    switch: str = ""
    code: str = ""


class Kind(Enum):
    """Why a prompt parts from an earlier one."""

    BILLING = "billing"
    COUNTDOWN = "countdown"
    INLINE_SYSTEM = "inline_system"
    DATE = "date"
    TOOL_ORDER = "tool_order"
    TOOL_SPELLING = "tool_spelling"
    REMINDERS = "reminders"
    REMINDER_ORDER = "reminder_order"
    CLEARED = "cleared"
    RESULT_CLEARED = "result_cleared"
    ENV = "env"
    THINKING = "thinking"
    COMPACTED = "compacted"
    SIDE_REQUEST = "side_request"
    GIVEN_UP = "given_up"
    LOOK_ALIKE = "look_alike"
    MODEL = "model"
    SALT = "salt"
    OPTION = "option"
    TOOL_SET = "tool_set"
    TOOL_SCHEMA = "tool_schema"
    SYSTEM = "system"
    CONVERSATION = "conversation"
    QUESTION = "question"
    MESSAGE = "message"
    SHORTENED = "shortened"
    TEXT = "text"
    TEMPLATE = "template"
    NOT_KEPT = "not_kept"

    @property
    def known(self) -> Known:
        """What is known of it."""
        return _KNOWN[self]

    @property
    def is_new(self) -> bool:
        """Whether nothing went wrong: what follows is new."""
        return self in (Kind.CONVERSATION, Kind.QUESTION, Kind.TEXT, Kind.SIDE_REQUEST)


_KNOWN = {
    Kind.BILLING: Known(
        "the client's billing line changes with each version or request",
        names.BILLING,
        "CLAUDE_CODE_ATTRIBUTION_HEADER=0",
        "T1",
    ),
    Kind.COUNTDOWN: Known(
        "the client counts the tokens that are left",
        names.COUNTDOWN,
        "CLAUDE_CODE_TOTAL_TOKENS_REMINDER=off",
        "T2",
    ),
    Kind.INLINE_SYSTEM: Known(
        "the template prints a system message of the conversation at the head",
        names.INLINE_SYSTEM,
        code="T3",
    ),
    Kind.DATE: Known("a date or time differs", names.DATE, code="T4"),
    Kind.TOOL_ORDER: Known("the same tools come in another order", names.TOOLS, code="T5"),
    Kind.TOOL_SPELLING: Known(
        "a tool is the same with its keys in another order, or other white space",
        names.TOOLS,
        code="T5",
    ),
    Kind.REMINDERS: Known("a reminder of the client differs", code="T6"),
    Kind.REMINDER_ORDER: Known(
        "a list in a reminder of the client comes in another order", names.REMINDERS, code="T6"
    ),
    Kind.CLEARED: Known(
        "the time at which the client cleared a tool's result differs", names.CLEARED, code="T7"
    ),
    Kind.RESULT_CLEARED: Known("the client took an earlier tool's result out", code="T7"),
    Kind.ENV: Known(
        "the folder, or what git says of it, differs",
        names.ENV,
        "CLAUDE_CODE_DISABLE_GIT_INSTRUCTIONS=1 or --exclude-dynamic-system-prompt-sections",
        "T8",
    ),
    Kind.THINKING: Known(
        "the template leaves out earlier thoughts, or prints them in another way",
        names.THINKING,
        code="T9",
    ),
    Kind.COMPACTED: Known("the client compacted the conversation", code="T10"),
    Kind.SIDE_REQUEST: Known(
        "a request of another kind, such as a sub-agent's or for a title", code="T11"
    ),
    Kind.GIVEN_UP: Known(
        "its client gave the earlier request up before all of it was computed", code="T12"
    ),
    Kind.LOOK_ALIKE: Known("the texts look the same and are not", code="T13"),
    Kind.MODEL: Known("another model, or the model with another adapter or draft model"),
    Kind.SALT: Known("another cache_salt, which keeps requests apart"),
    Kind.OPTION: Known("an option of the request changes what the template prints"),
    Kind.TOOL_SET: Known("tools were added or removed"),
    Kind.TOOL_SCHEMA: Known("the definition of a tool differs"),
    Kind.SYSTEM: Known("the system prompt differs"),
    Kind.CONVERSATION: Known("another conversation begins here"),
    Kind.QUESTION: Known("another message takes the place of the last one"),
    Kind.MESSAGE: Known("an earlier message differs"),
    Kind.SHORTENED: Known("the client left earlier messages out"),
    Kind.TEXT: Known("the text goes on differently"),
    Kind.TEMPLATE: Known("the template prints earlier messages in another way"),
    Kind.NOT_KEPT: Known("the earlier request shares more than could be found"),
}
