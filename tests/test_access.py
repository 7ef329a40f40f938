"""Who may ask: the token of the admin API, origins, the API key, and what a proxy changes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import requests

from persist_cache import fs
from persist_cache.filenames import TOKEN_FILE, is_small
from persist_cache.server.admin_token import AdminToken, stored_token
from persist_cache.server.discovery import Serving, announced, running_servers
from persist_cache.server.guard import Guard, ModelGuard, Request, is_loopback
from persist_cache.server.validation import RefusedError
from persist_cache.store.store import Store
from tests.cli import prepared_script, runner
from tests.server_process import ServerProcess, free_port, running
from tests.tiny_models import build_model_dir

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
FOREIGN = {"Origin": "http://evil.example"}
LINK = re.compile(r"^Page: (http://\S+/cache)#token=(\S+)$", re.MULTILINE)
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}

# ---- the token's file --------------------------------------------------------------------------


def test_token_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "store"

    first, second = AdminToken(folder), AdminToken(folder)

    assert len(first()) >= 32
    assert first() == second() == stored_token(folder) == (folder / TOKEN_FILE).read_text().strip()
    assert stat.S_IMODE((folder / TOKEN_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.listdir(folder) == [TOKEN_FILE]


def test_servers_that_start_at_once_get_one_token(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    program = (
        "import sys; from pathlib import Path\n"
        "from persist_cache.server.admin_token import AdminToken\n"
        "sys.stdin.read(1); print(AdminToken(Path(sys.argv[1]))())"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]

    for one in started:
        assert one.stdin is not None
        one.stdin.write("x")
        one.stdin.flush()
    tokens = {one.communicate()[0].strip() for one in started}

    assert tokens == {stored_token(folder)}


def widen(path: Path) -> None:
    path.chmod(0o644)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def tear(path: Path) -> None:
    path.write_text(path.read_text()[:7])


def link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize("spoil", [widen, empty, tear, link, pipe])
def test_a_token_that_cannot_be_trusted_is_replaced(tmp_path: Path, spoil: Any) -> None:
    server = AdminToken(tmp_path)
    before = server()
    spoil(tmp_path / TOKEN_FILE)

    again = AdminToken(tmp_path)

    assert again() != before
    assert again() == stored_token(tmp_path) == server()


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT ROOT: a file cannot be given to another user")
def test_a_token_of_another_user_is_replaced(tmp_path: Path) -> None:
    before = AdminToken(tmp_path)()
    os.chown(tmp_path / TOKEN_FILE, 1234, -1)

    assert stored_token(tmp_path) is None
    assert AdminToken(tmp_path)() != before
    assert (tmp_path / TOKEN_FILE).stat().st_uid == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT ROOT: a folder cannot be given to another user")
def test_no_token_is_kept_where_others_may_write(tmp_path: Path) -> None:
    theirs, open_to_all = tmp_path / "theirs", tmp_path / "open"
    for folder in (theirs, open_to_all):
        folder.mkdir()
    os.chown(theirs, 1234, -1)
    open_to_all.chmod(0o777)

    for folder in (theirs, open_to_all):
        token = AdminToken(folder)
        assert token.trouble
        assert len(token()) >= 32
        assert os.listdir(folder) == []


def test_a_token_that_was_removed_is_put_back_by_the_server(tmp_path: Path) -> None:
    server = AdminToken(tmp_path)
    (tmp_path / TOKEN_FILE).unlink()

    assert server() == stored_token(tmp_path)


def test_what_keeps_a_token_from_being_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of a descriptor names no file."""

    def full(fd: int, buffers: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fs, "write_all", full)

    token = AdminToken(tmp_path / "store")

    assert token.trouble == f"{tmp_path / 'store'} cannot be used (No space left on device)."


