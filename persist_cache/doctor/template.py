"""Whether a chat template only ever appends, found out with made-up conversations.

A prompt is reused as far as the next one begins with it. So each conversation is rendered as its
client would send it, request by request, and each prompt has to continue the one before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persist_cache.doctor.judgement import Finding
from persist_cache.stability import thinking

Message = dict[str, Any]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None, bool, Any], str]
"""Renders messages and tools, with the beginning of an answer or without, with these options."""

TURNS, TOOLS, THINKING = "turns", "tool turns", "thinking"
_OTHERS = {"enable_thinking": False, "thinking": False}
"""Options that may mend a template, but change what the model does."""
_DATE_OPTIONS = ("date_string", "current_date", "today_date")
_SHOWN = 40
_TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}


@dataclass(frozen=True, slots=True)
class Check:
    """What became of one conversation.

    Attributes:
        kind: `turns`, `tool turns` or `thinking`.
        outcome: `appends`; or `parts`, where a prompt does not begin with the one before; or
            `refused`, where the template renders none of it.
        before: The end of what both have in common.
        earlier: What followed.
        later: What follows now.
        lost_characters: Of the earlier prompt, those that are computed again.
        reason: Why it was refused.
    """

    kind: str
    outcome: str
    before: str = ""
    earlier: str = ""
    later: str = ""
    lost_characters: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TemplateReport:
    """What is known of a chat template.

    Attributes:
        checks: One for each conversation.
        mends: Options with which it appends in all of those that it takes.
        date_option: The option for its date, where it prints today's; "" where that has none.
        prints_date: It prints today's date.
    """

    checks: tuple[Check, ...] = ()
    mends: Mapping[str, Any] | None = None
    date_option: str = ""
    prints_date: bool = False

    @property
    def appends(self) -> bool:
        """Whether it only ever appends, in what it takes."""
        return all(one.outcome != "parts" for one in self.checks)


def look_at_template(tokenizer: Any) -> TemplateReport | None:
    """Render made-up conversations.

    Args:
        tokenizer: As mlx-lm loads it.

    Returns:
        None where it has no chat template.
    """
    if not getattr(tokenizer, "has_chat_template", False):
        return None
    source = getattr(tokenizer, "chat_template", None)
    text = source if isinstance(source, str) else json.dumps(source, default=str)

    def render(
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        generation: bool,
        options: Any,
    ) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                add_generation_prompt=generation,
                tokenize=False,
                **options,
            )
        )

    return check_template(render, text)


def check_template(render: Render, source: str) -> TemplateReport:
    """As `look_at_template`, for what renders.

    Args:
        render: Raises when the template refuses.
        source: The template's text.
    """
    checks = tuple(_check(render, source, kind, {}) for kind in (TURNS, TOOLS, THINKING))
    dates = [name for name in _DATE_OPTIONS if name in source]
    prints_date = "strftime_now" in source
    bad = [one.kind for one in checks if one.outcome == "parts"]
    mends = None
    if bad:
        keeping = thinking.options_in(source)
        tries: list[dict[str, Any]] = [keeping] if keeping else []
        tries += [{name: value} for name, value in _OTHERS.items() if name in source]
        for options in tries:
            if all(_check(render, source, kind, options).outcome == "appends" for kind in bad):
                mends = options
                break
    return TemplateReport(checks, mends, dates[0] if dates and prints_date else "", prints_date)


def judge_template(model: str, found: TemplateReport) -> Iterator[Finding]:
    """What a template costs, and what mends it."""
    for one in found.checks:
        if one.outcome != "parts":
            continue
        sentence = (
            f"The chat template of {model} does not only append: with {one.kind}, a later prompt "
            f"has {one.later!r} where the one before had {one.earlier!r}, so what follows is "
            "computed again"
        )
        yield Finding("note", f"{sentence}; {_mend(found)}.")
    if found.prints_date:
        cure = "no option of it says another"
        if found.date_option:
            said = json.dumps({found.date_option: "1 January 2026"})
            cure = f"--chat-template-args '{said}' keeps it the same"
        yield Finding(
            "note",
            f"The chat template of {model} prints today's date at the head of each prompt, so "
            f"nothing is reused on the next day; {cure}.",
        )


def _mend(found: TemplateReport) -> str:
    if found.mends is None:
        return "no option of the template that is known here changes that"
    said = f"--chat-template-args '{json.dumps(found.mends)}'"
    if found.mends.keys() <= thinking.KEEPING.keys():
        return f"--stabilize thinking mends it, or {said}"
    return f"{said} mends it, and changes what the model does"


def _check(render: Render, source: str, kind: str, options: Mapping[str, Any]) -> Check:
    messages = _conversation(kind, source)
    tools = None if kind == TURNS else [_TOOL]
    before = ""
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            whole = render(messages[:at], tools, True, options)
            kept = render(messages[:at], tools, False, options)
        except Exception as error:  # templates are programs that raise what they like
            said = str(error).strip().splitlines()
            return Check(kind, "refused", reason=said[0] if said else type(error).__name__)
        shared = _shared(before, whole)
        if shared < len(before):
            # Whole words are shown.
            word = max(before.rfind(blank, 0, shared) for blank in " \n") + 1
            return Check(
                kind,
                "parts",
                before[max(0, word - _SHOWN) : word],
                before[word : word + _SHOWN],
                whole[word : word + _SHOWN],
                len(before) - shared,
            )
        # The beginning of an answer is no part of what has to be kept.
        before = kept if whole.startswith(kept) else whole
    return Check(kind, "appends")


def _conversation(kind: str, source: str) -> list[Message]:
    """A conversation that ends in an answer, all of which are asked for in turn."""
    said: list[Message] = [{"role": "system", "content": "You are a helpful assistant."}]
    field = next((name for name in thinking.FIELDS if name in source), thinking.FIELDS[0])

    def answer(text: str, thought: str, call: str = "") -> Message:
        message: Message = {"role": "assistant", "content": text}
        if kind == THINKING:
            message[field] = thought
        if call:
            function = {"name": "read_file", "arguments": {"path": call}}
            message["tool_calls"] = [{"id": "call00001", "type": "function", "function": function}]
        return message

    for turn in ("first", "second", "third"):
        said.append({"role": "user", "content": f"Please do the {turn} thing."})
        if kind != TURNS:
            for step in ("alpha", "beta"):
                said.append(answer("", f"I look at {step} for the {turn}.", f"{step}.txt"))
                result = f"What is in {step}."
                said.append(
                    {
                        "role": "tool",
                        "name": "read_file",
                        "tool_call_id": "call00001",
                        "content": result,
                    }
                )
        said.append(answer(f"The {turn} thing is done.", f"That was the {turn}."))
    return said


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    places = (at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(places, min(len(a), len(b)))
