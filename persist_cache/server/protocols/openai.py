"""OpenAI's chat and text completions: what a body means, what of it is ignored, how errors look.

`lenient` makes of a body what `mlx_lm.server` understands, in the same way for requests, for
`explain` and for `warm`; what it returns is checked like any other body. `ignored` names what was
asked for and is not done.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from persist_cache.errors import ModelError, PersistCacheError
from persist_cache.server.lengths import NO_LIMIT
from persist_cache.server.protocols.asked import Asked
from persist_cache.server.protocols.caching import marks_of_chat, read_caching
from persist_cache.server.validation import RefusedError, first_line

_TOLD: dict[str, Callable[[Any], bool]] = {
    "audio": bool,
    "best_of": lambda value: value != 1,
    "echo": bool,
    "function_call": bool,
    "functions": bool,
    "modalities": lambda value: value != ["text"],
    "n": lambda value: value != 1,
    "prediction": bool,
    "reasoning_effort": bool,
    "response_format": lambda value: _kind(value) != "text",
    "suffix": bool,
    "tool_choice": lambda value: _kind(value) != "auto",
    "verbosity": bool,
    "web_search_options": lambda value: value is not None,
}
"""Fields of OpenAI's API that change its answers and not ours, and when that makes a difference.

Labels and what only concerns OpenAI's own service (`user`, `metadata`, `store`, `service_tier`) are
not among them.
"""


def error_body(refusal: RefusedError) -> bytes:
    """The body of an answer that refuses a request, in the form that OpenAI's clients read."""
    return json.dumps(error_object(refusal)).encode()


def error_object(refusal: RefusedError) -> dict[str, Any]:
    """A refusal as an object, for the body of an answer or for an event of a stream."""
    return {
        "error": {
            "message": str(refusal),
            "type": "invalid_request_error" if refusal.status < 500 else "server_error",
            "param": refusal.param or None,
            "code": refusal.code or None,
        }
    }


def refusal_of(error: BaseException, status: int) -> RefusedError:
    """What a client is told of an error that upstream would answer with `status`."""
    if isinstance(error, RefusedError):
        return error
    sentence = f"{first_line(error)}."
    if isinstance(error, ModelError):
        return RefusedError(404, sentence, code="model_not_found", param="model")
    if isinstance(error, PersistCacheError):
        return RefusedError(503, sentence)
    if isinstance(error, RecursionError):  # of a repair, a copy or a template
        return RefusedError(400, "The body is nested too deeply.")
    if status == 400:
        return RefusedError(400, sentence)
    if str(error) == "generation thread died":
        return RefusedError(
            503, "The thread that runs the model has ended; start the server again."
        )
    return RefusedError(500, f"The model failed: {sentence}")


