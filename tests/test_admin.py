"""The admin API: who may ask, what it answers, and that no request whatever harms the server."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.errors import StoreError
from persist_cache.filenames import TOKEN_FILE
from persist_cache.queries.conversations import MAX_CHAIN, Branches
from persist_cache.queries.totals import Survey
from persist_cache.server.admin import Admin
from persist_cache.server.guard import Request, owns
from persist_cache.server.validation import RefusedError
from persist_cache.store.store import Store
from tests.bulk_store import conversations, fill
from tests.fakes import Clock, fingerprint, put
from tests.server_process import ServerProcess, sentence_in
from tests.tiny_models import build_model_dir
from tests.waiting import until

SYSTEM = "You are a helpful assistant. " * 12
SECRET = "the capital of Atlantis"
TOKEN = "s3cret"


def make(
    method: str,
    target: str,
    body: Any = None,
    **headers: str,
) -> Request:
    """A request with the token, to a `Host` that is ours, unless others are given."""
    message = Message()
    known = {"Host": "localhost:8080", "Authorization": f"Bearer {TOKEN}"}
    for name, value in {**known, **headers}.items():
        message[name.replace("_", "-")] = value
    raw = b"" if body is None else json.dumps(body).encode()
    return Request(method, target, message, body=raw)


@pytest.fixture
def cache(store: Store) -> Iterator[PromptCache]:
    with PromptCache(store=store, leave_tokens=1) as opened:
        yield opened


def ask(admin: Admin, method: str, target: str, body: Any = None) -> tuple[int, Any]:
    """Status and decoded answer of a request that is let in."""
    request = make(method, target, body)
    admin.check(request)
    answer = admin.answer(request)
    return answer.status, json.loads(answer.body) if answer.body else None


def refusal(admin: Admin, request: Request) -> int:
    """Status with which a request is not let in; 0 when it is."""
    try:
        admin.check(request)
    except RefusedError as refused:
        return refused.status
    return 0


# ---- who may ask -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 0),
        ("LOCALHOST:1", 0),
        ("127.0.0.1:8080", 0),
        ("[::1]:8080", 0),
        ("mac.lan:8080", 0),
        ("localhost.", 0),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost:8080@evil.example", 403),
        ("localhost/evil", 403),
        ("localhost:99999999", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_host_must_be_ours(cache: PromptCache, host: str, status: int) -> None:
    admin = Admin(cache, token=TOKEN, host="mac.lan")

    assert refusal(admin, make("GET", "/v1/cache/stats", Host=host)) == status


def test_host_is_needed_once(cache: PromptCache) -> None:
    none = make("GET", "/v1/cache/stats")
    del none.headers["Host"]
    twice = make("GET", "/v1/cache/stats")
    twice.headers["Host"] = "localhost"

    assert refusal(Admin(cache, token=TOKEN), none) == 400
    assert refusal(Admin(cache, token=TOKEN), twice) == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://localhost:8080"}, 0),
        ({"Origin": "https://localhost:8080"}, 0),
        ({"Origin": "http://localhost:8081"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 0),
        ({"Sec_Fetch_Site": "none"}, 0),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
    ],
)
def test_pages_of_other_sites_are_refused(
    cache: PromptCache, headers: dict[str, str], status: int
) -> None:
    assert refusal(Admin(cache, token=TOKEN), make("POST", "/v1/cache/flush", **headers)) == status


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("Bearer s3cret", 0),
        ("bearer  s3cret ", 0),
        ("Bearer s3cre", 401),
        ("Bearer", 401),
        ("Bearer s3cret\u00e9", 401),
        ("Basic s3cret", 401),
        ("s3cret", 401),
        ("", 401),
    ],
)
def test_token_is_asked_for_wherever_a_request_comes_from(
    cache: PromptCache, given: str, status: int
) -> None:
    admin = Admin(cache, token=TOKEN)

    for method, target in (
        ("GET", "/v1/cache"),
        ("GET", "/v1/cache/entries"),
        ("GET", "/v1/cache/stats"),
        ("GET", "/v1/cache/nowhere"),
        ("POST", "/v1/cache/explain"),
        ("PUT", "/v1/cache/entries/1/pin"),
        ("DELETE", "/v1/cache/entries/1"),
    ):
        assert refusal(admin, make(method, target, Authorization=given)) == status


def test_page_is_given_without_token_because_it_holds_no_data(cache: PromptCache) -> None:
    admin = Admin(cache, token=TOKEN)
    request = make("GET", "/cache", Authorization="")

    admin.check(request)
    first, second = admin.answer(request), admin.answer(request)

    assert first.status == 200
    policy = first.headers["Content-Security-Policy"]
    nonce = policy.partition("'nonce-")[2].partition("'")[0]
    assert f'<script nonce="{nonce}">'.encode() in first.body
    assert b"{{" not in first.body
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert first.headers["Content-Security-Policy"] != second.headers["Content-Security-Policy"]


def test_only_its_own_paths_are_its_own() -> None:
    own = ["/cache", "/metrics", "/v1/cache", "/v1/cache/entries?limit=1", "/cache?x"]
    others = ["/v1/cached", "/cache/x", "/", "/v1/chat/completions", "http://h/v1/cache/stats"]

    assert all(map(owns, own))
    assert not any(map(owns, others))


# ---- entries -----------------------------------------------------------------------------------


def test_list_has_filters_orders_and_pages(cache: PromptCache, store: Store) -> None:
    put(store, [1, 2, 3], tier="system", label="support", pinned=True)
    put(store, [1, 2, 3, 4, 5], tier="user")
    put(store, [7, 8], tier="user", model="w1", label="review")
    admin = Admin(cache, token=TOKEN)

    def found(query: str) -> list[int]:
        status, said = ask(admin, "GET", f"/v1/cache/entries?{query}")
        assert status == 200, said
        return [one["num_tokens"] for one in said["entries"]]

    assert found("sort=tokens") == [5, 3, 2]
    assert found("tier=user&sort=tokens") == [5, 2]
    assert found("label=*pp*") == [3]
    assert found("label=") == [5]
    assert found("pinned=true") == [3]
    assert found("sort=tokens&limit=1&offset=1") == [3]
    assert found("offset=9") == []
    root = ask(admin, "GET", "/v1/cache/entries?label=support")[1]["entries"][0]
    assert found(f"parent={root['id']}") == [5]
    assert sorted(found("parent=none")) == [2, 3]
    assert root["tier"] == "system"
    assert root["pinned"] is True


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=x",
        "limit=%E2%91%A0",
        "offset=99999999999999999999",
        "sort=size;drop",
        "tier=admin",
        "pinned=maybe",
        "unknown=1",
        "limit=1&limit=2",
        "label=%ff",
        "&".join(f"a{n}=1" for n in range(50)),
        "parent=..%2F..",
    ],
)
def test_bad_queries_are_refused(cache: PromptCache, query: str) -> None:
    status, said = ask(Admin(cache, token=TOKEN), "GET", f"/v1/cache/entries?{query}")

    assert status == 400
    assert said["error"].endswith(".")


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("..", 400),
        ("%2e%2e", 400),
        ("..%2f..%2fetc%2fpasswd", 400),
        ("%00", 400),
        ("-1", 400),
        ("0x1f", 400),
        ("f" * 17, 400),
        ("é", 400),
        ("", 400),
        ("0" * 16, 404),
        ("../../data.mdb", 404),
    ],
)
def test_ids_are_hex_digits_or_nothing(cache: PromptCache, given: str, status: int) -> None:
    for method, tail in (("GET", ""), ("DELETE", ""), ("PUT", "/pin"), ("DELETE", "/pin")):
        answered, said = ask(Admin(cache, token=TOKEN), method, f"/v1/cache/entries/{given}{tail}")

        assert answered == status
        assert set(said) == {"error"}


def test_show_pin_and_evict_one_entry(cache: PromptCache, store: Store) -> None:
    system = put(store, [1, 2, 3], tier="system")
    user = put(store, [1, 2, 3, 4, 5], tier="user")
    admin = Admin(cache, token=TOKEN)

    details = ask(admin, "GET", f"/v1/cache/entries/{system[:8]}")[1]
    pinned = ask(admin, "PUT", f"/v1/cache/entries/{user}/pin")[1]
    plan = ask(admin, "DELETE", f"/v1/cache/entries/{system}?below=true&dry_run=true")[1]

    assert details["id"] == system
    assert details["children"] == [user]
    assert details["runs"][0]["num_tokens"] == 3
    assert pinned == {"id": user, "short_id": user[:6], "pinned": True}
    assert store.get(user).pinned
    assert [one["id"] for one in plan["entries"]] == [system]
    assert plan["skipped_pinned"] == [user]
    assert len(store.entries()) == 2

    assert ask(admin, "DELETE", f"/v1/cache/entries/{user}/pin")[1]["pinned"] is False
    done = ask(admin, "DELETE", f"/v1/cache/entries/{system}?below=true")[1]

    assert {one["id"] for one in done["entries"]} == {system, user}
    assert done["freed_bytes"] > 0
    assert store.entries() == []
    gone = ask(admin, "GET", f"/v1/cache/entries/{user}")
    assert gone[0] == 404
    assert "evicted by request" in gone[1]["error"]


def test_ambiguous_ids_are_a_conflict(cache: PromptCache, store: Store) -> None:
    fill(store, conversations(fingerprint(), 60))

    assert {
        ask(Admin(cache, token=TOKEN), "DELETE", f"/v1/cache/entries/{digit}?dry_run=true")[0]
        for digit in "0123456789abcdef"
    } <= {200, 404, 409}
    assert (
        ask(Admin(cache, token=TOKEN), "GET", "/v1/cache/entries/" + most_common(store))[0] == 409
    )


def most_common(store: Store) -> str:
    digits = [entry.id[0] for entry in store.entries()]
    return max(set(digits), key=digits.count)


def test_unchanged_lists_are_not_sent_again(cache: PromptCache, store: Store) -> None:
    put(store, [1, 2, 3])
    admin = Admin(cache, token=TOKEN)
    first = admin.answer(make("GET", "/v1/cache/entries"))

    again = make("GET", "/v1/cache/entries", If_None_Match=first.headers["ETag"])
    unchanged = admin.answer(again)
    put(store, [4, 5])
    changed = admin.answer(again)

    assert (unchanged.status, unchanged.body) == (304, b"")
    assert changed.status == 200
    assert json.loads(changed.body)["total"] == 2


def test_statistics_of_a_large_store_do_not_load_it_at_each_commit(
    cache: PromptCache, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    clock = Clock()

    class Large(Survey):
        def __init__(self, store: Store) -> None:
            loaded.append(store)
            clock.advance(0.5)
            super().__init__(store)

    monkeypatch.setattr("persist_cache.server.view.Survey", Large)
    monkeypatch.setattr("persist_cache.server.view.time", SimpleNamespace(monotonic=clock))
    admin = Admin(cache, token=TOKEN)
    for number in range(3):
        put(store, [number, 2, 3])
        _, said = ask(admin, "GET", "/v1/cache/stats")

    assert len(loaded) == 1
    assert said["store"]["entries"] == 3
    assert len(ask(admin, "GET", "/v1/cache/entries")[1]["entries"]) == 3
    assert len(loaded) == 2, "entries are those of now"
    clock.advance(20)
    put(store, [3, 2, 3])
    ask(admin, "GET", "/v1/cache/stats")
    assert len(loaded) == 3, "seldom is not never"


def test_every_entry_of_a_large_store_is_reached_through_the_tree(
    cache: PromptCache, store: Store
) -> None:
    fill(store, conversations(fingerprint(), 2000, systems=7))
    admin = Admin(cache, token=TOKEN)
    seen: list[str] = []

    def walk(branch: str | None) -> None:
        offset = 0
        while True:
            query = f"limit=50&offset={offset}" + (f"&branch={branch}" if branch else "")
            said = ask(admin, "GET", f"/v1/cache/tree?{query}")[1]
            if offset == 0:
                seen.extend(one["id"] for one in said["entries"])
            for one in said["branches"]:
                if one["num_entries"] == 1 and not one["num_branches"]:
                    seen.append(one["id"])
                else:
                    walk(one["id"])
            offset += 50
            if offset >= said["total"]:
                return

    walk(None)

    assert len(seen) == 2000
    assert set(seen) == {entry.id for entry in store.entries()}


def test_branches_add_up_and_long_conversations_are_cut(store: Store) -> None:
    tokens: list[int] = []
    for number in range(2 * MAX_CHAIN + 10):
        tokens += [number]
        put(store, tokens, tier="user", complete=number % 2 == 0)
    put(store, [9_999], tier="user")
    survey = Survey(store)

    tree = Branches(survey)

    roots = [tree.branch(entry.id) for entry in tree.under(None)]
    long = next(one for one in roots if one.num_branches)
    assert len(long.entries) == MAX_CHAIN
    assert long.totals.entries == 2 * MAX_CHAIN + 10
    assert len(tree.below(long.entries[0].id)) == 2 * MAX_CHAIN + 10
    everything = survey.removal([entry.id for entry in survey.entries]).freed_bytes
    assert sum(one.totals.nbytes for one in roots) == pytest.approx(everything, abs=500)
    assert sum(tree.added_bytes.values()) == pytest.approx(everything, abs=500)


# ---- the whole ---------------------------------------------------------------------------------


def test_unknown_paths_and_methods_get_a_sentence(cache: PromptCache) -> None:
    admin = Admin(cache, token=TOKEN)

    for method, target, status in [
        ("GET", "/v1/cache", 404),
        ("GET", "/v1/cache/", 404),
        ("GET", "/v1/cache/entries/", 400),
        ("GET", "/v1/cache/../secret", 404),
        ("PUT", "/v1/cache/entries", 405),
        ("GET", "/v1/cache/flush", 405),
        ("DELETE", "/v1/cache/stats", 405),
        ("POST", "/cache", 405),
        ("OPTIONS", "/v1/cache/stats", 405),
    ]:
        assert ask(admin, method, target)[0] == status, target


def test_stats_and_flush_of_an_empty_server(cache: PromptCache) -> None:
    admin = Admin(cache, token=TOKEN)

    stats = ask(admin, "GET", "/v1/cache/stats")[1]
    flushed = ask(admin, "POST", "/v1/cache/flush")

    assert stats["store"]["entries"] == 0
    assert stats["server"]["memory"]["max_bytes"] is None
    assert stats["recent"] == []
    assert stats["default_store"] is False
    assert flushed == (200, {"flushed": True, "saves": 0, "disk_off": ""})


def test_store_errors_are_503_with_their_sentence(
    cache: PromptCache, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = put(store, [1, 2, 3])

    def fail(*_: Any) -> None:
        raise StoreError("The disk is full.")

    monkeypatch.setattr(store, "pin", fail)
    answered = ask(Admin(cache, token=TOKEN), "PUT", f"/v1/cache/entries/{entry}/pin")

    assert answered == (503, {"error": "The disk is full."})


def test_without_a_store_it_says_so() -> None:
    with PromptCache() as cache:
        assert ask(Admin(cache, token=TOKEN), "GET", "/v1/cache/entries")[0] == 503
        stats = ask(Admin(cache, token=TOKEN), "GET", "/v1/cache/stats")[1]

    assert stats["store"] is None
    assert stats["server"]["disk_off"] == "no store was given"


def test_failures_tell_nothing_of_the_prompt(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(cache, "stats", fail)
    caplog.set_level("INFO")
    answered = ask(Admin(cache, token=TOKEN), "GET", "/v1/cache/stats")

    assert answered[0] == 500
    assert SECRET not in caplog.text
    assert "RuntimeError" in caplog.text


# ---- a real server -----------------------------------------------------------------------------


def test_admin_token_of_the_command_line_is_asked_for(tmp_path: Path) -> None:
    with ServerProcess(
        None, tmp_path / "store", tmp_path, min_free_bytes=0, admin_token="s3cret"
    ) as server:
        right = {"Authorization": "Bearer s3cret"}

        none = server.request("GET", "/v1/cache/stats", with_token=False)
        assert none.status_code == 401
        assert server.request("GET", "/v1/cache/stats", headers=right).status_code == 200
        assert not (tmp_path / "store" / TOKEN_FILE).exists()
        assert server.request("GET", "/health").status_code == 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("admin")
    model = build_model_dir(folder / "model")
    with ServerProcess(model, folder / "store", folder, min_free_bytes=0, grace_s=2) as started:
        assert started.chat(("system", SYSTEM), ("user", "Hello")).status_code == 200
        yield started
        assert started.get("/health")["status"] == "ok"
        assert started.stop() == 0
        log = started.log.read_text()
        assert "Traceback" not in log
        assert SECRET not in log


def chat_body(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2, **more}


def test_explain_says_what_the_next_request_will_find(server: ServerProcess) -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "And now?"}]

    assert server.request("POST", "/v1/cache/flush").json()["flushed"] is True
    said = server.request("POST", "/v1/cache/explain", json={"messages": messages}).json()
    answer = server.request(
        "POST", "/v1/chat/completions", json={"messages": messages, "max_tokens": 2}
    )

    cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert said["outcome"] == "diverges"
    assert said["cached_tokens"] == said["known_tokens"] == cached > 100
    assert said["num_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert said["divergence"]["stored_text"]
    assert said["divergence"]["stored_tokens"]


def test_warm_stores_a_system_prompt_and_the_next_request_finds_it(server: ServerProcess) -> None:
    system = {"role": "system", "content": "You answer like a pirate. " * 10}
    marks = {"pin": True, "label": "pirate", "ttl_s": 3600}

    warmed = server.request(
        "POST", "/v1/cache/warm", json={"messages": [system], "cache": marks}
    ).json()
    again = server.request("POST", "/v1/cache/warm", json={"messages": [system]}).json()
    answer = server.chat(("system", system["content"]), ("user", "Where is the treasure?"))

    assert warmed["tier"] == "system"
    assert warmed["missing_tokens"] == 0
    assert again["id"] == warmed["id"]
    assert again["found_tokens"] == again["num_tokens"] == warmed["num_tokens"]
    entry = server.get(f"/v1/cache/entries/{warmed['id']}")
    assert (entry["label"], entry["pinned"]) == ("pirate", True)
    assert entry["num_tokens"] == warmed["num_tokens"]
    assert entry["expires"] > entry["created"] + 3000
    cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= warmed["num_tokens"]


def test_warm_leaves_what_was_asked_for_and_nothing_else(server: ServerProcess) -> None:
    def ids() -> set[str]:
        assert server.request("POST", "/v1/cache/flush").status_code == 200
        found = server.get("/v1/cache/entries?limit=1000")["entries"]
        return {entry["id"] for entry in found}

    def caches() -> int:
        tiers = server.get("/v1/cache/stats")["server"]["memory"]["tiers"]
        return sum(tier["entries"] for tier in tiers)

    system = {"role": "system", "content": "You answer like a baker. " * 10}
    user = {"role": "user", "content": "Where is the bread? " * 10}
    before, held = ids(), caches()

    warmed = server.request("POST", "/v1/cache/warm", json={"messages": [system]}).json()
    after_system, held_after = ids(), caches()
    whole = server.request("POST", "/v1/cache/warm", json={"messages": [system, user]}).json()
    after_whole = ids()
    answer = server.chat(("system", system["content"]), ("user", user["content"]))
    reply = answer.json()["usage"]
    # The answer is sent before its cache is kept.
    new = until(lambda: ids() - after_whole)

    assert after_system - before == {warmed["id"]}
    assert held_after == min(held + 1, 10)
    assert after_whole - after_system == {whole["id"]}
    assert reply["prompt_tokens_details"]["cached_tokens"] == whole["num_tokens"]
    assert len(new) == 1, "a request of its own keeps its answer"


def test_warm_stores_a_whole_conversation(server: ServerProcess) -> None:
    messages = [{"role": "user", "content": "Once upon a time there was a dragon. " * 5}]

    warmed = server.request("POST", "/v1/cache/warm", json={"messages": messages}).json()

    assert warmed["tier"] == "user"
    assert server.get(f"/v1/cache/entries/{warmed['id']}")["num_tokens"] == warmed["num_tokens"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": "hello"},
        {"messages": []},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": "x"}], "cache": {"pin": "yes"}},
        {"messages": [{"role": "user", "content": "x"}], "cache": {"pni": True}},
        {"messages": [{"role": "user", "content": "x"}], "cache": {"label": "a\nb"}},
        {"messages": [{"role": "user", "content": "x"}], "cache": {"ttl_s": -1}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": "x"}], "model": "another"},
    ],
)
def test_bad_bodies_are_refused_by_warm(server: ServerProcess, body: dict[str, Any]) -> None:
    answer = server.request("POST", "/v1/cache/warm", json=body)

    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()) == {"error"}


def test_explain_of_a_model_that_is_not_loaded_is_a_conflict(server: ServerProcess) -> None:
    answer = server.request("POST", "/v1/cache/explain", json=chat_body(model="another/model"))

    assert answer.status_code == 409


@pytest.mark.parametrize("part", ["adapters", "draft_model"])
def test_explain_of_another_adapter_or_draft_model_is_a_conflict(
    server: ServerProcess, part: str
) -> None:
    server.request("POST", "/v1/chat/completions", json=chat_body(max_tokens=1))
    other = server.request("POST", "/v1/cache/explain", json=chat_body(model="another/model"))
    loaded = other.json()["error"].removeprefix("Another model is loaded: ").removesuffix(".")
    same = server.request("POST", "/v1/cache/explain", json=chat_body(model=loaded))
    answer = server.request(
        "POST", "/v1/cache/explain", json=chat_body(model=loaded, **{part: "another"})
    )

    assert same.status_code == 200, same.text
    assert answer.status_code == 409, answer.text


BAD_OPTIONS: list[dict[str, Any]] = [
    {"max_tokens": 10**12},
    {"max_tokens": -2},
    {"max_tokens": "many"},
    {"max_tokens": True},
    {"max_completion_tokens": -2},
    {"stop": [1]},
    {"stop": 7},
    {"stop": ""},
    {"stop": ["a"] * 1000},
    {"top_k": 100_000},
    {"xtc_threshold": 0.9, "xtc_probability": 0.5},
    {"seed": -1},
    {"logit_bias": {"99999999": 1.0}},
    {"logit_bias": {"1": "much"}},
    {"logit_bias": [1]},
    {"stream": "yes"},
    {"stream": True, "stream_options": 3},
    {"stream": True, "stream_options": {"include_usage": "yes"}},
    {"chat_template_kwargs": {"return_dict": True}},
    {"chat_template_kwargs": []},
    {"tools": [1]},
    {"tools": {}},
    {"role_mapping": {"user": 1}},
    {"temperature": "hot"},
    {"logprobs": 1},
    {"top_logprobs": 99},
    {"model": 5},
    {"messages": {}},
    {"messages": [1]},
    {"messages": [{"role": 1, "content": "x"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"role": "user", "content": ["x"]}]},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=lambda one: json.dumps(one)[:40])
def test_bad_options_are_refused_and_the_model_lives(
    server: ServerProcess, options: dict[str, Any]
) -> None:
    answer = server.request("POST", "/v1/chat/completions", json=chat_body(**options))

    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()) == {"error"}
    assert SECRET not in answer.text
    assert server.get("/health")["model"] == "ok"


@pytest.mark.parametrize(
    "options",
    [
        {"stop": ["never said"]},
        {"stop": None},
        {"top_k": 5, "temperature": 0.5},
        {"logit_bias": {"5": 1.5}},
        {"stream": True, "stream_options": {}},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"seed": 7},
        {"xtc_probability": 0.5, "xtc_threshold": 0.1, "temperature": 0.5},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    ],
    ids=str,
)
def test_good_options_still_work(server: ServerProcess, options: dict[str, Any]) -> None:
    answer = server.request("POST", "/v1/chat/completions", json=chat_body(**options))

    assert answer.status_code == 200, answer.text
    assert server.get("/health")["model"] == "ok"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"{" + SECRET.encode(), 400),
        (b"", 400),
        (b"[]", 400),
        (b'"' + SECRET.encode() + b'"', 400),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"messages": [], "temperature": NaN}', 400),
        (b'{"messages": [], "temperature": 1e999}', 400),
        (b'{"messages": [], "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b"[" * 200_000, 400),
    ],
    ids=lambda one: repr(one)[:30],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/cache/explain"])
def test_bodies_that_are_no_json_are_refused(
    server: ServerProcess, path: str, raw: bytes, status: int
) -> None:
    answer = server.request("POST", path, data=raw)

    assert answer.status_code in (status, 411)
    assert set(answer.json()) == {"error"}
    assert SECRET not in answer.text


@pytest.mark.parametrize("prompt", [None, "", 5, ["a", "b"], [1, 2], {}])
def test_bad_completion_prompts_are_refused(server: ServerProcess, prompt: Any) -> None:
    answer = server.request("POST", "/v1/completions", json={"prompt": prompt})

    assert answer.status_code == 400
    assert server.get("/health")["model"] == "ok"


def talk(server: ServerProcess, *parts: bytes) -> bytes:
    """Send raw bytes; returns what comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
        connection.shutdown(socket.SHUT_WR)
        said = b""
        while more := connection.recv(1 << 16):
            said += more
    return said


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (
            b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            400,
        ),
        (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\n", 413),
        (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{}", 400),
        (b"POST /v1/chat/completions HTTP/1.1\r\n\r\n", 411),
        (b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /nowhere HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 404),
        (b"DELETE /v1/chat/completions HTTP/1.1\r\n\r\n", 405),
        (b"BREW /pot HTTP/1.1\r\n\r\n", 501),
        (b"GET /v1/cache/stats HTTP/1.1\r\n\r\n", 400),
        (b"GET /v1/cache/stats HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET /v1/cache/\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 401),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n\r\n", 403),
        (b"complete nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
)
def test_malformed_requests_get_a_sentence(server: ServerProcess, head: bytes, status: int) -> None:
    said = talk(server, head)

    assert said.split()[1] == str(status).encode(), said
    error = json.loads(said.partition(b"\r\n\r\n")[2])
    assert sentence_in(error).endswith(".")


@pytest.mark.parametrize(
    "part",
    [
        b"X-Filler: " + b"a" * (10 << 20) + b"\r\n",
        b"".join(b"X-%d: a\r\n" % number for number in range(200_000)),
    ],
    ids=["one long header", "many headers"],
)
def test_ten_megabytes_of_headers_are_refused(server: ServerProcess, part: bytes) -> None:
    said = talk(server, b"GET /v1/cache/stats HTTP/1.1\r\nHost: localhost\r\n", part, b"\r\n")

    assert said.split()[1] == b"431"
    assert "too" in json.loads(said.partition(b"\r\n\r\n")[2])["error"]


def test_a_client_that_goes_away_leaves_no_traceback(server: ServerProcess) -> None:
    body = json.dumps(chat_body(stream=True, max_tokens=200)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    for sent in (head + body, head, b"GET /v1/cache/st"):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        connection.sendall(sent)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()

    assert server.chat(("user", "Still there?")).status_code == 200


def test_only_upstreams_paths_may_be_read_by_other_sites(server: ServerProcess) -> None:
    ours = {"Origin": "http://localhost:3000"}
    chat = server.request("POST", "/v1/chat/completions", json={"messages": 1}, headers=ours)
    for path in ("/v1/cache/stats", "/metrics", "/cache", "/v1/cache/nowhere"):
        answer = server.request("GET", path)
        assert not any(name.lower().startswith("access-control") for name in answer.headers)
    preflight = server.request(
        "OPTIONS", "/v1/cache/flush", headers={"Origin": "http://evil.example"}
    )

    assert chat.headers["Access-Control-Allow-Origin"] == ours["Origin"]
    assert preflight.status_code == 403
    assert "Access-Control-Allow-Origin" not in preflight.headers


def test_metrics_of_a_real_server(server: ServerProcess) -> None:
    text = server.request("GET", "/metrics").text

    assert "persist_cache_model_up 1.0" in text
    assert "persist_cache_disk_entries " in text
    assert 'persist_cache_evictions_total{cause="evicted",tier="system"}' in text
    assert 'persist_cache_disk_off{reason="full"} 0.0' in text
