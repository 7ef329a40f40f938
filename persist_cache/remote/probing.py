"""Finding out what may be done with a remote, for people: can it be read, written, raced for."""

from __future__ import annotations

import asyncio
import secrets
import time

from persist_cache.remote.keys import probe_name
from persist_cache.remote.told import Probe
from persist_cache.remote.transport import Transport, TransportError

_RACERS = 8


def probe(transport: Transport, *, may_write: bool) -> Probe:
    """See `Remote.probe`.

    Args:
        transport: Of the remote.
        may_write: Entries may be published to it: try that as well.
    """
    name = probe_name(secrets.token_bytes(32))
    started = time.monotonic()
    try:
        transport.check_folder()
        transport.call(transport.read(name, 0))
    except TransportError as error:
        return Probe(False, 0.0, False, None, None, f"It cannot be read: {error}.")
    latency_s = time.monotonic() - started
    if not may_write:
        return Probe(True, latency_s, True, None, None, "")
    try:
        winners = transport.call(_race(transport, name))
    except TransportError as error:
        message = f"It can be read, but nothing can be created: {error}."
        return Probe(True, latency_s, True, False, None, message)
    message = ""
    if winners != 1:
        message = (
            f"Of {_RACERS} that created one object at once {winners} were told that they did: it "
            "ignores `If-None-Match`, so publishers would overwrite each other. Use another server."
        )
    return Probe(True, latency_s, True, True, winners == 1, message)


async def _race(transport: Transport, name: str) -> int:
    """How many of several succeed that create one name at once."""
    try:
        done = await asyncio.gather(
            *(transport.create(name, b"probe %d\n" % number) for number in range(_RACERS))
        )
    finally:
        await transport.remove(name)
    return sum(done)
