"""The admin API's prompts: explain one, or have the server's model compute it ahead of time."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.entry import Entry
from persist_cache.fingerprint.value import Fingerprint, salt_digest
from persist_cache.queries.as_json import explanation_json
from persist_cache.queries.explain import explain, with_memory
from persist_cache.queries.schema import BroughtJson, ExplanationJson, WarmJson
from persist_cache.server.admin_changes import checked_label, checked_ttl
from persist_cache.server.answers import Response, json_response
from persist_cache.server.guard import Request
from persist_cache.server.model import Models
from persist_cache.server.names import DEFAULT
from persist_cache.server.parameters import choice, query_of
from persist_cache.server.privacy import wants_no_store
from persist_cache.server.protocols.caching import (
    GROUP,
    OPTIONS,
    SALT,
    checked_group,
    no_store_of,
    read_caching,
    salt_of,
)
from persist_cache.server.protocols.openai import lenient
from persist_cache.server.protocols.recognized import (
    CHAT,
    MESSAGES,
    PROTOCOLS,
    RESPONSES,
    protocol_at,
    protocol_of,
)
from persist_cache.server.rendering import head_of, read_request, system_only
from persist_cache.server.stabilizing import chosen_by
from persist_cache.server.ticket import Part
from persist_cache.server.validation import RefusedError, check_names, check_prompt, decode_object
from persist_cache.server.view import Views
from persist_cache.store.store import Store

_SETTLE_S = 30.0
_SHAPING = {
    CHAT: (
        *("model", "draft_model", "adapters", "messages", "prompt", "tools", "role_mapping"),
        "chat_template_kwargs",
    ),
    MESSAGES: (
        *("model", "system", "messages", "tools", "thinking", "output_config", "cache_control"),
    ),
    RESPONSES: ("model", "instructions", "input", "tools", "reasoning"),
}
"""What of a body chooses the model and shapes the prompt, by its protocol."""


class Marks(msgspec.Struct, forbid_unknown_fields=True):
    """What a request to warm may say about the entry: its member `cache`."""

    pin: bool = False
    label: str = ""
    ttl_s: float | None = None
    group: str = ""

    @classmethod
    def of(cls, value: Any) -> Marks:
        try:
            marks = msgspec.convert(value if value is not None else {}, cls)
        except msgspec.ValidationError:
            raise RefusedError(
                400,
                "cache must be an object with pin (true or false), label (text), ttl_s "
                "(seconds), group (text).",
            ) from None
        checked_label(marks.label)
        if marks.ttl_s is not None:
            checked_ttl(marks.ttl_s)
        checked_group(marks.group, "cache.group")
        return marks

    def apply(self, store: Store, entry: str) -> None:
        if self.pin:
            store.pin(entry)
        if self.label:
            store.set_label(entry, self.label)
        if self.ttl_s is not None:
            store.expire_at(entry, store.clock() + self.ttl_s)
        if self.group:
            store.set_group(entry, self.group)


_NOT_SHOWN = "(not shown: --no-text)"

Ask = Callable[[dict[str, Any], Part, str], tuple[int, dict[str, Any]]]
"""Answers a request of a protocol as if it had come from outside, and keeps that part: status and
answer."""


def _without_texts(said: ExplanationJson) -> ExplanationJson:
    """An explanation that quotes nothing of what is stored."""
    parting = said.divergence
    if parting is None:
        return said
    hidden = msgspec.structs.replace(
        parting, before_text=_NOT_SHOWN, stored_text=_NOT_SHOWN, stored_tokens=()
    )
    return msgspec.structs.replace(said, divergence=hidden)


def _read(request: Request) -> tuple[dict[str, Any], str]:
    """The body of a request, and the protocol that it is of."""
    body = decode_object(request.body)
    said = choice(query_of(request, {"protocol"}), "protocol", PROTOCOLS)
    protocol = said or protocol_of(body)
    return (lenient(body) if protocol == CHAT else body), protocol


def _said(answer: Mapping[str, Any]) -> str:
    """The sentence of an answer that refuses, whatever its protocol."""
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or "The model refused this prompt.")


def _cached_tokens(usage: Mapping[str, Any]) -> int:
    """What the usage of an answer says of the cache, whatever its protocol."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return int(usage.get("cache_read_input_tokens", details.get("cached_tokens", 0)))


