"""Requests from outside, checked before anything acts on them.

`mlx_lm.server` trusts much of a request: a stop word that is no text or a `top_k` beyond the
vocabulary ends its generation thread for good, and bad JSON is written to the log as it came,
prompt and all. What is refused here is refused in one sentence that repeats nothing of the body.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

MAX_NEW_TOKENS = 10_000_000
MAX_STOP_WORDS = 64
_PRIVATE = ("no_store", "store", "cache_salt")
"""Fields about what is kept of a request, and who may find it."""
_MAX_DIGITS = 18
_MAX_SAID = 200
_MAX_TOP_LOGPROBS = 11
_NUMBERS = (
    "frequency_context_size",
    "frequency_penalty",
    "min_p",
    "num_draft_tokens",
    "presence_context_size",
    "presence_penalty",
    "repetition_context_size",
    "repetition_penalty",
    "temperature",
    "top_p",
    "xtc_probability",
    "xtc_threshold",
)
_IMAGE_TYPES = frozenset({"image", "image_url", "input_image"})
_MAX_FILE_NAME = 255
"""Bytes of one part of a path: what common file systems take."""
_SAFE_VOCABULARY = 256
"""No model has fewer token ids; what a request may name before its model is loaded."""
_RESERVED_TEMPLATE_ARGS = frozenset(
    {
        "add_generation_prompt",
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Arguments of `apply_chat_template` that would change what it returns, not what it renders."""


class RefusedError(Exception):
    """A request that is not answered as asked; `str()` is one sentence for the client.

    Attributes:
        status: Of the answer.
        headers: To be sent with it.
        code: What OpenAI's API calls it, or "".
        param: The field of the body that is to blame, or "".
    """

    def __init__(
        self,
        status: int,
        sentence: str,
        headers: Mapping[str, str] | None = None,
        *,
        code: str = "",
        param: str = "",
    ):
        super().__init__(sentence)
        self.status = status
        self.headers = dict(headers or {})
        self.code = code
        self.param = param


def wrong(name: str, what: str) -> RefusedError:
    """The refusal of a field: its name, and what is wrong with it."""
    return RefusedError(400, f"{name} {what}", param=name)


def first_line(error: BaseException) -> str:
    """The first line of an error without its full stop, harmless in a terminal."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip().rstrip(".") if lines else ""
    text = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return text[:_MAX_SAID] or type(error).__name__


def decode_object(raw: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        RefusedError: It is something else, or holds what no prompt can hold.
    """
    found = decode_json(raw)
    if not isinstance(found, dict):
        raise RefusedError(400, "The body must be a JSON object.")
    return found


def decode_json(raw: bytes) -> Any:
    """Decode JSON of any kind.

    Raises:
        RefusedError: It is none, or holds what no prompt can hold.
    """
    try:
        text = raw.decode()
        found = json.loads(
            text,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_short_integer,
            object_pairs_hook=_said_once,
        )
        if "\\ud" in text.lower():
            # Half of a surrogate pair is valid JSON, but no text.
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeError:
        raise RefusedError(400, "The body is not valid UTF-8 text.") from None
    except RecursionError:
        raise RefusedError(400, "The body is nested too deeply.") from None
    except ValueError as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise RefusedError(400, f"The body is not valid JSON{where}.") from None
    return found


def _said_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which at most one value says what is to be kept; else the last one would."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        for name in _PRIVATE:
            if names.count(name) > 1:
                raise RefusedError(400, f"The body says {name!r} twice.")
    return found


def _no_number(text: str) -> Any:
    raise RefusedError(400, "The body holds a number that is not finite.")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _short_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise RefusedError(400, f"The body holds a number with more than {_MAX_DIGITS} digits.")
    return int(text)


def check_chat(body: dict[str, Any], *, vocabulary: int | None = None) -> None:
    """Check a chat request.

    Args:
        body: The request; `stream_options` is completed in place.
        vocabulary: Number of token ids of the model, if it is known.

    Raises:
        RefusedError: It would be misunderstood, or would end the generation thread.
    """
    _check_messages(body)
    _check_options(body, vocabulary)


def check_completion(body: dict[str, Any], *, vocabulary: int | None = None) -> None:
    """Check a text completion request; as `check_chat`."""
    _check_text(body)
    _check_options(body, vocabulary)


def check_prompt(body: Mapping[str, Any]) -> None:
    """Check what shapes the prompt of a chat or of a text completion request, and no more.

    Raises:
        RefusedError: It would be misunderstood.
    """
    if body.get("messages") is None and body.get("prompt") is not None:
        _check_text(body)
    else:
        _check_messages(body)


def check_names(body: Mapping[str, Any]) -> None:
    """Check what names the model of a request.

    Raises:
        RefusedError: No model can have such a name.
    """
    for name in ("model", "draft_model", "adapters"):
        _check_path(body.get(name), name)


def _check_text(body: Mapping[str, Any]) -> None:
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise wrong("prompt", "must be a text that is not empty.")


