"""Tools of OpenAI's Responses as functions, which are all that templates and models know.

A custom tool, whose input is free text, is a function of one text. A tool in a namespace has the
namespace in its name. What the model calls is told back as what the client defined.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

from persist_cache.server.protocols.asked import joined
from persist_cache.server.protocols.fields import kind, object_of, text_of
from persist_cache.server.validation import wrong

TOOLS = "tools"
"""Names, among what is ignored, tools that this server does not have."""
_INPUT = "input"
_BETWEEN_NAMES = "__"


class Named(Struct, frozen=True):
    """What a client calls a tool.

    Attributes:
        name: Within its namespace.
        namespace: Or "".
        is_custom: Its input is free text.
    """

    name: str
    namespace: str = ""
    is_custom: bool = False

    @property
    def seen(self) -> str:
        """The name that the model sees."""
        if not self.namespace:
            return self.name
        between = "" if self.namespace.endswith(_BETWEEN_NAMES) else _BETWEEN_NAMES
        return f"{self.namespace}{between}{self.name}"


class Toolbox(Struct):
    """The tools of a request.

    Attributes:
        definitions: As functions of a chat, by the name that the model sees.
        named: What the client calls each.
        ignored: `TOOLS`, if some are left out.
    """

    definitions: dict[str, dict[str, Any]] = field(default_factory=dict)
    named: dict[str, Named] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)

    def add(self, tools: Any, name: str, *, again: bool = False) -> None:
        """Add a list of tools.

        Args:
            tools: Of a body.
            name: What the body calls it.
            again: Each may take the place of one with its name.

        Raises:
            RefusedError: It is malformed, or two tools have one name.
        """
        if tools is None:
            return
        if not isinstance(tools, list):
            raise wrong(name, "must be a list.")
        for place, tool in enumerate(tools):
            self._add(tool, f"{name}[{place}]", again=again)

    def _add(self, tool: Any, name: str, *, again: bool) -> None:
        if not isinstance(tool, dict):
            raise wrong(name, "must be an object.")
        match kind(tool, name):
            case "function" | "custom":
                self._define(tool, name, again=again)
            case "namespace":
                self._add_namespace(tool, name, again=again)
            case _:
                # Run on OpenAI's servers, or known to its models without a definition.
                self.ignored.add(TOOLS)

    def _add_namespace(self, tool: Mapping[str, Any], name: str, *, again: bool) -> None:
        namespace = _name_of(tool, name)
        about = _description_of(tool, name)
        inner = tool.get("tools")
        if not isinstance(inner, list):
            raise wrong(f"{name}.tools", "must be a list.")
        for place, one in enumerate(inner):
            at = f"{name}.tools[{place}]"
            if not isinstance(one, dict):
                raise wrong(at, "must be an object.")
            if kind(one, at) not in ("function", "custom"):
                raise wrong(f"{at}.type", "must be function or custom.")
            # Templates print tools one after the other, so it stands in front of all.
            self._define(one, at, namespace, about if place == 0 else "", again=again)

    def _define(
        self,
        tool: Mapping[str, Any],
        name: str,
        namespace: str = "",
        about: str = "",
        *,
        again: bool,
    ) -> None:
        is_custom = tool["type"] == "custom"
        named = Named(_name_of(tool, name), namespace, is_custom)
        if named.seen in self.definitions and not again:
            raise wrong(f"{name}.name", "is the name of another tool, too.")
        if is_custom:
            parameters = _free_text(object_of(tool, "format", name), f"{name}.format")
        else:
            parameters = dict(object_of(tool, "parameters", name))
            parameters = parameters or {"type": "object", "properties": {}}
        description = joined(about, _description_of(tool, name))
        function = {"name": named.seen, "description": description, "parameters": parameters}
        self.definitions[named.seen] = {"type": "function", "function": function}
        self.named[named.seen] = named

    def known(self, seen: str) -> Named:
        """What the client calls a tool that the model calls so."""
        return self.named.get(seen) or Named(seen)

    def has(self, name: str, namespace: str = "") -> bool:
        """Whether there is a tool of that name; of whatever namespace, if none is said."""
        if namespace:
            return Named(name, namespace).seen in self.definitions
        return name in self.definitions or any(one.name == name for one in self.named.values())


def arguments_of(text: str) -> dict[str, Any]:
    """The input of a custom tool, as arguments of the function that the model knows."""
    return {_INPUT: text}


def free_text(arguments: Mapping[str, Any]) -> str:
    """The input of a custom tool that the model called; all it wrote, if it wrote no input."""
    found = arguments.get(_INPUT)
    return found if isinstance(found, str) else json.dumps(arguments, ensure_ascii=False)


def _free_text(form: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Parameters of a function that takes a text, whose form the description tells."""
    about: dict[str, Any] = {"type": "string"}
    if form.get("type") == "grammar":
        syntax, definition = (text_of(form, member, name) for member in ("syntax", "definition"))
        about["description"] = f"A text of this grammar ({syntax}):\n{definition}"
    return {"type": "object", "properties": {_INPUT: about}, "required": [_INPUT]}


def _name_of(tool: Mapping[str, Any], name: str) -> str:
    found = text_of(tool, "name", name)
    if not found:
        raise wrong(f"{name}.name", "must not be empty.")
    return found


def _description_of(tool: Mapping[str, Any], name: str) -> str:
    found = tool.get("description")
    return "" if found is None else text_of(tool, "description", name)
