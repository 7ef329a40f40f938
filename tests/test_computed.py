"""Header, usage, counters and `explain` say what the model's calls show, for requests of all kinds.

Random conversations go through servers of each kind; after each step, what was computed is held
against what was said. `scripts/test -m long` sends 200 more of them.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from persist_cache import Store
from tests.cli import runner
from tests.computed import CountedServer, Told, accounts_for, prompt_of, told
from tests.tiny_models import build_model_dir
from tests.waiting import until

REQUESTS = sorted((Path(__file__).parent / "requests").glob("*.json"))
WITH_IMAGES = {"llm-07.json"}
SYSTEMS = [
    f"You are assistant number {number}. Answer the question of the user in a short sentence. " * 5
    for number in range(3)
]
TOPICS = ["bread", "trains", "rain", "old cities", "dragons", "the seasons", "stars", "rivers"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "Tells the time of the day in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
KV_BITS = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0")
SLIDING: dict[str, Any] = {
    "model_type": "gemma3_text",
    "sliding_window": 64,
    "sliding_window_pattern": 2,
}
KINDS = ["plain", "kv_bits", "draft", "sliding"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "plain": build_model_dir(folder / "plain"),
        "draft": build_model_dir(folder / "draft", seed=1),
        "sliding": build_model_dir(folder / "sliding", **SLIDING),
        # The recorded requests are long: few tokens, and little to do for each.
        "small": build_model_dir(
            folder / "small",
            vocab_size=4096,
            corpus=[file.read_text() for file in REQUESTS],
            num_hidden_layers=1,
            num_attention_heads=1,
        ),
    }


class Auditor:
    """Sends requests to a server and holds all that is said of them against what was computed."""

    def __init__(
        self, models: dict[str, Path], kind: str, folder: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self.kind = kind
        self.store = folder / "store"
        self._run = runner(self.store, capfd)
        self.model = models[kind if kind in ("sliding", "small") else "plain"]
        self.tokenizer = load_tokenizer(self.model)
        self.flags: tuple[str, ...] = ("--prompt-cache-size", "6")
        if kind == "kv_bits":
            self.flags += KV_BITS
        if kind == "draft":
            self.flags += ("--draft-model", str(models["draft"]))
        self._folder = folder / "logs"
        self.sent: list[Told] = []
        self.start()

    def start(self) -> None:
        self.server = CountedServer(
            self.model, self.store, self._folder, min_free_bytes=0, flags=self.flags
        )
        self.server.start()
        until(lambda: self.server.get("/v1/cache/stats")["model"] is not None, "no model is loaded")
        self._before = self._counters()

    def send(self, *bodies: dict[str, Any]) -> list[Told]:
        """Send requests, all at once, and check what is said of them."""
        prompts = [prompt_of(self.tokenizer, body) for body in bodies]
        with ThreadPoolExecutor(len(bodies)) as clients:
            answers = list(clients.map(self.post, bodies))
        said = [told(answer) for answer in answers]
        self.sent += said

        for one, prompt in zip(said, prompts, strict=True):
            assert one.prompt_tokens == len(prompt)
            assert one.num_tokens == one.cached_tokens < len(prompt)
            assert (one.source == "miss") == (one.num_tokens == 0)
            assert bool(one.reason) == (one.num_tokens < len(prompt) - 1)
        computed = self.server.prefilled()
        wanted = [prompt[one.num_tokens : -1] for one, prompt in zip(said, prompts, strict=True)]
        assert sum(map(len, computed)) == sum(map(len, wanted)), said
        assert accounts_for(computed, wanted), "other tokens were computed than those not cached"
        self._check_counters(said)
        return said

    def post(self, body: dict[str, Any]) -> Any:
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        return self.server.request("POST", path, json=body, timeout=300)

    def _counters(self) -> dict[str, int]:
        """What was counted since the start of the process."""
        server = self.server.get("/v1/cache/stats")["server"]
        metrics = self.server.request("GET", "/metrics").text
        counted = {
            "hits": sum(server["hits"].values()),
            "misses": server["misses"],
            "partial": sum(server["partial_reasons"].values()),
            "reused": sum(server["tokens_saved"].values()),
            "asked": server["tokens_asked"],
        }
        names = {
            "hits": "hits_total",
            "misses": "misses_total",
            "partial": "partial_hits_total",
            "reused": "tokens_saved_total",
            "asked": "tokens_asked_total",
        }
        for what, name in names.items():
            lines = [
                line for line in metrics.splitlines() if line.startswith(f"persist_cache_{name}")
            ]
            assert sum(float(line.split()[-1]) for line in lines) == counted[what], name
        return counted

    def _check_counters(self, said: Sequence[Told]) -> None:
        after = self._counters()
        grown = {what: count - self._before[what] for what, count in after.items()}
        self._before = after
        assert grown == expected_counts(said)

    def explained(self, body: dict[str, Any]) -> int:
        """Cached tokens of a chat request, as the running server would explain it."""
        # What leaves memory is nowhere until it is written; there is nothing to explain then.
        assert self.server.request("POST", "/v1/cache/flush").status_code == 200
        answer = self.server.request("POST", "/v1/cache/explain", json=body)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["now_tokens"])

    def explained_by_command(self, body: dict[str, Any]) -> int | None:
        """Cached tokens of a chat request, as the command says that sees the disk only.

        None when it cannot say: it is given no identity of a draft model.
        """
        if self.kind == "draft":
            return None
        file = self._folder / "request.json"
        file.write_text(json.dumps(body))
        flags = KV_BITS if self.kind == "kv_bits" else ()
        done = self._run("explain", "--model", self.model, "--messages", file, "--json", *flags)
        assert done.status == 0, done.err
        return int(done.json["cached_tokens"])

    def restart(self, body: dict[str, Any]) -> None:
        """Restart the server and send a chat request, of which the command knows beforehand."""
        assert self.server.stop() == 0
        by_command = self.explained_by_command(body)
        self.start()
        by_server = self.explained(body)
        (said,) = self.send(body)
        assert said.num_tokens == by_server
        assert said.source in ("disk", "miss")
        if by_command is not None:
            assert said.num_tokens == by_command

    def close(self) -> None:
        """Stop the server, and check what the store counted over all of its lives."""
        assert self.server.stop() == 0
        with Store.open(self.store, read_only=True) as store:
            counters = store.stats().counters
        counted = {
            "hits": counters.get("hits_memory", 0) + counters.get("hits_disk", 0),
            "misses": counters.get("misses", 0),
            "partial": sum(
                count for name, count in counters.items() if name.startswith("partial:")
            ),
            "reused": counters.get("tokens_reused", 0),
            "asked": counters.get("tokens_asked", 0),
        }
        assert counted == expected_counts(self.sent)
        assert counters.get("tokens_saved", 0) == counted["reused"]


def expected_counts(said: Sequence[Told]) -> dict[str, int]:
    hits = [one for one in said if one.source != "miss"]
    return {
        "hits": len(hits),
        "misses": len(said) - len(hits),
        "partial": sum(bool(one.reason) for one in hits),
        "reused": sum(one.num_tokens for one in said),
        "asked": sum(one.prompt_tokens for one in said),
    }


class Clients:
    """Random conversations, and what their clients send next."""

    def __init__(self, rng: random.Random, *, one_at_a_time: bool) -> None:
        self._rng = rng
        self._one_at_a_time = one_at_a_time
        self._chats: list[dict[str, Any]] = []
        self._texts: list[str] = []
        self._last: dict[str, Any] | None = None

    def next(self) -> list[dict[str, Any]]:
        """One request, or several for the same time."""
        if not self._one_at_a_time and self._rng.random() < 0.2:
            if self._rng.random() < 0.3:
                return [self._options(self.chat()) for _ in range(1)] * 2
            return [self._options(self._any()) for _ in range(self._rng.randint(2, 4))]
        return [self._options(self._any())]

    def chat(self) -> dict[str, Any]:
        """A chat request: a new one, the next turn, an edited one, a tool's result."""
        what = self._rng.choice(["new", "next", "next", "edit", "tool", "same"])
        if what == "new" or not self._chats:
            body: dict[str, Any] = {"messages": []}
            if self._rng.random() < 0.8:
                body["messages"].append({"role": "system", "content": self._rng.choice(SYSTEMS)})
            if self._rng.random() < 0.4:
                body["tools"] = TOOLS
            body["messages"].append(self._question())
            self._chats.append(body)
            return copy.deepcopy(body)
        body = self._rng.choice(self._chats)
        messages = body["messages"]
        if what == "next":
            messages.append({"role": "assistant", "content": self._rng.choice(TOPICS)})
            messages.append(self._question())
        elif what == "edit":
            last = max(i for i, one in enumerate(messages) if one["role"] == "user")
            messages[last:] = [self._question()]
        elif what == "tool":
            body["tools"] = TOOLS
            city = self._rng.choice(["Rome", "Paris"])
            call = {
                "id": "1",
                "type": "function",
                "function": {"name": "clock", "arguments": json.dumps({"city": city})},
            }
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": "1", "content": "It is half past."})
        return copy.deepcopy(body)

    def _question(self) -> dict[str, Any]:
        text = f"Tell me a story about {self._rng.choice(TOPICS)} and {self._rng.choice(TOPICS)}."
        if self._rng.random() < 0.3:
            return {"role": "user", "content": [{"type": "text", "text": text}]}
        return {"role": "user", "content": text}

    def _completion(self) -> dict[str, Any]:
        if self._texts and self._rng.random() < 0.6:
            text = self._rng.choice(self._texts)
            if self._rng.random() < 0.6:
                text += f" Then came {self._rng.choice(TOPICS)}."
        else:
            text = f"Once upon a time there were {self._rng.choice(TOPICS)} above the village. " * 3
        self._texts.append(text)
        return {"prompt": text}

    def _any(self) -> dict[str, Any]:
        if self._last is not None and self._rng.random() < 0.1:
            return copy.deepcopy(self._last)
        self._last = self._completion() if self._rng.random() < 0.2 else self.chat()
        return copy.deepcopy(self._last)

    def _options(self, body: dict[str, Any]) -> dict[str, Any]:
        body["max_tokens"] = self._rng.choice([1, 3, 6])
        body["temperature"] = 0
        if self._rng.random() < 0.4:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self._rng.random() < 0.3:
            body["seed"] = self._rng.randrange(10)
        return body


