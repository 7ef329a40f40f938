"""What commands can is done over HTTP, too: marks, groups, eviction, upkeep, and bundles."""

from __future__ import annotations

import http.client
import inspect
import json
import re
import tracemalloc
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store
from persist_cache.bundle import Bundle
from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.server.admin import Admin
from persist_cache.server.guard import Request
from tests.fakes import fingerprint, put
from tests.server_process import ServerProcess, sentence_in
from tests.test_bundle import WIDE, WideSource
from tests.tiny_models import build_model_dir

SYSTEM = "You are a helpful assistant. " * 12
SAID = [{"role": "user", "content": "The sky is"}]
TOKEN = "s3cret"


@pytest.fixture
def admin(store: Store) -> Iterator[Admin]:
    with PromptCache(store=store, leave_tokens=1) as cache:
        yield Admin(cache, token=TOKEN, host="localhost")


def request(method: str, target: str, **more: Any) -> Request:
    headers = Message()
    headers["Host"] = "localhost:8080"
    headers["Authorization"] = f"Bearer {TOKEN}"
    return Request(method, f"/v1/cache/{target}", headers, **more)


def ask(admin: Admin, method: str, target: str, body: Any = None) -> tuple[int, Any]:
    raw = b"" if body is None else json.dumps(body).encode()
    asked = request(method, target, body=raw)
    admin.check(asked)
    answer = admin.answer(asked)
    return answer.status, json.loads(answer.body)


@pytest.fixture
def ids(store: Store) -> dict[str, str]:
    return {
        "system": put(store, [1] * 30, tier="system", group="mine"),
        "mine": put(store, [1] * 40, tier="user", group="mine"),
        "yours": put(store, [*[1] * 30, *[2] * 10], tier="user", group="yours/and more"),
    }


# ---- marks and eviction --------------------------------------------------------------------------


def test_an_entry_is_labelled_and_dated(admin: Admin, store: Store, ids: dict[str, str]) -> None:
    at = f"entries/{ids['mine']}"
    assert ask(admin, "PUT", f"{at}/label", {"label": "a name"})[1]["label"] == "a name"
    status, dated = ask(admin, "PUT", f"{at}/ttl", {"ttl_s": 3600})
    assert (status, dated["id"]) == (200, ids["mine"])
    assert store.get(ids["mine"]).expires == dated["expires"] == store.clock() + 3600
    assert ask(admin, "DELETE", f"{at}/ttl")[1]["expires"] is None
    assert ask(admin, "DELETE", f"{at}/label")[1]["label"] == ""
    assert (store.get(ids["mine"]).label, store.get(ids["mine"]).expires) == ("", None)


def test_marks_of_a_group_leave_what_others_use(
    admin: Admin, store: Store, ids: dict[str, str]
) -> None:
    for mark, body in (("pin", None), ("label", {"label": "x"}), ("ttl", {"ttl_s": 9})):
        status, done = ask(admin, "PUT", f"groups/mine/{mark}", body)
        assert (status, [one["id"] for one in done["entries"]]) == (200, [ids["mine"]])
        assert done["skipped_shared"] == [ids["system"]]
    assert store.get(ids["mine"]).pinned
    assert store.get(ids["system"]).label == ""
    other = ask(admin, "PUT", "groups/yours%2Fand%20more/pin")[1]
    assert [one["id"] for one in other["entries"]] == [ids["yours"]]
    assert ask(admin, "DELETE", "groups/mine/pin")[0] == 200
    assert not store.get(ids["mine"]).pinned
    assert ask(admin, "PUT", "groups/nobody/pin")[0] == 404
    assert ask(admin, "PUT", "groups//pin")[0] == 400