def test_a_server_is_found_though_a_command_looked_while_it_told_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks for servers locks their files for a moment, to tell living from dead."""
    (tmp_path / "store").mkdir(mode=0o700)
    tried = threading.Event()
    create, wait = fs.create, fs.lock
    looks: list[threading.Thread] = []

    def leave(looking: int) -> None:
        tried.wait(30)
        os.close(looking)

    def seen(path: Path) -> int:
        fd = create(path)
        looking = fs.open_read(path)
        assert fs.try_lock(looking)
        looks.append(threading.Thread(target=leave, args=(looking,)))
        looks[-1].start()
        return fd

    def waits(fd: int, patience_s: float) -> bool:
        tried.set()
        return wait(fd, patience_s)

    monkeypatch.setattr(fs, "create", seen)
    monkeypatch.setattr(fs, "lock", waits)
    serving = Serving("http://127.0.0.1:1/cache")
    with announced(tmp_path / "store", serving):
        tried.set()
        for one in looks:
            one.join()

        assert running_servers(tmp_path / "store") == [serving]


def test_a_token_given_is_kept_nowhere(tmp_path: Path) -> None:
    assert AdminToken(tmp_path / "store", "s3cret")() == "s3cret"
    assert not (tmp_path / "store").exists()


def test_only_servers_that_live_are_told_of(tmp_path: Path) -> None:
    died = tmp_path / "server.0123456789abcdef"
    died.write_text(json.dumps({"url": "http://127.0.0.1:1/cache"}))
    died.chmod(0o600)

    with announced(tmp_path, Serving("http://127.0.0.1:2/cache")):
        with announced(tmp_path, Serving("http://127.0.0.1:3/cache")):
            urls = {one.url for one in running_servers(tmp_path)}
        assert [one.url for one in running_servers(tmp_path)] == ["http://127.0.0.1:2/cache"]

    assert urls == {"http://127.0.0.1:2/cache", "http://127.0.0.1:3/cache"}
    assert running_servers(tmp_path) == []
    assert os.listdir(tmp_path) == []


def test_file_of_a_dead_server_is_not_believed_though_its_number_is_in_use(tmp_path: Path) -> None:
    for name in ("server.0123456789abcdef", "server.0123456789abcdee.new"):
        died = tmp_path / name
        died.write_text(json.dumps({"url": "http://127.0.0.1:1/cache", "pid": os.getpid()}))
        died.chmod(0o600)

    assert running_servers(tmp_path) == []
    with announced(tmp_path, Serving("http://127.0.0.1:2/cache", model="m", pid=5, started=7.5)):
        assert running_servers(tmp_path) == [
            Serving("http://127.0.0.1:2/cache", False, "m", 5, 7.5)
        ]
        assert len(os.listdir(tmp_path)) == 1


def test_file_of_a_server_is_whole_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rename = fs.rename

    def renaming(old: Path, new: Path) -> None:
        seen.append((running_servers(tmp_path), json.loads(old.read_text())["url"]))
        assert old.stat().st_mode & 0o777 == 0o600
        rename(old, new)

    monkeypatch.setattr(fs, "rename", renaming)

    with announced(tmp_path, Serving("http://127.0.0.1:2/cache")):
        assert len(running_servers(tmp_path)) == 1

    assert seen == [([], "http://127.0.0.1:2/cache")]


def test_what_servers_leave_in_the_folder_counts_against_the_budget(store: Store) -> None:
    before = {one.name for one in store.root.iterdir()}
    AdminToken(store.root)
    with announced(store.root, Serving("http://127.0.0.1:2/cache")):
        assert len({one.name for one in store.root.iterdir() if is_small(one.name)} - before) == 2
        used = subprocess.run(["du", "-sk", store.root], capture_output=True, check=True, text=True)

        assert store.stats().usage.total >= int(used.stdout.split()[0]) * 1024


# ---- origins and the key, request by request ---------------------------------------------------


def status_of(guard: ModelGuard, method: str = "POST", path: str = "", **headers: str) -> int:
    message = Message()
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    try:
        guard.check(Request(method, path or "/v1/chat/completions", message))
    except RefusedError as refused:
        return refused.status
    return 0


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 0),
        ("https://localhost", 0),
        ("HTTP://LOCALHOST:1", 0),
        ("http://127.0.0.1:8080", 0),
        ("http://[::1]:8080", 0),
        ("null", 403),
        ("", 403),
        ("http://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("http://localhost@evil.example", 403),
        ("http://127.0.0.1.evil.example", 403),
        ("http://localhost:3000/x", 403),
        ("http://localhost:3000 http://evil.example", 403),
        ("file://localhost", 403),
        ("chrome-extension://localhost", 403),
        ("localhost", 403),
        ("http://192.168.1.7", 403),
        ("loopback", 403),
    ],
)
def test_by_default_only_pages_of_this_machine_may_ask(origin: str, status: int) -> None:
    guard = ModelGuard()

    for method in ("GET", "POST", "OPTIONS"):
        assert status_of(guard, method, Origin=origin) == status
    assert ("Access-Control-Allow-Origin" in guard.cors_headers(origin)) == (status == 0)


def test_origins_that_are_named_are_obeyed() -> None:
    some = ModelGuard(["https://chat.example", "http://LAN.example:3000/"])
    every = ModelGuard(["*"])

    assert status_of(some, Origin="https://chat.example") == 0
    assert status_of(some, Origin="http://lan.example:3000") == 0
    assert status_of(some, Origin="http://chat.example") == 403
    assert status_of(some, Origin="http://localhost:3000") == 403
    assert status_of(some) == 0
    assert status_of(every, Origin="http://evil.example") == status_of(every, Origin="null") == 0
    assert every.cors_headers(None)["Access-Control-Allow-Origin"] == "*"
    assert some.cors_headers(None) == {"Vary": "Origin"}
    assert status_of(ModelGuard(), Sec_Fetch_Site="cross-site") == 403
    assert status_of(ModelGuard(["loopback", "https://chat.example"]), Origin="http://[::1]") == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer k3y"}, 0),
        ({"Authorization": "bearer k3y "}, 0),
        ({"x_api_key": "k3y"}, 0),
        ({"x_api_key": "k3y", "Authorization": "Bearer not-needed"}, 0),
        ({"Authorization": "k3y"}, 401),
        ({"Authorization": "Basic k3y"}, 401),
        ({"Authorization": "Bearer k3"}, 401),
        ({"x_api_key": ""}, 401),
        ({}, 401),
    ],
)
def test_api_key_is_asked_for_everywhere_but_for_health(
    headers: dict[str, str], status: int
) -> None:
    guard = ModelGuard(api_key="k3y")

    for path in ("/v1/chat/completions", "/chat/completions", "/v1/completions", "/v1/models", "/"):
        for method in ("GET", "POST", "DELETE"):
            assert status_of(guard, method, path, **headers) == status
    assert status_of(guard, "GET", "/health") == 0
    # A browser sends no secrets ahead of a request.
    assert status_of(guard, "OPTIONS", "/v1/chat/completions") == 0


def test_loopback_is_told_from_other_addresses() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.1"]))
    others = ["", "0.0.0.0", "::", "192.168.1.7", "mac.lan", "fe80::1%en0"]
    assert not any(map(is_loopback, others))


# ---- a real server -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("access")
    with running(model, folder / "store", folder, min_free_bytes=0) as started:
        assert started.chat(("system", "You answer. " * 20), ("user", "Hi")).status_code == 200
        assert started.request("POST", "/v1/cache/flush").status_code == 200
        yield started


def printed_link(server: ServerProcess) -> tuple[str, str]:
    found = LINK.search(server.log.read_text())
    assert found is not None, server.log.read_text()
    return found[1], found[2]


def test_the_link_that_a_server_prints_opens_its_admin_api(server: ServerProcess) -> None:
    url, token = printed_link(server)

    assert url == f"{server.url}/cache"
    assert requests.get(url, timeout=20).status_code == 200
    said = requests.get(
        f"{server.url}/v1/cache/entries",
        headers={"Authorization": f"Bearer {token}"},
        timeout=20,
    )
    assert said.json()["entries"]
    assert server.log.read_text().count(token) == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/cache/entries"),
        ("GET", "/v1/cache/tree"),
        ("GET", "/v1/cache/stats"),
        ("POST", "/v1/cache/flush"),
        ("POST", "/v1/cache/explain"),
        ("POST", "/v1/cache/warm"),
        ("PUT", "/v1/cache/entries/0/pin"),
        ("DELETE", "/v1/cache/entries/0"),
    ],
)
def test_a_script_from_before_the_token_is_told_of_it(
    server: ServerProcess, method: str, path: str
) -> None:
    answer = server.request(method, path, with_token=False)

    assert answer.status_code == 401
    said = answer.json()["error"]
    assert "Authorization: Bearer" in said
    assert "persist-cache page" in said
    assert said.count(". ") == 0
    assert server.token not in answer.text


def test_page_metrics_and_health_need_no_token_and_hold_none(server: ServerProcess) -> None:
    for path in ("/cache", "/metrics", "/health"):
        answer = server.request("GET", path)
        assert answer.status_code == 200
        assert server.token not in answer.text
    assert "You answer" not in server.request("GET", "/metrics").text


def test_page_command_prints_the_link_of_the_running_server(
    server: ServerProcess, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = runner(server.store, capfd)
    link = "#token=".join(printed_link(server))

    assert run("page").out == f"{link}\n"
    assert server.process is not None
    assert run("page", "--json").json == [
        {
            "url": f"{server.url}/cache",
            "link": link,
            "model": str(model.resolve()),
            "pid": server.process.pid,
        }
    ]
    elsewhere = run("page", "--url", "https://box.lan/cache").out
    assert elsewhere == f"https://box.lan/cache#token={server.token}\n"
    assert run("page", "--url", "box.lan").status == 2
    nothing = runner(tmp_path / "none", capfd)("page")
    assert nothing.status == 3
    assert "No server runs" in nothing.sentence
    assert not (tmp_path / "none").exists()


def test_foreign_pages_are_refused_before_anything_is_computed(server: ServerProcess) -> None:
    before = server.get("/v1/cache/stats")["recent"]

    for method, path, body in (
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/completions", {"prompt": "Hello", "max_tokens": 2}),
        ("POST", "/v1/chat/completions", {**CHAT, "model": "no/such-model"}),
        ("OPTIONS", "/v1/chat/completions", None),
        ("GET", "/v1/models", None),
        ("GET", "/health", None),
    ):
        answer = server.request(method, path, json=body, headers=FOREIGN)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "origin_not_allowed"
        assert "--allowed-origins" in answer.json()["error"]["message"]
        assert not any(name.lower().startswith("access-control") for name in answer.headers)
    assert server.get("/v1/cache/stats")["recent"] == before
    assert server.get("/health")["status"] == "ok"


def test_pages_of_this_machine_may_read_where_the_cache_came_from(server: ServerProcess) -> None:
    origin = {"Origin": "http://localhost:3000"}

    preflight = server.request("OPTIONS", "/v1/chat/completions", headers=origin)
    answer = server.request("POST", "/v1/chat/completions", json=CHAT, headers=origin)

    assert preflight.status_code == 204
    assert "authorization" in preflight.headers["Access-Control-Allow-Headers"].lower()
    for said in (preflight, answer):
        assert said.headers["Access-Control-Allow-Origin"] == origin["Origin"]
        exposed = said.headers["Access-Control-Expose-Headers"]
        assert exposed == "x-persist-cache, x-persist-cache-ignored"
    assert answer.headers["x-persist-cache"]
    assert server.request("POST", "/v1/chat/completions", json=CHAT).status_code == 200


def test_api_key_and_origins_of_the_command_line(model: Path, tmp_path: Path) -> None:
    flags = ("--allowed-origins", "https://chat.example")
    with running(
        model, tmp_path / "store", tmp_path, flags=flags, api_key="k3y", min_free_bytes=0
    ) as server:
        none = server.request("POST", "/v1/chat/completions", json=CHAT)
        models = server.request("GET", "/v1/models")
        page = {"Origin": "https://chat.example", "x-api-key": "k3y"}
        right = server.request("POST", "/v1/chat/completions", json=CHAT, headers=page)
        local = server.request("OPTIONS", "/v1/models", headers={"Origin": "http://localhost"})

        assert none.status_code == models.status_code == 401
        assert none.json()["error"]["code"] == "invalid_api_key"
        assert none.json()["error"]["type"] == "invalid_request_error"
        assert "x-api-key" in none.json()["error"]["message"]
        assert right.status_code == 200
        assert right.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert local.status_code == 403
        assert server.request("GET", "/health").status_code == 200
        # The key opens no more than it says.
        key = {"Authorization": "Bearer k3y"}
        assert server.request("GET", "/v1/cache/stats", headers=key).status_code == 401
        assert server.request("GET", "/v1/cache/stats").status_code == 200


def test_what_the_threat_model_says_is_asked_for(model: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "security.md").read_text()
    for heading in ("Threat model", "Behind a reverse proxy", "Shared machines and networks"):
        assert f"\n## {heading}\n" in text
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| ")][1:]
    with running(model, tmp_path / "store", tmp_path, api_key="k3y", min_free_bytes=0) as server:
        asked: dict[str, str] = {}
        for paths, asks_for, pages in rows:
            for path in re.findall(r"`(/[^`]*)`", paths):
                asked[path] = asks_for.strip().split(",")[0]
                path = path.replace("…", "stats")
                body = CHAT if path.endswith("completions") else None
                method = "POST" if body else "GET"
                without = server.request(method, path, json=body, with_token=False)
                page = server.request(method, path, json=body, headers=FOREIGN)
                local = server.request(
                    method,
                    path,
                    json=body,
                    headers={"Origin": "http://localhost:3000", "x-api-key": "k3y"},
                )

                assert without.status_code == (200 if asks_for.strip() == "nothing" else 401), path
                assert page.status_code in (401, 403), path
                assert (local.status_code == 200) == ("allowed origins" in pages), path

    assert asked == {
        "/v1/cache/…": "the admin token",
        "/cache": "nothing",
        "/metrics": "nothing",
        "/health": "nothing",
        "/v1/chat/completions": "the API key",
        "/v1/models": "the API key",
    }


def test_without_a_store_the_token_lies_where_the_store_would(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with running(None, tmp_path / "store", tmp_path, persist=()) as server:
        assert server.request("GET", "/v1/cache/stats").json()["store"] is None
        found = sorted(path.name for path in (tmp_path / "store").iterdir())
        run = runner(tmp_path / "store", capfd)

        assert run("page").out == "#token=".join(printed_link(server)) + "\n"
        assert run("list", "--json").json == []
    assert found[0] == TOKEN_FILE
    assert len(found) == 2
    assert [path.name for path in (tmp_path / "store").iterdir()] == [TOKEN_FILE]


def test_serving_beyond_loopback_without_a_key_is_warned_of(tmp_path: Path) -> None:
    for host, key, warns in (("0.0.0.0", None, True), ("0.0.0.0", "k", False)):
        flags = ("--host", host)
        folder = tmp_path / f"{warns}"
        with running(None, folder, folder, flags=flags, api_key=key, persist=()) as server:
            assert (f"listening on {host} without --api-key" in server.log.read_text()) == warns
            assert printed_link(server)[0] == f"{server.url}/cache"


@pytest.mark.parametrize("secret", ["", " ", "a b ", "é", "a\nb"])
@pytest.mark.parametrize("option", ["--admin-token", "--api-key"])
def test_secrets_that_no_header_can_carry_are_refused(
    option: str, secret: str, tmp_path: Path
) -> None:
    done = prepared_script(tmp_path / "store", "serve", option, secret)

    assert done.status == 2
    assert option in done.sentence
    assert not (tmp_path / "store").exists()


# ---- behind a proxy ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "site", "status"),
    [
        ("https://box.example", "same-origin", 0),
        ("http://127.0.0.1:8080", None, 0),
        ("https://box.example", None, 403),
        ("https://box.example", "same-site", 403),
        ("https://evil.example", "cross-site", 403),
        ("null", "same-origin", 403),
    ],
)
def test_the_page_behind_a_proxy_may_change_what_is_stored(
    origin: str, site: str | None, status: int
) -> None:
    """nginx rewrites Host, so that a browser's Origin is another; the browser says it is not."""
    headers = Message()
    headers["Host"] = "127.0.0.1:8080"
    headers["Authorization"] = "Bearer t0ken"
    headers["Origin"] = origin
    if site is not None:
        headers["Sec-Fetch-Site"] = site
    guard = Guard(lambda: "t0ken", "127.0.0.1")

    try:
        guard.check(Request("DELETE", "/v1/cache/entries/3fa2b1", headers))
        said = 0
    except RefusedError as refused:
        said = refused.status

    assert said == status