def converse(auditor: Auditor, seed: int, count: int) -> None:
    """Send `count` random requests, with a restart or two among them."""
    rng = random.Random(seed)
    clients = Clients(rng, one_at_a_time=auditor.kind in ("kv_bits", "draft"))
    restarts = {count // 2, count * 3 // 4}
    while len(auditor.sent) < count:
        if restarts and len(auditor.sent) >= min(restarts):
            restarts.remove(min(restarts))
            auditor.restart(clients.chat() | {"max_tokens": 2})
            continue
        bodies = clients.next()
        known = None
        if len(bodies) == 1 and "messages" in bodies[0] and rng.random() < 0.5:
            known = auditor.explained(bodies[0])
        said = auditor.send(*bodies)
        if known is not None:
            assert said[0].num_tokens == known, "explained otherwise than served"
    auditor.close()


def audited(auditor: Auditor, *, seed: int, count: int) -> list[Told]:
    try:
        converse(auditor, seed, count)
    finally:
        auditor.server.kill()
    return auditor.sent


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_of_a_request_is_what_the_model_computed(
    models: dict[str, Path], kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sent = audited(Auditor(models, kind, tmp_path, capfd), seed=1, count=12)

    assert {one.source for one in sent} == {"miss", "memory", "disk"}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_of_many_requests_is_what_the_model_computed(
    models: dict[str, Path], kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sent = audited(Auditor(models, kind, tmp_path, capfd), seed=2, count=50)

    assert {one.source for one in sent} == {"miss", "memory", "disk"}
    assert any(one.reason for one in sent if one.source != "miss")


def test_what_is_said_of_recorded_requests_is_what_the_model_computed(
    models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As real clients sent them, in their order; images are refused, and count as nothing."""
    auditor = Auditor(models, "small", tmp_path, capfd)
    try:
        for file in REQUESTS:
            body = json.loads(file.read_text())["body"]
            body |= {"model": "default_model", "max_tokens": 2}
            if body.get("stream"):
                body["stream_options"] = {"include_usage": True}
            if file.name in WITH_IMAGES:
                assert auditor.post(body).status_code != 200
                continue
            known = auditor.explained(body)
            by_command = auditor.explained_by_command(body)
            (said,) = auditor.send(body)
            assert said.num_tokens == known, file.name
            assert by_command is not None
            # The disk is not read for a few tokens more than memory has.
            assert by_command == known or 0 < by_command - known < 32, file.name
        auditor.close()
    finally:
        auditor.server.kill()

    assert len(auditor.sent) == len(REQUESTS) - len(WITH_IMAGES)
