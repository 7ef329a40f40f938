"""What `server.py` uses of mlx_lm.server is still there, with the parameters it knows.

`SEAM` names what it replaces or calls; an mlx-lm that moves one of them fails here first, with a
sentence, and not in the middle of an answer.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest
from mlx_lm import server as upstream

from persist_cache.server.streaming import Streaming
from persist_cache.server.ticket import TicketedCache
from persist_cache.server.upstream.batch import Batch
from persist_cache.server.upstream.generator import Generator
from persist_cache.server.upstream.handler import Handler
from persist_cache.server.upstream.prompts import Prompts
from persist_cache.server.upstream.provider import Provider
from persist_cache.server.upstream.seam import SEAM

CALLED_ON_HANDLER = ("do_GET", "do_POST", "do_OPTIONS", "_set_cors_headers", "handle_health_check")
"""Methods of upstream's handler that ours calls or replaces, all without arguments."""


def find(path: str) -> Any:
    """Upstream's object at a dotted path; fails the test when it is gone."""
    found: Any = upstream
    for part in path.split("."):
        found = inspect.getattr_static(found, part, None)
        if found is None:
            pytest.fail(
                f"mlx_lm.server.{path} is gone: persist_cache/server/upstream builds on it; "
                "see what took its place, then change SEAM."
            )
    return found


def parameters(path: str) -> tuple[str, ...]:
    return tuple(inspect.signature(find(path)).parameters)


@pytest.mark.parametrize("path", SEAM)
def test_seam_has_the_parameters_that_we_know(path: str) -> None:
    assert parameters(path) == SEAM[path], (
        f"mlx_lm.server.{path} has other parameters than persist_cache/server/upstream expects; "
        "adapt the override, then SEAM."
    )


@pytest.mark.parametrize("name", CALLED_ON_HANDLER)
def test_handler_methods_take_no_arguments(name: str) -> None:
    assert parameters(f"APIHandler.{name}") == ("self",)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Generator, upstream.ResponseGenerator),
        (Prompts, upstream.ResponseGenerator),
        (Batch, upstream.BatchGenerator),
        (Provider, upstream.ModelProvider),
        (Handler, upstream.APIHandler),
        (Streaming, upstream.APIHandler),
    ],
)
def test_our_overrides_take_what_theirs_take(ours: type, theirs: type) -> None:
    for name, method in vars(ours).items():
        inherited = inspect.getattr_static(theirs, name, None)
        if not inspect.isfunction(method) or not inspect.isfunction(inherited):
            continue
        if name.startswith("__"):
            continue
        taken = list(inspect.signature(method).parameters)
        assert taken == list(inspect.signature(inherited).parameters), (
            f"{theirs.__name__}.{name} changed its parameters upstream"
        )


def test_contexts_and_requests_have_the_fields_that_we_read() -> None:
    fields = {
        upstream.GenerationContext: {"prompt", "prompt_cache_count"},
        upstream.CompletionRequest: {
            "request_type",
            "prompt",
            "messages",
            "tools",
            "role_mapping",
        },
        upstream.GenerationArguments: {"chat_template_kwargs"},
    }
    for kind, wanted in fields.items():
        known = {one.name for one in dataclasses.fields(kind)}
        assert wanted <= known, f"mlx_lm.server.{kind.__name__} lost {wanted - known}"


def test_upstream_asks_nothing_of_its_cache_that_ours_does_not_answer() -> None:
    source = inspect.getsource(upstream.ResponseGenerator)
    asked = set(re.findall(r"self\.prompt_cache\.(\w+)", source))

    assert "fetch_nearest_cache" in asked
    assert asked <= {name for name in vars(TicketedCache) if not name.startswith("_")}


def test_upstream_calls_what_serve_replaces_by_its_global_name() -> None:
    # `serve` swaps these names; code that reached them otherwise would do without us.
    assert {"run", "ModelProvider"} <= set(upstream.main.__code__.co_names)
    loop = upstream.ResponseGenerator._generate.__code__.co_names
    assert {"BatchGenerator", "_time_budget"} <= set(loop)
