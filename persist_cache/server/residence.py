"""What a server has in memory, until when, and what it is computing: `persist-cache ps`."""

from __future__ import annotations

import os
import time
from typing import Any

from msgspec import Struct

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.server.names import public_name
from persist_cache.server.recent.records import About
from persist_cache.server.ticket import Ticket
from persist_cache.sharing.as_json import remote_json


class ResidentModelJson(Struct, frozen=True, kw_only=True):
    """The model of a server.

    Attributes:
        name: As `/v1/models` lists it.
        adapter: Folder of its adapter, or None.
        draft: Its draft model, or None.
        weights: `loaded`, `loading`, or `unloaded`: the next request loads it.
        nbytes: Of its weights in memory, those of the draft model included.
        loaded: When it was loaded, in UTC seconds, or None.
        unloads: When it goes if nobody asks, in UTC seconds; None when it stays.
    """

    name: str
    adapter: str | None
    draft: str | None
    weights: str
    nbytes: int
    loaded: float | None
    unloads: float | None


class InFlightJson(Struct, frozen=True, kw_only=True):
    """A request that is being answered.

    Attributes:
        id: Ours, as in `/v1/cache/requests`.
        path: That it was sent to.
        client: Its `User-Agent`.
        time: When it came, in UTC seconds.
        state: `waiting`, `prefilling`, or `answering`.
        num_tokens: Of its prompt; 0 before it is tokenized.
        cached_tokens: Of these, that were found.
        computed_tokens: Of these, that were found or computed so far.
        output_tokens: Of its answer so far.
    """

    id: str
    path: str
    client: str
    time: float
    state: str
    num_tokens: int
    cached_tokens: int
    computed_tokens: int
    output_tokens: int


class ResidenceJson(Struct, frozen=True, kw_only=True):
    """What a server has in memory.

    Attributes:
        pid: Of its process.
        model: Its model; None if it never loaded one.
        caches: Live caches.
        cache_bytes: Of these.
        tiers: Of these by tier: `{tier: {"n_sequences", "n_bytes"}}`.
        waiting_saves: Caches that wait for the disk, or are being written.
        warming: How far it is with the prompts of `--warm`; None without any.
        requests: Those that are being answered, the oldest first.
        remote: The state of its remote's breaker, or `off`; None without a remote.
    """

    pid: int
    model: ResidentModelJson | None
    caches: int
    cache_bytes: int
    tiers: dict[str, dict[str, int]]
    waiting_saves: int
    warming: dict[str, Any] | None
    requests: list[InFlightJson]
    remote: str | None = None


def residence(generator: Any, cache: PromptCache) -> ResidenceJson:
    """What the server of a `Generator` has in memory."""
    warming = getattr(generator, "warming", None)
    told = None if warming is None else warming.told()
    ring = getattr(generator, "recent", None)
    sharing = getattr(generator, "sharing", None)
    remote = None if sharing is None else remote_json(sharing.status(), sharing.trouble)
    return ResidenceJson(
        pid=os.getpid(),
        model=_model(generator),
        caches=len(cache),
        cache_bytes=cache.nbytes,
        tiers=cache.stats_by_type(),
        waiting_saves=cache.queued_jobs,
        warming=told if told and told["total"] else None,
        requests=[] if ring is None else [_in_flight(*one) for one in ring.underway()],
        remote=None if remote is None else remote.breaker,
    )


def status_line(generator: Any) -> str:
    """What a server is doing, for people who look at the service."""
    model = _model(generator)
    warming = generator.warming
    if model is None:
        said = "Ready, no model loaded"
    elif model.weights == "loading":
        said = f"Loading {model.name}"
    elif model.weights == "unloaded":
        said = f"Idle, {model.name} is unloaded"
    else:
        said = f"Ready, {model.name}"
    if warming is not None and warming.is_running:
        told = warming.told()
        said += f"; warming, {told['done']} of {told['total']} prompts done"
    return said


def _model(generator: Any) -> ResidentModelJson | None:
    provider = getattr(generator, "model_provider", None)
    key = getattr(provider, "known_key", None)
    own = getattr(getattr(provider, "cli_args", None), "model", None)
    weights = getattr(generator, "weights", "none")
    if key is None and own is not None and weights == "loading":
        key = (own, None, None)
    if provider is None or key is None:
        return None
    loaded = weights == "loaded"
    unloads = generator.unloads_at if loaded else None
    ahead = time.time() - time.monotonic()
    return ResidentModelJson(
        name=public_name(key[0]),
        adapter=key[1],
        draft=key[2],
        weights=weights,
        nbytes=getattr(provider, "nbytes", 0) if loaded else 0,
        loaded=provider.loaded_at + ahead if loaded else None,
        unloads=None if unloads is None else unloads + ahead,
    )


def _in_flight(about: About, ticket: Ticket) -> InFlightJson:
    found = 0 if ticket.fetch is None else ticket.fetch.num_tokens
    total = 0 if ticket.prompt is None else len(ticket.prompt.tokens)
    if ticket.output_tokens:
        state, computed = "answering", total
    elif ticket.fetch is not None:
        state, computed = "prefilling", max(found, ticket.computed[0])
    else:
        state, computed = "waiting", 0
    return InFlightJson(
        id=about.id,
        path=about.path,
        client=about.client,
        time=about.at,
        state=state,
        num_tokens=total,
        cached_tokens=found,
        computed_tokens=computed,
        output_tokens=ticket.output_tokens,
    )