NGINX_CONF = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {url}; }} }}
}}
"""


@contextlib.contextmanager
def proxied(server: ServerProcess, folder: Path) -> Iterator[str]:
    """nginx before a server, with `proxy_pass` and nothing else."""
    port = free_port()
    conf = folder / "nginx.conf"
    conf.write_text(NGINX_CONF.format(folder=folder, port=port, url=server.url))
    assert NGINX is not None
    with (folder / "nginx.log").open("wb") as log:
        nginx = subprocess.Popen([NGINX, "-c", str(conf), "-p", str(folder)], stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{url}/health", timeout=0.1).status_code == 200:
                    break
            assert nginx.poll() is None, (folder / "nginx.log").read_text()
        yield url
    finally:
        nginx.terminate()
        nginx.wait(20)


@pytest.mark.skipif(
    NGINX is None, reason="NGINX IS MISSING: no proxy was tried (apt install nginx-light)"
)
def test_behind_a_plain_proxy_nobody_gets_in_without_the_token(
    server: ServerProcess, tmp_path: Path
) -> None:
    entry = server.get("/v1/cache/entries")["entries"][0]["id"]
    with proxied(server, tmp_path) as url:
        for method, path in (
            ("GET", "/v1/cache/entries"),
            ("GET", f"/v1/cache/entries/{entry}"),
            ("DELETE", f"/v1/cache/entries/{entry}"),
            ("PUT", f"/v1/cache/entries/{entry}/pin"),
            ("DELETE", f"/v1/cache/entries/{entry}/pin"),
            ("POST", "/v1/cache/explain"),
            ("POST", "/v1/cache/warm"),
            ("POST", "/v1/cache/flush"),
        ):
            for headers in ({}, {"Host": "localhost"}, {"X-Forwarded-For": "127.0.0.1"}):
                body = CHAT if method == "POST" else None
                answer = requests.request(
                    method, url + path, json=body, headers=headers, timeout=20
                )
                assert answer.status_code == 401, (method, path)
        secret = {"Authorization": f"Bearer {server.token}"}
        listed = requests.get(f"{url}/v1/cache/entries", headers=secret, timeout=20)
        chat = requests.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60)
        foreign = requests.post(
            f"{url}/v1/chat/completions", json=CHAT, headers=FOREIGN, timeout=20
        )

    assert entry in {one["id"] for one in listed.json()["entries"]}
    assert chat.status_code == 200
    assert foreign.status_code == 403