def test_entries_are_evicted_by_what_they_are(
    admin: Admin, store: Store, ids: dict[str, str]
) -> None:
    planned = ask(admin, "DELETE", "entries?group=mine&dry_run=true")[1]
    assert [one["id"] for one in planned["entries"]] == [ids["mine"]]
    assert planned["skipped_shared"] == [ids["system"]]
    assert len(store.entries()) == 3
    store.pin(ids["yours"])
    assert ask(admin, "DELETE", "entries?group=mine")[1]["skipped_shared"] == [ids["system"]]
    assert ask(admin, "GET", "entries?group=mine")[1]["total"] == 0
    assert ask(admin, "DELETE", "entries?tier=user")[1]["skipped_pinned"] == [ids["yours"]]
    assert {one.id for one in store.entries()} == {ids["system"], ids["yours"]}
    assert ask(admin, "DELETE", "entries?all=true")[0] == 200
    assert store.entries() == []


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("DELETE", "entries", None),
        ("DELETE", "entries?all=true&tier=user", None),
        ("DELETE", "entries?model=", None),
        ("DELETE", "entries?group=", None),
        ("DELETE", "entries?older_than_s=soon", None),
        ("GET", "entries?group=", None),
        ("PUT", "entries/{}/label", {}),
        ("PUT", "entries/{}/label", {"label": 1}),
        ("PUT", "entries/{}/label", {"label": "two\nlines"}),
        ("PUT", "entries/{}/label", {"label": "x", "more": 1}),
        ("PUT", "entries/{}/ttl", {"ttl_s": True}),
        ("PUT", "entries/{}/ttl", {"ttl_s": -1}),
        ("PUT", "entries/{}/ttl", []),
        ("GET", "export", None),
        ("GET", "export?group=mine&ids=0", None),
        ("GET", "export?ids=xyz", None),
        ("POST", "check?read_data=perhaps", None),
        ("POST", "gc?now=true", None),
        ("POST", "import", None),
        ("POST", "entries", {"messages": SAID, "cache": {"group": "two\nlines"}}),
        ("POST", "entries", {"messages": SAID, "cache": {"group": 1}}),
        ("POST", "entries", {"messages": SAID, "prompt_cache_key": 1}),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(
    admin: Admin, store: Store, ids: dict[str, str], method: str, target: str, body: Any
) -> None:
    status, said = ask(admin, method, target.format(ids["mine"]), body)

    if target == "entries" and body is not None and "prompt_cache_key" in body:
        assert status in (400, 409)
    else:
        assert status == 400, said
    assert said["error"].endswith(".")
    assert len(store.entries()) == 3


def test_a_store_is_tidied_and_checked(admin: Admin, store: Store, ids: dict[str, str]) -> None:
    store.expire_at(ids["mine"], store.clock() - 1)

    status, done = ask(admin, "POST", "gc")
    assert (status, done["evicted"], done["entries"]) == (200, 1, 2)
    status, found = ask(admin, "POST", "check?read_data=true")
    assert (status, found["problems"], found["read_data"]) == (200, [], True)
    blob = next((store.root / "blobs").glob("*/*"))
    blob.write_bytes(b"\0" * blob.stat().st_size)
    assert ask(admin, "POST", "check?read_data=true")[1]["problems"] != []
    mended = ask(admin, "POST", "check?read_data=true&repair=true")[1]
    assert mended["repaired"]
    assert mended["quarantine"] != []


def test_a_bundle_takes_the_memory_of_a_piece_of_it(tmp_path: Path) -> None:
    tokens = list(range(12_000))
    with (
        Store.open(tmp_path / "a", min_free_bytes=0, run_tokens=512) as store,
        PromptCache(store=store) as cache,
        Store.open(tmp_path / "b", min_free_bytes=0, run_tokens=512) as other,
        PromptCache(store=other) as second,
        (tmp_path / "sent").open("w+b") as file,
    ):
        entry = store.put(fingerprint(), tokens, WideSource(tokens, layout=WIDE)).entry
        there, here = (Admin(one, token=TOKEN, host="localhost") for one in (cache, second))
        tracemalloc.start()
        answer = there.answer(request("GET", f"export?ids={entry}"))
        assert answer.pieces is not None
        for piece in answer.pieces:
            file.write(piece)
        nbytes = file.tell()
        file.seek(0)
        upload = request("POST", "import", receive=lambda _: iter(lambda: file.read(1 << 20), b""))
        done = here.answer(upload)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert done.status == 200, done.body
        assert [one.id for one in other.entries()] == [entry]
    assert nbytes == answer.length > 24_000_000
    assert peak < 8_000_000


def test_every_path_is_documented_and_every_documented_one_is_there(admin: Admin) -> None:
    documented = (Path(__file__).parents[1] / "docs" / "http.md").read_text()
    source = Path(inspect.getfile(Admin)).read_text()
    routed = {path.split('"')[1] for path in re.findall(r"case \[([^]]+)\]:", source)}

    named = set(re.findall(r"/v1/cache/([a-z]+)", documented))
    assert named == routed | {"compact"}
    for path in named - {"groups"}:
        said = [ask(admin, method, path)[1] for method in ("GET", "POST")]
        assert all("no such path" not in str(one) for one in said), path


# ---- with a model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("admin-http")
    model = build_model_dir(folder / "model")
    with ServerProcess(model, folder / "store", folder, min_free_bytes=0) as live:
        assert live.chat(("user", "Are you there?")).status_code == 200
        yield live
        assert live.stop() == 0
        assert "Traceback" not in live.log.read_text()


def body_of(protocol: str, name: str) -> dict[str, Any]:
    match protocol:
        case "chat":
            return {"messages": [{"role": "system", "content": f"{name} {SYSTEM}"}, *SAID]}
        case "text":
            return {"prompt": f"{name} {SYSTEM}"}
        case "messages":
            return {"system": f"{name} {SYSTEM}", "messages": SAID, "max_tokens": 5}
    return {"instructions": f"{name} {SYSTEM}", "input": SAID}


