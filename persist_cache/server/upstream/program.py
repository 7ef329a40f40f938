"""The process: upstream's command line, its listening, and its place in a group."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from http.server import HTTPServer
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm import server as upstream

from persist_cache.prefill.clock import PrefillClock
from persist_cache.server.upstream.batch import Batch
from persist_cache.server.upstream.generator import Generator
from persist_cache.server.upstream.provider import Provider
from persist_cache.server.upstream.seam import check


def main(
    args: Sequence[str],
    run: Callable[..., None],
    parser: type[argparse.ArgumentParser],
    prefill_clock: PrefillClock,
) -> None:
    """Run upstream's `main`, which parses, sets up logging, and calls `run` by its global name.

    Args:
        args: Command line for upstream's parser.
        run: Called with host, port and model provider.
        parser: Class of the parser.
        prefill_clock: Times the prefill of batches.

    Raises:
        PersistCacheError: mlx-lm moved what this is built on.
    """
    check(upstream)
    with (
        _replaced(
            upstream,
            "argparse",
            SimpleNamespace(**{**vars(argparse), "ArgumentParser": parser}),
        ),
        _replaced(upstream, "run", run),
        _replaced(upstream, "ModelProvider", Provider),
        _replaced(upstream, "BatchGenerator", functools.partial(Batch, prefill_clock)),
        _replaced(sys, "argv", ["persist-cache serve", *args]),
    ):
        upstream.main()


def flags_parser(parser: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Upstream's own parser, as an object of the class `parser`; nothing is run."""

    class Made(Exception):
        """It is complete."""

    made: list[argparse.ArgumentParser] = []

    class Reading(parser):  # type: ignore[misc, valid-type]
        def parse_args(self, *_: Any, **__: Any) -> Any:
            made.append(self)
            raise Made

    with (
        _replaced(
            upstream, "argparse", SimpleNamespace(**{**vars(argparse), "ArgumentParser": Reading})
        ),
        contextlib.suppress(Made),
    ):
        upstream.main()
    return made[0]


def listen(host: str, port: int, generator: Generator, server: type[HTTPServer]) -> None:
    """Answer requests with `generator` until it is stopped.

    Raises:
        OSError: The port cannot be listened on.
    """
    # What answers requests is read while the generation thread loads the model.
    from persist_cache.server.upstream.handler import Handler

    upstream._run_http_server(host, port, generator, server_class=server, handler_class=Handler)


def place_in_group() -> tuple[int, int]:
    """This process's rank, and how many there are that share the model."""
    group = mx.distributed.init()
    return int(group.rank()), int(group.size())


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
