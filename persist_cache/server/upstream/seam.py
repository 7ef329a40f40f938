"""What is used of `mlx_lm.server`'s private parts, and what of that an mlx-lm has moved.

A test holds it against what is installed; with a version that is not known, `serve` does so itself.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from persist_cache.errors import PersistCacheError
from persist_cache.fingerprint.versions import unknown_mlx_lm

log = logging.getLogger(__name__)

SEAM = {
    "run": ("host", "port", "model_provider", "server_class", "handler_class"),
    "_run_http_server": ("host", "port", "response_generator", "server_class", "handler_class"),
    "ResponseGenerator._run_generate": ("self",),
    "ResponseGenerator._next_request": ("self", "timeout"),
    "ResponseGenerator._tokenize": ("self", "tokenizer", "request", "args"),
    "ResponseGenerator._serve_single": ("self", "request", "stream"),
    "ResponseGenerator._is_batchable": ("self", "args"),
    "ResponseGenerator.generation_available": ("self",),
    "ResponseGenerator.generate": (
        "self",
        "request",
        "generation_args",
        "progress_callback",
    ),
    "ResponseGenerator.stop_and_join": ("self",),
    "BatchGenerator.next": ("self",),
    "BatchGenerator.remove": ("self", "uids", "return_prompt_caches"),
    "TimeBudget.__iter__": ("self",),
    "TimeBudget.__next__": ("self",),
    "ModelProvider.reset": ("self",),
    "ModelProvider.load": ("self", "model_path", "adapter_path", "draft_model_path"),
    "ModelProvider.load_default": ("self",),
    "ModelProvider._load": ("self", "model_path", "adapter_path", "draft_model_path"),
    "APIHandler.handle_completion": ("self", "request", "stop_words"),
    "APIHandler._set_completion_headers": ("self", "status_code"),
    "APIHandler._set_stream_headers": ("self", "status_code"),
}
"""What of mlx_lm.server is replaced or called, with its parameters."""


def moved(module: Any) -> list[str]:
    """What of `SEAM` is gone from mlx-lm's server, or has other parameters; a sentence each."""
    found = []
    for path, known in SEAM.items():
        there: Any = module
        for part in path.split("."):
            there = inspect.getattr_static(there, part, None)
        if there is None:
            found.append(f"mlx_lm.server.{path} is gone")
            continue
        taken = tuple(inspect.signature(there).parameters)
        if taken != known:
            found.append(
                f"mlx_lm.server.{path} takes ({', '.join(taken)}) instead of ({', '.join(known)})"
            )
    return found


def check(module: Any) -> None:
    """Refuse a version of mlx-lm that is not known and that moved something; warn of others.

    Raises:
        PersistCacheError: Something was moved.
    """
    unknown = unknown_mlx_lm()
    if not unknown:
        return
    if changes := moved(module):
        raise PersistCacheError(f"{unknown}. It moved: {'; '.join(changes)}.")
    log.warning("%s; nothing that the server builds on has moved", unknown)