@pytest.mark.parametrize("protocol", ["chat", "text", "messages", "responses"])
def test_a_named_cache_is_made_of_a_body_of_any_protocol(
    server: ServerProcess, protocol: str
) -> None:
    marks = {"label": f"from {protocol}", "pin": True, "ttl_s": 3600, "group": f"g {protocol}"}
    body = {**body_of(protocol, protocol), "cache": marks}
    answer = server.request("POST", "/v1/cache/entries", json=body)

    assert answer.status_code == 200, answer.text
    made = answer.json()
    listed = server.get(f"/v1/cache/entries?group=g {protocol}")["entries"]
    (entry,) = [one for one in listed if one["id"] == made["id"]]
    assert (entry["label"], entry["pinned"]) == (f"from {protocol}", True)
    assert entry["group"] == f"g {protocol}"
    assert entry["expires"] is not None
    assert entry["num_tokens"] == made["num_tokens"]
    server.request("DELETE", f"/v1/cache/entries/{made['id']}/pin")


def export(server: ServerProcess, query: str) -> bytes:
    answer = server.request("GET", f"/v1/cache/export?{query}")
    assert answer.status_code == 200, answer.text
    assert int(answer.headers["Content-Length"]) == len(answer.content)
    return answer.content


def ids_of(server: ServerProcess, query: str = "") -> set[str]:
    return {one["id"] for one in server.get(f"/v1/cache/entries?limit=1000{query}")["entries"]}


def test_what_was_exported_is_imported_and_used(server: ServerProcess, tmp_path: Path) -> None:
    body = {**body_of("chat", "Exported"), "cache": {"group": "away", "label": "kept"}}
    made = server.request("POST", "/v1/cache/entries", json=body).json()
    wanted = ids_of(server, "&group=away")
    raw = export(server, "group=away")
    (tmp_path / "away.tar").write_bytes(raw)
    with Bundle(tmp_path / "away.tar") as bundle:
        assert {one.id for one in bundle.entries} == wanted
    alone = export(server, f"ids={made['id']}")
    assert 0 < len(alone) <= len(raw)
    assert server.request("DELETE", "/v1/cache/entries?group=away").status_code == 200
    server.request("DELETE", f"/v1/cache/entries/{made['id']}")

    planned = server.request("POST", "/v1/cache/import?dry_run=true", data=raw)
    assert made["id"] not in ids_of(server)
    # A body without a length comes in chunks.
    done = server.request("POST", "/v1/cache/import?loaded=true", data=iter([raw[:999], raw[999:]]))

    for one in (planned, done):
        assert one.status_code == 200, one.text
        assert {entry["id"] for entry in one.json()["entries"]} == wanted
        assert one.json()["file_bytes"] == len(raw)
        assert one.json()["models"][0]["usable"]
    assert wanted <= ids_of(server)
    entry = server.get(f"/v1/cache/entries/{made['id']}")
    assert (entry["label"], entry["group"]) == ("kept", "")


def test_a_damaged_bundle_is_refused_and_changes_nothing(server: ServerProcess) -> None:
    body = {**body_of("text", "Damaged"), "cache": {"group": "damaged"}}
    server.request("POST", "/v1/cache/entries", json=body)
    raw, before = export(server, "group=damaged"), ids_of(server)
    flipped = bytearray(raw)
    flipped[-5000] ^= 1

    for bad in (bytes(flipped), raw[:-1], raw[:700], b"", b"no bundle", raw + b"\0"):
        answer = server.request("POST", "/v1/cache/import", data=bad)
        assert answer.status_code == 400, (len(bad), answer.text)
        sentence = sentence_in(answer.json())
        assert sentence.endswith((".", ")")) or ": " in sentence
        assert "/" not in sentence
    assert ids_of(server) == before
    assert not list(server.store.glob("doctor.*"))


def test_a_bundle_that_can_never_fit_is_refused_before_it_is_sent(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/v1/cache/import")
    connection.putheader("Authorization", f"Bearer {server.token}")
    connection.putheader("Content-Length", str(10**12 - 1))
    connection.endheaders()

    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "entries"),
        ("DELETE", "entries?all=true"),
        ("PUT", "groups/a/pin"),
        ("POST", "gc"),
        ("POST", "check"),
        ("GET", "export?group=a"),
        ("POST", "import"),
    ],
)
def test_nothing_of_it_is_done_without_the_token(
    server: ServerProcess, method: str, path: str
) -> None:
    before = ids_of(server)
    answer = server.request(method, f"/v1/cache/{path}", with_token=False)

    assert answer.status_code == 401
    assert ids_of(server) == before