def lenient(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body as `mlx_lm.server` understands it; the one that is given stays as it is.

    What is null is absent, but for values of JSON schemas and of templates. `developer` messages
    are system messages. A list of one prompt is that prompt.
    """
    said: dict[str, Any] = _present(body)
    if isinstance(messages := said.get("messages"), list):
        said["messages"] = _without_developers([_message(one) for one in messages])
    if isinstance(tools := said.get("tools"), list):
        said["tools"] = [_with_present(one, "function") for one in tools]
    for name in ("logit_bias", "role_mapping", "stream_options"):
        if name in said:
            said[name] = _present(said[name])
    match said.get("prompt"):
        case [str(only)]:
            said["prompt"] = only
    return said


def ignored(body: Mapping[str, Any], *, is_chat: bool) -> list[str]:
    """Name the fields that ask for what is not done, and that are ignored therefore.

    Args:
        body: What `lenient` returned.
        is_chat: It is a chat, not a text completion.
    """
    found = [name for name, differs in _TOLD.items() if name in body and differs(body[name])]
    if body.get("tools"):
        if body.get("parallel_tool_calls") is False:
            found.append("parallel_tool_calls")
    elif body.get("tool_choice") == "none":
        found.remove("tool_choice")
    if not is_chat and _is_count(body.get("logprobs")):
        found.append("logprobs")
    return sorted(found)


def served(body: Mapping[str, Any], *, is_chat: bool) -> dict[str, Any]:
    """A body that was checked, with what upstream's handler reads in another way put its way."""
    said = dict(body)
    if not is_chat and _is_count(said.get("logprobs")):
        del said["logprobs"]  # a count there, true or false here
    if read_caching(said).prewarm:
        said.pop("max_completion_tokens", None)
        said["max_tokens"] = 0
    if said.get("max_completion_tokens", said.get("max_tokens")) == -1:
        said.pop("max_completion_tokens", None)
        said["max_tokens"] = NO_LIMIT
    return said


def asked_of_cache(body: Mapping[str, Any], *, is_chat: bool) -> Asked:
    """What a body that was checked asks of the cache; its messages are as the prompt has them.

    Raises:
        RefusedError: That is malformed.
    """
    messages = body["messages"] if is_chat else []
    said = [{**one, "content": as_text(one.get("content"))} for one in messages]
    return Asked(
        model=str(body.get("model") or ""),
        messages=said,
        marks=marks_of_chat(messages),
        caching=read_caching(body),
    )


def one_head(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Messages whose leading system messages are one, for templates that take no second one.

    Returns:
        None when there is nothing to be put together, or not only text.
    """
    head = list(itertools.takewhile(lambda one: one.get("role") == "system", messages))
    texts = [_text(one.get("content")) for one in head]
    known = [text for text in texts if text is not None]
    if len(head) < 2 or len(known) < len(head):
        return None
    content: Any = "\n\n".join(text for text in known if text)
    if marks_of_chat(head):
        content = _joined_parts([one.get("content") for one in head])
    return [{**head[0], "content": content}, *map(dict, messages[len(head) :])]


def _joined_parts(contents: Sequence[Any]) -> list[dict[str, Any]]:
    """Texts of messages as the parts of one, which may be marked."""
    parts: list[dict[str, Any]] = []
    for content in contents:
        if text := _text(content):
            parts += [{"type": "text", "text": "\n\n"}] if parts else []
            parts += content if isinstance(content, list) else [{"type": "text", "text": text}]
    return parts


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> Any:
    return value.get("type") if isinstance(value, dict) else value


def as_text(content: Any) -> str:
    """A message's content as the template gets it; "" for what is more than text."""
    return _text(content) or ""


def _text(content: Any) -> str | None:
    """The text of a message's content; None for what is more than text."""
    if isinstance(content, list):
        known = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in known if isinstance(part.get("text"), str)]
        return "".join(texts) if len(texts) == len(content) else None
    return content or "" if content is None or isinstance(content, str) else None


def _present(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {name: one for name, one in value.items() if one is not None}


def _with_present(value: Any, inner: str) -> Any:
    """An object, and the one in its field `inner`, without what is null."""
    value = _present(value)
    if isinstance(value, dict) and inner in value:
        value[inner] = _present(value[inner])
    return value


def _message(message: Any) -> Any:
    message = _present(message)
    if not isinstance(message, dict):
        return message
    if isinstance(content := message.get("content"), list):
        message["content"] = [_present(part) for part in content]
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _call(call: Any) -> Any:
    """A call of a tool; one without arguments has none, which templates print as an object."""
    call = _with_present(call, "function")
    if isinstance(call, dict) and isinstance(function := call.get("function"), dict):
        function.setdefault("arguments", {})
    return call


def _without_developers(messages: list[Any]) -> list[Any]:
    """Make system messages of those of the role `developer`, which hardly a template knows.

    At the head they become one with their neighbours: many templates take one system message, and
    some drop a second one without a word.
    """
    developers = [_role(one) == "developer" for one in messages]
    if not any(developers):
        return messages
    head = 0
    while head < len(messages) and _role(messages[head]) in ("system", "developer"):
        head += 1
    messages = [
        {**one, "role": "system"} if is_one else one
        for one, is_one in zip(messages, developers, strict=True)
    ]
    if any(developers[:head]):
        return [*(one_head(messages[:head]) or messages[:head]), *messages[head:]]
    return messages


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None
