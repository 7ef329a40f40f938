"""Whatever a public signature mentions can be imported from `persist_cache` itself.

A caller can then annotate what it was given, and make what is asked of it, without knowing the
rooms behind the package.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import persist_cache

OF_THE_ROOMS = {
    "Store.__init__",
    "Store.read",
    "Store.dry_run",
    "Store.semaphores",
    "Store.catalog",
    "Store.open_blob",
    "Trail.ways",
}
"""For what builds on the store inside the package, and knows its index; programs use `open`."""
PUBLIC = {name: getattr(persist_cache, name) for name in persist_cache.__all__}


def callables(value: Any) -> Iterator[tuple[str, Any]]:
    """What of an exported class or function has a signature."""
    if not inspect.isclass(value):
        yield value.__name__, value
        return
    for owner in value.__mro__:
        if not owner.__module__.startswith("persist_cache"):
            continue
        yield owner.__name__, owner
        for name, member in vars(owner).items():
            if name.startswith("_") and name not in ("__init__", "__call__", "__enter__"):
                continue
            member = getattr(member, "fget", getattr(member, "__func__", member))
            if inspect.isfunction(member) and f"{owner.__name__}.{name}" not in OF_THE_ROOMS:
                yield f"{owner.__name__}.{name}", member


def hints(value: Any) -> dict[str, Any]:
    """The types of its attributes, or of its parameters and its result."""
    home: ModuleType = sys.modules[value.__module__]
    # Imports for type checkers alone are not there, but what is public has to be found anyway.
    namespace = {**PUBLIC, **vars(home)}
    found = typing.get_type_hints(value, globalns=namespace, localns=namespace)
    return {name: one for name, one in found.items() if not name.startswith("_")}


def classes(hint: Any) -> Iterator[type]:
    """All classes of ours in a type."""
    arguments = typing.get_args(hint)
    if isinstance(hint, list | tuple):
        arguments = tuple(hint)
    for one in arguments:
        yield from classes(one)
    if inspect.isclass(hint) and hint.__module__.startswith("persist_cache"):
        yield hint


@pytest.mark.parametrize("name", persist_cache.__all__)
def test_types_in_a_public_signature_are_public(name: str) -> None:
    missing = []
    for place, value in callables(PUBLIC[name]):
        try:
            found = hints(value)
        except NameError as error:
            missing.append(f"{place}: {error.name}")
            continue
        for argument, hint in found.items():
            for one in classes(hint):
                if PUBLIC.get(one.__name__) is not one:
                    missing.append(f"{place}({argument}): {one.__module__}.{one.__name__}")

    assert missing == []


def test_exceptions_are_there_and_needed() -> None:
    for place in OF_THE_ROOMS:
        owner, name = place.split(".")
        member = getattr(PUBLIC[owner], name)
        member = getattr(member, "fget", member)
        strange = [
            one
            for hint in hints(member).values()
            for one in classes(hint)
            if PUBLIC.get(one.__name__) is not one
        ]
        assert strange, place


def test_every_public_name_says_what_it_is() -> None:
    """By its own docstring: nobody should have to look for the module that it is from."""
    assert [name for name, value in PUBLIC.items() if not inspect.getdoc(value)] == []
