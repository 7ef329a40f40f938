"""The body of a request to OpenAI's Responses, as what this server is asked to do.

`read_responses` takes everything from a body that is acted on, in one pass. What is null is absent;
fields that are not known are accepted; what is known and cannot be done is named in `ignored`, or
refused where an answer without it would be an answer to something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

from persist_cache.server.lengths import NO_LIMIT
from persist_cache.server.names import DEFAULT
from persist_cache.server.protocols.asked import Asked
from persist_cache.server.protocols.caching import GROUP, RETENTION, read_caching
from persist_cache.server.protocols.fields import (
    check_whole,
    flag,
    kind,
    object_of,
    sampling,
    text_of,
)
from persist_cache.server.protocols.responses_items import SEALED, Transcript
from persist_cache.server.protocols.responses_tools import TOOLS, Toolbox
from persist_cache.server.validation import (
    MAX_NEW_TOKENS,
    RefusedError,
    check_names,
    check_stop,
    wrong,
)

_EFFORTS = {
    "none": "",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
"""Efforts that clients ask for, as those that templates know; "" is not to think at all."""
_SUMMARIES = ("auto", "concise", "detailed")
_OPTION_NAMES = {"reasoning_effort": "reasoning.effort"}
"""What this protocol calls options of templates."""
_TOLD: dict[str, Callable[[Any], bool]] = {
    "context_management": bool,
    "include": lambda value: value != [SEALED],
    "moderation": bool,
    "top_logprobs": bool,
    "truncation": lambda value: value != "disabled",
}
"""Fields that ask for what is not done, and when that makes a difference."""
_NO_STATE = "this server keeps no responses; send the whole conversation as input."
_LABELS = ("user", "safety_identifier", GROUP, RETENTION)


class Manner(Struct, frozen=True):
    """How a client wants its answer to be said.

    Attributes:
        tools: What the client calls its tools.
        fields: Of the request, that the answer repeats.
        as_summary: Thoughts are told as their summary.
        seals: Thoughts are sealed as well, for clients that keep nothing else of them.
    """

    tools: Toolbox
    fields: Mapping[str, Any]
    as_summary: bool = False
    seals: bool = False


def read_responses(body: Mapping[str, Any]) -> tuple[Asked, Manner]:
    """Read the body of a request.

    Args:
        body: A JSON object.

    Raises:
        RefusedError: It is malformed, or asks for what cannot be left out.
    """
    _refuse_state(body)
    model = _model(body)
    ignored = {name for name, asks in _TOLD.items() if body.get(name) and asks(body[name])}
    include = _include(body)
    tools = Toolbox()
    tools.add(body.get("tools"), "tools")
    said = Transcript(tools)
    if body.get("instructions") is not None:
        said.instruct(text_of(body, "instructions", ""))
    said.add_input(body.get("input"))
    may_call, choice = _tool_choice(body.get("tool_choice"), tools, ignored)
    one_call = flag(body, "parallel_tool_calls") is False
    reasoning, template_args = _reasoning(body, ignored)
    _check_text(body, ignored)
    caching, limit = read_caching(body), _limit(body)
    definitions = list(tools.definitions.values())
    sampled = sampling(body, hottest=2)
    asked = Asked(
        model=model,
        messages=said.messages,
        tools=definitions or None,
        template_args=template_args,
        option_names=_OPTION_NAMES,
        max_tokens=0 if caching.prewarm else limit,
        stream=bool(flag(body, "stream")),
        stop_words=_stop_words(body.get("stop")),
        sampling=sampled,
        may_call=may_call,
        one_call=one_call,
        marks=said.marks,
        caching=caching,
        ignored=tuple(sorted(ignored | said.ignored | tools.ignored)),
    )
    repeated: dict[str, Any] = {
        "instructions": body.get("instructions"),
        "max_output_tokens": None if limit in (None, NO_LIMIT) else limit,
        "metadata": object_of(body, "metadata"),
        "parallel_tool_calls": not one_call,
        "reasoning": reasoning,
        "tool_choice": choice,
        "tools": body.get("tools") or [],
        **_labels(body),
        **{name: sampled[name] for name in ("temperature", "top_p") if name in sampled},
    }
    return asked, Manner(tools, repeated, bool(reasoning["summary"]), SEALED in include)


def _model(body: Mapping[str, Any]) -> str:
    check_names({"model": body.get("model")})
    if body.get("model") == "":
        raise wrong("model", "must not be empty.")
    return str(body.get("model") or DEFAULT)


def _refuse_state(body: Mapping[str, Any]) -> None:
    """Refuse what means something that another request left behind."""
    if body.get("previous_response_id"):
        raise RefusedError(
            400,
            f"previous_response_id cannot be answered: {_NO_STATE}",
            code="previous_response_not_found",
            param="previous_response_id",
        )
    for name in ("conversation", "prompt"):
        if body.get(name):
            raise wrong(name, f"cannot be answered: {_NO_STATE}")
    if flag(body, "background"):
        raise wrong("background", "cannot be true: this server keeps no responses to be got later.")
    flag(body, "store")  # answered false, whatever it is


def _tool_choice(choice: Any, tools: Toolbox, ignored: set[str]) -> tuple[bool, str]:
    """Whether there may be calls, and what the answer says of that."""
    if choice is None:
        return bool(tools.definitions), "auto"
    if isinstance(choice, str):
        said = choice
        if said not in ("auto", "required", "none"):
            raise wrong("tool_choice", "must be auto, required, none or an object.")
    elif isinstance(choice, dict):
        said = kind(choice, "tool_choice")
        if said in ("function", "custom"):
            _check_chosen(choice, tools)
    else:
        raise wrong("tool_choice", "must be a text or an object.")
    if said not in ("auto", "none"):
        if not tools.definitions and TOOLS not in tools.ignored:
            raise wrong("tool_choice", "asks for a tool, and the request has none.")
        ignored.add("tool_choice")
    if said == "none":
        return False, "none"
    return bool(tools.definitions), "auto"


def _check_chosen(choice: Mapping[str, Any], tools: Toolbox) -> None:
    name = text_of(choice, "name", "tool_choice")
    space = choice.get("namespace")
    space = "" if space is None else text_of(choice, "namespace", "tool_choice")
    if tools.definitions and not tools.has(name, space):
        raise wrong("tool_choice.name", "is the name of no tool of this request.")


def _reasoning(body: Mapping[str, Any], ignored: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is said of thinking, and what the template is told about it."""
    given, found = object_of(body, "reasoning"), dict[str, Any]()
    effort, summary = given.get("effort"), given.get("summary", given.get("generate_summary"))
    if effort is not None:
        if not isinstance(effort, str) or effort not in _EFFORTS:
            raise wrong("reasoning.effort", f"must be one of {', '.join(_EFFORTS)}.")
        found["enable_thinking"] = bool(_EFFORTS[effort])
        if _EFFORTS[effort]:
            found["reasoning_effort"] = _EFFORTS[effort]
    if summary == "none":
        summary = None
    if summary is not None and summary not in _SUMMARIES:
        raise wrong("reasoning.summary", f"must be one of {', '.join(_SUMMARIES)}.")
    return {"effort": effort, "summary": summary}, found


def _check_text(body: Mapping[str, Any], ignored: set[str]) -> None:
    text = object_of(body, "text")
    if (form := object_of(text, "format", "text")) and kind(form, "text.format") != "text":
        ignored.add("text.format")
    if text.get("verbosity") not in (None, "medium"):
        text_of(text, "verbosity", "text")
        ignored.add("text.verbosity")


def _limit(body: Mapping[str, Any]) -> int | None:
    limit = body.get("max_output_tokens")
    if limit is None:
        return None
    check_whole(limit, "max_output_tokens", -1, MAX_NEW_TOKENS)
    return NO_LIMIT if limit == -1 else int(limit)


def _stop_words(given: Any) -> list[str]:
    """No field of OpenAI's, but of many servers that speak this protocol."""
    check_stop(given)
    return list(dict.fromkeys([given] if isinstance(given, str) else given or []))


def _include(body: Mapping[str, Any]) -> list[str]:
    given = body.get("include")
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise wrong("include", "must be a list of texts.")
    return given


def _labels(body: Mapping[str, Any]) -> dict[str, str]:
    """Labels of the request; what only a hosted service has a use for is taken as it is."""
    return {name: body[name] for name in _LABELS if isinstance(body.get(name), str)}
