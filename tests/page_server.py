"""The page over a store and requests in this process, with no model behind it: starts at once."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.cache.stats import Fetch
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.remote import RemoteStatus
from persist_cache.server.admin import Admin
from persist_cache.server.answers import json_response
from persist_cache.server.http import Front
from persist_cache.server.listening import NamelessServer
from persist_cache.server.recent.ring import Ring
from persist_cache.server.ticket import CutPrompt, Ticket
from persist_cache.server.validation import RefusedError
from persist_cache.store.store import Store
from tests.bulk_store import Prompt, fill

TOKEN = "t0ken-of_this-test"
MODEL = Fingerprint.from_fields({"weights": "w0"}, {"name": "org/A-Model-4bit"})
KEY = ("org/A-Model-4bit", None, None)


class Nothing(BaseHTTPRequestHandler):
    """Stands for upstream's handler, and has none of its answers."""

    response_generator: Any
    _send: Any

    def do_GET(self) -> None:
        raise RefusedError(404, "There is nothing here.")

    def do_OPTIONS(self) -> None:
        raise RefusedError(404, "There is nothing here.")

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Pages(Front, Nothing):
    """The front alone, without mlx_lm.server behind it, so that it starts at once."""

    def __init__(self, generator: Any, *args: Any) -> None:
        self.response_generator = generator
        super().__init__(*args)

    def handle_health_check(self) -> None:
        self._send(json_response(self.response_generator.health))


class PageServer:
    """A page over a store in this process.

    Attributes:
        url: Where it answers.
        store: What it shows, if there is one.
        ring: The requests that it shows.
        health: What `/health` answers.
    """

    def __init__(
        self,
        store: Store | None,
        token: str = TOKEN,
        *,
        texts: bool = True,
        decode: Any = lambda model, tokens: "",
        disk_off: str = "",
    ) -> None:
        self.store: Any = store
        self._decode = decode
        self.ring = self._new_ring()
        cache = self._cache = PromptCache(store=store, disk_off=disk_off)
        provider = SimpleNamespace(model_key=None, tokenizer=None, identifier=lambda key: MODEL)
        generator = SimpleNamespace(
            recent=self.ring,
            model_provider=provider,
            is_healthy=True,
            stabilize=frozenset({"billing"}),
            cli_args=SimpleNamespace(model=None, host="127.0.0.1"),
            cache=cache,
            health={"status": "ok", "model": "ok", "disk": "ok"},
            sharing=None,
        )
        self._generator = generator
        generator.admin = Admin(cache, token=token, generator=generator, texts=texts)
        self.health = generator.health
        self.admin = generator.admin
        self._http = NamelessServer(("127.0.0.1", 0), partial(Pages, generator))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def _new_ring(self) -> Ring:
        return Ring(decode=self._decode, seconds=lambda model, tokens: tokens * 1e-3)

    def shares(self, remote: RemoteStatus | None, trouble: str = "") -> None:
        """Have a remote in this state."""
        self._generator.sharing = SimpleNamespace(status=lambda: remote, trouble=trouble)

    def start_again(self) -> None:
        """Remember no request any more, as a server that is started again at the same place."""
        self.ring.close()
        self.ring = self._generator.recent = self._new_ring()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self.ring.close()
        self._cache.close()


@contextlib.contextmanager
def serving(
    folder: Path, prompts: list[Prompt], token: str = TOKEN, **options: Any
) -> Iterator[PageServer]:
    """A page over a store with `prompts`."""
    with Store.open(folder / "store", max_bytes=1 << 30, min_free_bytes=0) as store:
        fill(store, iter(prompts))
        server = PageServer(store, token, **options)
        yield server
        server.stop()


def relabelled(prompts: list[Prompt], label: str) -> list[Prompt]:
    """The same prompts, the first of them with a label."""
    made: dict[int, Prompt] = {}
    for place, prompt in enumerate(prompts):
        before = None if prompt.before is None else made[id(prompt.before)]
        made[id(prompt)] = replace(prompt, before=before, label=label if place == 0 else "")
    return list(made.values())


def remember(
    ring: Ring,
    tokens: Sequence[int],
    found: int = 0,
    *,
    source: str = "memory",
    body: bytes = b"",
    client: str = "ada/1.0",
    first_s: float | None = 0.5,
    state: Any = "done",
    repaired: Sequence[str] = (),
    reason: str = "",
    path: str = "/v1/chat/completions",
) -> str:
    """Have a request remembered that was answered just so; returns its id."""
    made = Ticket(body)
    made.times.arrived = time.monotonic() - (first_s or 0.0) - 0.2
    made.tokenized(CutPrompt(None, (), tokens, (), (), ""))
    made.model_key = KEY
    made.changes = frozenset(repaired)
    made.looked(Fetch(source if found else "miss", found, reason, seconds=0.01))
    made.times.looked = made.times.arrived + 0.05
    made.times.first_token = None if first_s is None else made.times.arrived + first_s
    made.output_tokens = 12
    id = ring.begin(made, response_id=f"r-{random.random()}", path=path, client=client)
    ring.end(id, state)
    assert ring.settle()
    return id


def many(ring: Ring, number: int, seed: int = 0) -> None:
    """Have so many requests remembered, of a few conversations."""
    drawn = random.Random(seed)
    talks = [[drawn.randrange(1 << 17) for _ in range(drawn.randrange(40, 400))] for _ in range(9)]
    clients = ["claude-cli/2.1", "opencode/0.9", "codex_cli/0.40", "curl/8.5"]
    for _ in range(number):
        place = drawn.randrange(len(talks))
        before = len(talks[place])
        talks[place] = talks[place][:3000] + [
            drawn.randrange(1 << 17) for _ in range(drawn.randrange(4, 120))
        ]
        remember(
            ring,
            talks[place],
            min(before, len(talks[place]) - 1) if drawn.random() < 0.85 else 0,
            source=drawn.choice(["memory", "memory", "disk"]),
            client=clients[place % len(clients)],
            first_s=drawn.random() ** 3 * 4,
            state=drawn.choice(["done"] * 30 + ["failed", "left"]),
            repaired=["billing"] if drawn.random() < 0.1 else (),
        )