class Prompts:
    """Answers that need the model. Thread safety: may be asked by many threads at once."""

    def __init__(
        self,
        cache: PromptCache,
        views: Views,
        models: Models,
        *,
        texts: bool = True,
        remote_said: Callable[[Sequence[int]], BroughtJson | None] = lambda tokens: None,
    ) -> None:
        self._cache = cache
        self._remote_said = remote_said
        self._texts = texts
        self._views = views
        self._models = models

    def explain(self, request: Request) -> Response:
        body, protocol = _read(request)
        if protocol == CHAT:
            check_prompt(body)
        check_names(body)
        store = self._views.store()
        model = self._models.loaded(body, any_name=protocol != CHAT)
        salt = salt_digest(salt_of(body))
        fingerprint = model.identity_for(salt)
        if fingerprint is None:
            raise RefusedError(409, f"The model cannot be identified: {model.why}")
        prompt = model.render(body, protocol, stabilize=self._chosen(request))
        found = explain(store, fingerprint, prompt.tokens, system_tokens=prompt.system_tokens)
        now, in_memory = self._cache.outlook(model.key, prompt.tokens, salt=salt)
        found = with_memory(found, now_tokens=now, memory_tokens=in_memory)
        known = self._cache.known_tokens(model.key, prompt.tokens[:-1], salt=salt)
        said = explanation_json(
            found,
            model.decode,
            known_tokens=known,
            repaired=prompt.repaired,
            ignored=prompt.ignored,
            marks=prompt.marks,
        )
        if not salt and (shown := self._remote_said(prompt.tokens)) is not None:
            said = replace(said, remote=shown)
        return json_response(said if self._texts else _without_texts(said))

    def warm_again(self, request: Request, path: str, raw: bytes, ask: Ask | None) -> Response:
        """Warm the prompt of a request that was answered, or its system part alone.

        Args:
            request: With what is to be said about the entry: `cache`, and `part`.
            path: That the earlier one was sent to.
            raw: The body of that.
            ask: Runs a request.
        """
        query_of(request, set())
        said = decode_object(request.body) if request.body else {}
        if not said.keys() <= {"cache", "part"}:
            raise RefusedError(400, "The body may have cache and part, and nothing else.")
        part = said.get("part", "prompt")
        if part not in ("prompt", "system"):
            raise RefusedError(400, "part must be prompt or system.")
        body = decode_object(raw)
        protocol = protocol_at(path) or protocol_of(body)
        if part == "system":
            body = head_of(body, protocol)
        body["cache"] = said.get("cache")
        body.pop("stream", None)
        again = replace(
            request,
            target=f"{request.path}?protocol={protocol}",
            body=json.dumps(body).encode(),
        )
        return self.warm(again, ask)

    def warm(self, request: Request, ask: Ask | None) -> Response:
        body, protocol = _read(request)
        marks = Marks.of(body.pop("cache", None))
        chosen = self._chosen(request)
        whole = not system_only(read_request(body, protocol, stabilize=chosen))
        check_names(body)
        if ask is None:
            raise RefusedError(409, "This server cannot run a model.")
        # How an answer would be sampled, and how long it would be, does not matter here.
        shaping = _SHAPING[protocol]
        asked, salt = read_caching(body), salt_digest(salt_of(body))
        if no_store_of(body, respects_store=False) or wants_no_store(request.headers):
            raise RefusedError(400, "Nothing of a prompt is kept that is sent with no-store.")
        body = {name: body[name] for name in shaping if body.get(name) is not None}
        if group := marks.group or asked.group:
            body[GROUP] = group
        if asked.salt:
            body[SALT] = asked.salt
        if asked.ttl_s:
            body[OPTIONS] = {"ttl": f"{asked.ttl_s}s"}
        if protocol == MESSAGES:
            body.setdefault("model", DEFAULT)  # which it must have
        if not whole:
            # Only what precedes the user message is wanted; nobody else says the same.
            message = {"role": "user", "content": secrets.token_hex(8)}
            of = "input" if protocol == RESPONSES else "messages"
            body[of] = [*(body.get(of) or ()), message]
        before = self._cache.stats()
        started = time.monotonic()
        keeps: Part = "prompt" if whole else "system"
        limit = "max_output_tokens" if protocol == RESPONSES else "max_tokens"
        status, answer = ask({**body, "stream": False, limit: 1}, keeps, protocol)
        if status != 200:
            raise RefusedError(status, _said(answer))
        spent = time.monotonic() - started
        cached = _cached_tokens(answer.get("usage", {}))
        model = self._models.loaded(body, any_name=protocol != CHAT)
        prompt = model.render(body, protocol, stabilize=chosen)
        # A request computes its last token itself.
        wanted = prompt.tokens[:-1] if whole else prompt.tokens[: prompt.system_tokens]
        if not wanted:
            raise RefusedError(
                409,
                "This model's chat template puts nothing before the user message; "
                "there is no system part to store.",
            )
        entry = self._settle(model.identity_for(salt), wanted)
        if entry is not None:
            marks.apply(self._views.store(), entry.id)
        known = self._cache.known_tokens(model.key, wanted, salt=salt)
        after = self._cache.stats()
        return json_response(
            WarmJson(
                id=None if entry is None else entry.id,
                model=str(model.key[0]),
                label=marks.label,
                tier=("user" if whole else "system") if entry is None else entry.tier.label,
                num_tokens=len(wanted),
                found_tokens=min(cached, len(wanted)),
                missing_tokens=max(0, len(wanted) - known),
                written_bytes=after.written_bytes - before.written_bytes,
                prefill_s=spent,
                disk_off=after.disk_off,
            )
        )

    def _chosen(self, request: Request) -> frozenset[str]:
        """Names of the repairs that may be done to the prompt of a request."""
        return chosen_by(request.headers, self._models.generator)

    def _settle(self, fingerprint: Fingerprint | None, wanted: list[int]) -> Entry | None:
        """Wait until `wanted` is on disk; None when it does not get there."""
        store = self._cache.store
        if store is None or fingerprint is None:
            return None
        deadline = time.monotonic() + _SETTLE_S
        while True:
            match = store.match(fingerprint, wanted)
            if match.num_tokens == len(wanted) and match.entries:
                return store.get(match.entries[-1])
            self._cache.flush(_SETTLE_S)
            if time.monotonic() > deadline or self._cache.disk_off:
                return None
            time.sleep(0.05)
