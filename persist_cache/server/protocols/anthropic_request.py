"""The body of a request to Anthropic's Messages, as what this server is asked to do.

`read_messages` takes everything from a body that is acted on, in one pass. What is null is absent;
fields that are not known are accepted; what is known and cannot be done is named in `ignored`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from persist_cache.server.protocols.anthropic_messages import (
    Conversation,
    mark_of,
)
from persist_cache.server.protocols.asked import Asked
from persist_cache.server.protocols.caching import read_caching
from persist_cache.server.protocols.fields import (
    check_whole,
    flag,
    is_a,
    kind,
    sampling,
    text_of,
)
from persist_cache.server.validation import MAX_NEW_TOKENS, MAX_STOP_WORDS, wrong
from persist_cache.stability.names import DEFAULTS

_THINKING = ("enabled", "adaptive", "between_tools", "disabled")
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
"""Efforts that clients ask for, as those that templates know."""
_OPTION_NAMES = {
    "thinking_budget": "thinking.budget_tokens",
    "reasoning_effort": "output_config.effort",
}
"""What this protocol calls options of templates."""
_TOLD: dict[str, Callable[[Any], bool]] = {
    "container": bool,
    "context_management": lambda value: not is_a(value, dict) or _edits(value.get("edits")),
    "mcp_servers": bool,
    "output_format": bool,
}
"""Fields that ask for what is not done, and when that makes a difference."""


def read_messages(
    body: Mapping[str, Any],
    *,
    counting: bool = False,
    stabilize: Collection[str] = DEFAULTS,
) -> Asked:
    """Read the body of a request.

    Args:
        body: A JSON object.
        counting: It asks for the number of its tokens; there is no `max_tokens` then.
        stabilize: Names of the repairs that may be done. Only those of single blocks of a system
            prompt are done here, where blocks are known.

    Raises:
        RefusedError: It is malformed, or asks for what cannot be left out.
    """
    model = text_of(body, "model", "")
    if not model:
        raise wrong("model", "must not be empty.")
    said = Conversation(stabilize)
    ignored = {name for name, asks in _TOLD.items() if body.get(name) and asks(body[name])}
    tools = _tools(body.get("tools"), said, ignored)
    _read_conversation(body, said, counting=counting)
    may_call, one_call = _tool_choice(body.get("tool_choice"), tools, ignored)
    stream = bool(flag(body, "stream"))
    thinks, template_args = _thinking(body, ignored)
    _check_metadata(body.get("metadata"))
    caching = read_caching(body)
    limit = 0 if counting else _max_tokens(body, stream=stream, thinks=thinks)
    return Asked(
        model=model,
        messages=said.messages,
        tools=tools or None,
        template_args=template_args,
        option_names=_OPTION_NAMES,
        max_tokens=0 if caching.prewarm else limit,
        stream=stream,
        stop_words=_stop_words(body.get("stop_sequences")),
        sampling=sampling(body, hottest=1),
        may_call=may_call,
        one_call=one_call,
        marks=said.marks,
        caching=caching,
        repaired=tuple(sorted(said.repaired)),
        ignored=tuple(sorted(ignored | said.ignored)),
    )


def _read_conversation(body: Mapping[str, Any], said: Conversation, *, counting: bool) -> None:
    if (system := body.get("system")) is not None:
        said.add_system(system, "system")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "must be a list of at least one message.")
    for place, message in enumerate(messages):
        said.add(message, f"messages.{place}")
    if said.messages and said.messages[-1]["role"] == "assistant" and not counting:
        raise wrong(
            f"messages.{len(messages) - 1}",
            "is the assistant's: this server cannot go on with an answer; end with the user's.",
        )
    if all(one["role"] == "system" for one in said.messages):
        raise wrong("messages", "must have a message of the user.")
    if (ttl_s := mark_of(body, "")) is not None:
        said.mark_end(ttl_s)


def _tools(given: Any, said: Conversation, ignored: set[str]) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list):
        raise wrong("tools", "must be a list.")
    tools: dict[str, dict[str, Any]] = {}
    for place, tool in enumerate(given):
        at = f"tools.{place}"
        if not isinstance(tool, dict):
            raise wrong(at, "must be an object.")
        own = tool.get("type") is None or kind(tool, at) == "custom"
        schema, description = tool.get("input_schema"), tool.get("description")
        ttl_s = mark_of(tool, at)
        if own or schema is not None:
            name = text_of(tool, "name", at)
            if not name:
                raise wrong(f"{at}.name", "must not be empty.")
            if name in tools:
                raise wrong(f"{at}.name", "is the name of another tool, too.")
            if not isinstance(schema, dict):
                raise wrong(f"{at}.input_schema", "must be an object.")
            if description is not None and not isinstance(description, str):
                raise wrong(f"{at}.description", "must be a text.")
            function = {"name": name, "description": description or "", "parameters": schema}
            tools[name] = {"type": "function", "function": function}
        else:
            # Anthropic's own: run on its servers, or known to its models without a schema.
            ignored.add("tools")
        if ttl_s is not None:
            said.mark_end(ttl_s)
    return list(tools.values())


def _tool_choice(choice: Any, tools: list[dict[str, Any]], ignored: set[str]) -> tuple[bool, bool]:
    """Whether there may be calls, and whether there may be only one."""
    if choice is None:
        return bool(tools), False
    if not isinstance(choice, dict):
        raise wrong("tool_choice", "must be an object.")
    said = kind(choice, "tool_choice")
    if said not in ("auto", "any", "tool", "none"):
        raise wrong("tool_choice.type", "must be auto, any, tool or none.")
    if said == "tool":
        name = text_of(choice, "name", "tool_choice")
        if tools and all(tool["function"]["name"] != name for tool in tools):
            raise wrong("tool_choice.name", "is the name of no tool of this request.")
    if said in ("any", "tool"):
        if not tools and "tools" not in ignored:
            raise wrong("tool_choice", "asks for a tool, and the request has none.")
        ignored.add("tool_choice")
    one = choice.get("disable_parallel_tool_use")
    if one is not None and not isinstance(one, bool):
        raise wrong("tool_choice.disable_parallel_tool_use", "must be true or false.")
    return bool(tools) and said != "none", bool(one)


def _thinking(body: Mapping[str, Any], ignored: set[str]) -> tuple[bool, dict[str, Any]]:
    """Whether thinking is asked for, and what the template is told about it."""
    found: dict[str, Any] = {}
    thinking = body.get("thinking")
    thinks = False
    if thinking is not None:
        if not isinstance(thinking, dict):
            raise wrong("thinking", "must be an object.")
        said = kind(thinking, "thinking")
        if said not in _THINKING:
            raise wrong("thinking.type", f"must be one of {', '.join(_THINKING)}.")
        thinks = said != "disabled"
        found["enable_thinking"] = thinks
        budget = thinking.get("budget_tokens")
        if budget is not None or said == "enabled":
            check_whole(budget, "thinking.budget_tokens", 1, MAX_NEW_TOKENS)
            found["thinking_budget"] = budget
    output = body.get("output_config")
    if output is not None:
        if not isinstance(output, dict):
            raise wrong("output_config", "must be an object.")
        if output.get("format") is not None:
            ignored.add("output_config.format")
        effort = output.get("effort")
        if effort is not None:
            if not isinstance(effort, str) or effort not in _EFFORTS:
                raise wrong("output_config.effort", f"must be one of {', '.join(_EFFORTS)}.")
            found["reasoning_effort"] = _EFFORTS[effort]
    return thinks, found


def _max_tokens(body: Mapping[str, Any], *, stream: bool, thinks: bool) -> int:
    limit = body.get("max_tokens")
    check_whole(limit, "max_tokens", 0, MAX_NEW_TOKENS)
    structured = body.get("output_format") or (body.get("output_config") or {}).get("format")
    if limit == 0 and (stream or thinks or structured):
        raise wrong(
            "max_tokens", "must not be 0 together with stream, thinking or an output format."
        )
    return int(limit or 0)


def _stop_words(given: Any) -> list[str]:
    if given is None:
        return []
    if not isinstance(given, list) or len(given) > MAX_STOP_WORDS:
        raise wrong("stop_sequences", f"must be a list of at most {MAX_STOP_WORDS} texts.")
    for place, word in enumerate(given):
        if not isinstance(word, str) or not word:
            raise wrong(f"stop_sequences.{place}", "must be a text that is not empty.")
    return list(dict.fromkeys(given))


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise wrong("metadata", "must be an object.")
    if not isinstance(metadata.get("user_id"), str | None):
        raise wrong("metadata.user_id", "must be a text.")


def _edits(given: Any) -> bool:
    """Whether a list of edits to the conversation asks for more than to leave all of it."""
    edits = given if isinstance(given, list) else [given] * bool(given)
    return any(
        not isinstance(edit, dict)
        or not str(edit.get("type")).startswith("clear_thinking_")
        or edit.get("keep") != "all"
        for edit in edits
    )