def _check_messages(body: Mapping[str, Any]) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "must be a list of at least one message.")
    for place, message in enumerate(messages):
        _check_message(message, f"messages[{place}]")
    _check_objects(body.get("tools"), "tools")
    mapping = body.get("role_mapping")
    if mapping is not None and not (
        isinstance(mapping, dict) and all(isinstance(one, str) for one in mapping.values())
    ):
        raise wrong("role_mapping", "must be an object of texts.")
    _check_template_args(body)


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise wrong(name, "must be an object with a role.")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise wrong(f"{name}.content", "must be a list of objects with a type.")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise wrong(f"{name}.content", "has a text part without a text.")
    elif content is not None and not isinstance(content, str):
        raise wrong(f"{name}.content", "must be a text or a list of parts.")
    calls = message.get("tool_calls")
    _check_objects(calls, f"{name}.tool_calls")
    for place, call in enumerate(calls or []):
        _check_function(call.get("function"), f"{name}.tool_calls[{place}].function")


def has_images(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether checked messages have an image."""
    return any(_IMAGE_TYPES & _types(message) for message in messages)


def _types(message: Mapping[str, Any]) -> set[str]:
    content = message.get("content")
    return {part["type"] for part in content} if isinstance(content, list) else set()


def refuse_parts(messages: Sequence[Mapping[str, Any]], *, why: str) -> None:
    """Refuse messages with anything but text.

    Args:
        messages: Checked ones.
        why: What is said of an image.

    Raises:
        RefusedError: There is such a part.
    """
    for place, message in enumerate(messages):
        types = _types(message)
        if types & _IMAGE_TYPES:
            raise wrong(f"messages[{place}].content", f"has an image; {why}.")
        if types - {"text"}:
            raise wrong(
                f"messages[{place}].content", "has a part that is neither text nor an image."
            )


def _check_function(function: Any, name: str) -> None:
    if not function:
        return
    if not isinstance(function, dict):
        raise wrong(name, "must be an object.")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        try:
            json.loads(arguments)
        except (ValueError, RecursionError):
            raise wrong(f"{name}.arguments", "must be valid JSON.") from None


def _check_objects(value: Any, name: str) -> None:
    if value is not None and not (
        isinstance(value, list) and all(isinstance(one, dict) for one in value)
    ):
        raise wrong(name, "must be a list of objects.")


def _check_options(body: dict[str, Any], vocabulary: int | None) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        _check_integer(body, name, -1, MAX_NEW_TOKENS)
    _check_integer(body, "seed", 0, 10**_MAX_DIGITS)
    _check_integer(body, "top_k", 0, (vocabulary or _SAFE_VOCABULARY) - 1)
    # Upstream takes true for 1, and its generation thread does not survive it.
    _check_integer(body, "top_logprobs", -1, _MAX_TOP_LOGPROBS)
    for name in _NUMBERS:
        if isinstance(body.get(name), bool):
            raise wrong(name, "must be a number.")
    for name in ("xtc_probability", "xtc_threshold"):
        if isinstance(body.get(name), int):
            body[name] = float(body[name])  # upstream takes no other kind of number
    threshold = body.get("xtc_threshold")
    if isinstance(threshold, (int, float)) and not 0 <= threshold <= 0.5:
        raise wrong("xtc_threshold", "must be between 0 and 0.5.")
    check_names(body)
    check_stop(body.get("stop"))
    _check_bias(body.get("logit_bias"), vocabulary)
    options = body.get("stream_options")
    if options is not None and not (
        isinstance(options, dict) and isinstance(options.setdefault("include_usage", False), bool)
    ):
        raise wrong("stream_options", "must be an object whose include_usage is true or false.")
    _check_template_args(body)


def _check_template_args(body: Mapping[str, Any]) -> None:
    arguments = body.get("chat_template_kwargs")
    if arguments is not None:
        check_template_args(arguments, "chat_template_kwargs")


def check_template_args(arguments: Any, name: str) -> None:
    """Check arguments of a chat template that were given as `name`.

    Raises:
        RefusedError: They would change what rendering returns.
    """
    if not isinstance(arguments, dict):
        raise wrong(name, "must be an object.")
    reserved = sorted(_RESERVED_TEMPLATE_ARGS & arguments.keys())
    if reserved:
        raise wrong(name, f"must not set {reserved[0]}.")


def _check_integer(body: dict[str, Any], name: str, low: int, high: int) -> None:
    value = body.get(name)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise wrong(name, f"must be a whole number from {low} to {high}.")


def _check_path(path: Any, name: str) -> None:
    """Refuse what is no text, and a name that no file can have: upstream repeats all of it."""
    if path is None:
        return
    parts = path.split("/") if isinstance(path, str) else []
    if not parts or any(len(part.encode(errors="replace")) > _MAX_FILE_NAME for part in parts):
        raise wrong(name, "must be a path or the name of a model.")


def check_stop(stop: Any) -> None:
    """Check stop words of a body.

    Raises:
        RefusedError: They are no texts, empty or too many.
    """
    words = [stop] if isinstance(stop, str) else stop
    if words is None or words == []:
        return
    if (
        not isinstance(words, list)
        or len(words) > MAX_STOP_WORDS
        or not all(isinstance(word, str) and word for word in words)
    ):
        raise wrong(
            "stop", f"must be a text, or a list of at most {MAX_STOP_WORDS}, none of them empty."
        )


def _check_bias(bias: Any, vocabulary: int | None) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict):
        raise wrong("logit_bias", "must be an object.")
    for token, value in bias.items():
        # MLX does not check indices: a token beyond the vocabulary writes beyond the buffer.
        known = token.isascii() and token.isdigit() and len(token) <= _MAX_DIGITS
        if not known or int(token) >= (vocabulary or _SAFE_VOCABULARY):
            raise wrong("logit_bias", "has a key that is no token id of this model.")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise wrong("logit_bias", "must have numbers as its values.")
