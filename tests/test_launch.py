"""`persist-cache launch`: an agent gets what sends it to our server, and is itself in all else."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from persist_cache.server import needed
from persist_cache.server.discovery import running_servers
from persist_cache_cli.launch.clients import CLIENTS, Served, setup_of
from persist_cache_cli.launch.settings import overruled
from tests.cli import SCRIPT, Done, script
from tests.server_process import ServerProcess, free_port
from tests.tiny_models import build_model_dir
from tests.waiting import until

LAUNCHED = [name for name, client in CLIENTS.items() if client.is_launched]
STUB = f"""#!{sys.executable}
import json, os, signal, sys
ended = []
signal.signal(signal.SIGUSR1, lambda *_: ended.append(42))
with open(os.environ["STUB_OUT"] + ".new", "w") as out:
    json.dump({{
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "pid": os.getpid(),
        "parent": os.getppid(),
        "terminal": [os.isatty(fd) for fd in range(3)],
        "stdin": sys.stdin.read() if os.environ["STUB_DOES"] == "read" else "",
    }}, out)
os.rename(out.name, os.environ["STUB_OUT"])
while os.environ["STUB_DOES"] == "wait" and not ended:
    signal.pause()
print("said")
sys.exit(ended[0] if ended else 7)
"""
KEY = "secret-of-the-server"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    with ServerProcess(model, folder / "store", folder, api_key=KEY) as running:
        yield running


class Stub:
    """Executables with the clients' names, which tell what they were started with."""

    def __init__(self, folder: Path) -> None:
        self.said = folder / "said.json"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        programs = folder / "bin"
        programs.mkdir()
        for name in CLIENTS:
            (programs / name).write_text(STUB)
            (programs / name).chmod(0o755)
        self.home = folder / "home"
        self.home.mkdir()
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "STUB_OUT": str(self.said),
            "STUB_DOES": "end",
        }

    def launch(self, store: Path, *arguments: object, **more: str) -> Done:
        return script(store, "launch", *arguments, env=self.environment | more)

    @contextlib.contextmanager
    def waiting(
        self, store: Path, *arguments: object, said: str
    ) -> Iterator[subprocess.Popen[str]]:
        """A client that waits for a signal, once it runs; `said` is what it tells."""
        self.said.unlink(missing_ok=True)
        environment = self.environment | {"STUB_DOES": "wait", "STUB_OUT": f"{self.said}-{said}"}
        process = subprocess.Popen(
            [SCRIPT, "--store", store, "launch", *map(str, arguments)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out = Path(environment["STUB_OUT"])
            until(lambda: out.exists() or process.poll() is not None)
            assert process.poll() is None, process.communicate()
            yield process
        finally:
            process.kill()
            process.communicate()

    def told(self, of: str = "") -> dict[str, Any]:
        path = Path(f"{self.said}-{of}") if of else self.said
        found: dict[str, Any] = json.loads(path.read_text())
        return found


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    return Stub(tmp_path)


# ---- what each client needs ----------------------------------------------------------------------

SERVED = Served("http://127.0.0.1:8080", "org/Some-Model-4bit", 32_768)


def test_claude_code_gets_the_server_the_model_for_each_role_and_no_key_of_the_users() -> None:
    setup = setup_of(CLIENTS["claude"], SERVED, {"ANTHROPIC_API_KEY": "the user's"})

    assert setup.environment["ANTHROPIC_BASE_URL"] == SERVED.url
    assert {"ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK"} <= set(setup.unset)
    roles = [name for name in setup.environment if name.endswith("_MODEL")]
    assert len(roles) == 6
    assert {setup.environment[role] for role in roles} == {SERVED.model}
    assert setup.environment["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "32768"
    assert setup.environment["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "8192"


def test_claude_codes_own_prefix_breakers_are_off_where_nothing_is_lost() -> None:
    setup = setup_of(CLIENTS["claude"], SERVED, {})

    assert setup.environment["CLAUDE_CODE_ATTRIBUTION_HEADER"] == "0"
    assert setup.environment["CLAUDE_CODE_TOTAL_TOKENS_REMINDER"] == "off"
    assert setup.arguments == ()
    without_a_person = setup_of(CLIENTS["claude"], SERVED, {}, ["-p", "Hello"])
    assert without_a_person.arguments == ("--exclude-dynamic-system-prompt-sections",)
    assert "CLAUDE_CODE_DISABLE_GIT_INSTRUCTIONS" not in setup.environment


def test_codex_gets_overrides_that_are_toml() -> None:
    import tomllib

    odd = Served("http://127.0.0.1:1", '/models/a "quoted" \\ näme', 4096, api_key=KEY)
    setup = setup_of(CLIENTS["codex"], odd, {})

    assert setup.arguments[::2] == ("-c",) * 4
    assert tomllib.loads("\n".join(setup.arguments[1::2])) == {
        "model": odd.model,
        "model_provider": "persist_cache",
        "model_providers": {
            "persist_cache": {
                "name": "persist-cache",
                "base_url": "http://127.0.0.1:1/v1",
                "wire_api": "responses",
                "env_key": "PERSIST_CACHE_API_KEY",
            }
        },
        "model_context_window": 4096,
    }
    assert not any(KEY in word for word in setup.arguments), "arguments can be read by others"


def test_opencode_gets_ours_beside_what_the_user_has_in_the_same_variable() -> None:
    theirs = {"theme": "dark", "model": "other/x", "provider": {"other": {"name": "Other"}}}
    given = {"OPENCODE_CONFIG_CONTENT": json.dumps(theirs)}

    said = setup_of(CLIENTS["opencode"], SERVED, given).environment["OPENCODE_CONFIG_CONTENT"]
    config = json.loads(said)

    assert config["theme"] == "dark"
    assert config["model"] == config["small_model"] == "persist-cache/org/Some-Model-4bit"
    assert set(config["provider"]) == {"other", "persist-cache"}
    (named,) = config["provider"]["persist-cache"]["models"].values()
    assert named["limit"] == {"context": 32_768, "output": 8192}


@pytest.mark.parametrize("context", [None, 2048, 1_000_000])
@pytest.mark.parametrize("name", CLIENTS)
def test_a_context_is_told_where_it_is_known_only(name: str, context: int | None) -> None:
    setup = setup_of(CLIENTS[name], Served(SERVED.url, SERVED.model, context), {})
    told = json.dumps([setup.arguments, setup.environment, setup.files], default=dict)

    assert "None" not in told
    assert "null" not in told
    if name != "qwen":  # which can be told nowhere but in the user's own settings
        assert (str(context) in told) == (context is not None)


@pytest.mark.parametrize("known", ["", "intern.example", "127.0.0.1", "*"])
def test_no_proxy_is_asked_for_a_server_of_this_machine(known: str) -> None:
    given = {"HTTP_PROXY": "http://proxy.example:3128", "NO_PROXY": known}
    said = {**given, **setup_of(CLIENTS["codex"], SERVED, given).environment}

    assert "127.0.0.1" in said["NO_PROXY"].split(",") or known == "*"
    assert known in said["NO_PROXY"]


@pytest.mark.parametrize(
    "place", ["home/.claude/settings.json", ".claude/settings.json", ".claude/settings.local.json"]
)
def test_a_settings_file_that_wins_over_the_environment_is_named(
    place: str, tmp_path: Path
) -> None:
    setup = setup_of(CLIENTS["claude"], SERVED, {})
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    env = {
        "ANTHROPIC_BASE_URL": "https://gateway.example",
        "ANTHROPIC_API_KEY": "sk-1",
        "CLAUDE_CODE_ATTRIBUTION_HEADER": 0,
        "EDITOR": "vi",
    }
    path.write_text(json.dumps({"env": env}))
    before = path.read_bytes()

    (said,) = overruled(setup.environment, setup.unset, {"HOME": str(tmp_path / "home")}, tmp_path)

    assert str(path) in said
    assert "ANTHROPIC_API_KEY, ANTHROPIC_BASE_URL in" in said, "those that differ, and no others"
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{", '{"env": 3}', '{"env": {"A": null}}'])
def test_settings_that_cannot_be_read_are_no_warning(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(text)

    assert not overruled({"A": "1"}, (), {"CLAUDE_CONFIG_DIR": str(tmp_path)}, tmp_path)


# ---- a client with a server that runs ------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_is_printed_starts_the_client_as_launch_does(
    name: str, server: ServerProcess, stub: Stub
) -> None:
    words = ["exec", "say $HOME 'x'", "--model-of-its-own"]
    mine = {"PERSIST_CACHE_API_KEY": KEY, "ANTHROPIC_API_KEY": "sk-of-the-user"}
    printed = stub.launch(server.store, name, "--print", "--", *words, **mine)
    assert printed.status == 0, printed.err
    assert KEY not in printed.out

    launched = stub.launch(server.store, name, "--", *words, **mine)
    by_launch = stub.told()
    subprocess.run(["sh", "-c", printed.out], env=os.environ | stub.environment | mine, check=False)
    by_hand = stub.told()

    assert (launched.status, launched.out, launched.err) == (7, "said\n", "")
    assert by_launch["arguments"][-3:] == words
    assert by_launch["arguments"] == by_hand["arguments"]
    own = ("_", "PWD", "OLDPWD", "SHLVL", "LC_CTYPE")
    for told in (by_launch, by_hand):
        for variable in own:
            told["environment"].pop(variable, None)
    assert by_launch["environment"] == by_hand["environment"]
    assert server.url in json.dumps([by_launch["arguments"], by_launch["environment"]])
    assert ("ANTHROPIC_API_KEY" in by_launch["environment"]) == (name != "claude")


def test_the_context_told_is_that_of_the_server(server: ServerProcess, stub: Stub) -> None:
    server.chat(("user", "Hello"), headers={"Authorization": f"Bearer {KEY}"})
    said = stub.launch(server.store, "codex", "--print", "--json", PERSIST_CACHE_API_KEY=KEY)

    shown = json.loads(said.out)
    assert shown["context_tokens"] == 4096
    assert shown["running"]
    assert shown["url"] == server.url
    (listed, *_) = server.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"})["data"]
    assert (listed["id"], listed["max_model_len"]) == (shown["model"], 4096)


@pytest.mark.parametrize("name", ["codex", "opencode"])
def test_launch_becomes_the_client_with_its_signals_terminal_and_status(
    name: str, server: ServerProcess, stub: Stub
) -> None:
    main, terminal = pty.openpty()
    with stub_in_terminal(stub, server.store, name, terminal) as process:
        until(stub.said.exists)
        told = stub.told()
        assert told["pid"] == process.pid
        assert told["parent"] == os.getpid()
        assert told["terminal"] == [True, True, True]

        process.send_signal(signal.SIGUSR1)

        assert process.wait(60) == 42
    os.close(main)
    os.close(terminal)


@contextlib.contextmanager
def stub_in_terminal(
    stub: Stub, store: Path, name: str, terminal: int
) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **stub.environment, "STUB_DOES": "wait"}
    with subprocess.Popen(
        [SCRIPT, "--store", store, "launch", name],
        env=environment | {"PERSIST_CACHE_API_KEY": KEY},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_client_ignores_no_signals_that_python_does(server: ServerProcess, stub: Stub) -> None:
    program = Path(stub.environment["PATH"].partition(":")[0], "codex")
    program.write_text("#!/bin/sh\nyes | head -n 1\n")

    done = stub.launch(server.store, "codex", PERSIST_CACHE_API_KEY=KEY)

    assert (done.out, done.err) == ("y\n", ""), "else `yes` complains of a broken pipe"


def test_standard_input_is_the_clients(server: ServerProcess, stub: Stub) -> None:
    script(
        server.store,
        "launch",
        "codex",
        env={**stub.environment, "STUB_DOES": "read", "PERSIST_CACHE_API_KEY": KEY},
        input="given",
    )

    assert stub.told()["stdin"] == "given"


# ---- a server of its own -------------------------------------------------------------------------


def test_a_server_is_started_shared_and_ends_with_its_last_client(
    model: Path, tmp_path: Path, stub: Stub
) -> None:
    store, port = tmp_path / "store", free_port()
    with stub.waiting(store, "codex", "--model", model, "--port", port, said="1") as first:
        (serving,) = running_servers(store)
        with stub.waiting(store, "opencode", said="2") as second:
            assert f"http://127.0.0.1:{port}/v1" in json.dumps(stub.told("2")["environment"])

            first.send_signal(signal.SIGUSR1)
            assert first.wait(60) == 42
            assert first.stderr is not None
            assert "its log is" in first.stderr.read()
            assert running_servers(store) == [serving], "the other client needs it"

            second.kill()  # how a client ends makes no difference
    until(lambda: not running_servers(store))
    until(lambda: not _lives(serving.pid))
    until(lambda: not list(stub.temporary.iterdir()))


def test_launches_at_once_share_one_server(model: Path, tmp_path: Path, stub: Stub) -> None:
    store = tmp_path / "store"
    words = ("--model", model)
    clients = [stub.waiting(store, name, *words, said=name) for name in ("codex", "opencode")]
    with contextlib.ExitStack() as both:
        for client in clients:
            both.push(client)
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda client: client.__enter__(), clients))

        (serving,) = running_servers(store)
        url = serving.url.removesuffix("/cache")
        assert f"{url}/v1" in json.dumps(stub.told("codex")["arguments"])
        assert f"{url}/v1" in json.dumps(stub.told("opencode")["environment"])
    until(lambda: not _lives(serving.pid))
    until(lambda: not list(stub.temporary.iterdir()))


def _lives(pid: int) -> bool:
    """Whether a process does more than wait for its parent to take note of its end."""
    said = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(said.stdout.strip()) and not said.stdout.startswith("Z")


def test_a_server_that_ends_is_not_used_again(tmp_path: Path) -> None:
    path = tmp_path / "needed"
    path.touch()
    first, second = needed.hold(path), needed.hold(path)
    assert first is not None
    assert second is not None
    assert not needed.is_last(first)
    os.close(second)
    assert needed.is_last(first)

    assert needed.hold(path) is None, "it is about to end"
    path.unlink()
    os.close(first)
    assert needed.hold(path) is None, "and it has"


def test_a_server_is_told_that_nobody_needs_it(tmp_path: Path) -> None:
    path = tmp_path / "needed"
    path.touch()
    held = needed.hold(path)
    assert held is not None
    ended: list[bool] = []
    needed.when_free(path, lambda: ended.append(True))
    assert not ended

    os.close(held)

    until(lambda: ended)


# ---- what cannot be done -------------------------------------------------------------------------


def refused(done: Done, *words: str, status: int = 1) -> None:
    assert done.status == status
    for word in words:
        assert word in done.sentence, done.sentence


def test_a_model_that_cannot_be_loaded_is_said_in_one_sentence_and_leaves_nothing(
    tmp_path: Path, stub: Stub
) -> None:
    done = stub.launch(tmp_path / "store", "codex", "-q", "--model", tmp_path / "none")

    refused(done, str(tmp_path / "none"))
    assert not list(stub.temporary.iterdir())
    assert not stub.said.exists()


def test_a_port_that_is_taken_is_said_and_leaves_nothing(
    server: ServerProcess, model: Path, tmp_path: Path, stub: Stub
) -> None:
    words = ["-q", "--model", model, "--port", server.port]
    done = stub.launch(tmp_path / "store", "codex", *words)

    refused(done, f"Cannot listen on 127.0.0.1:{server.port}", "choose another --port")
    assert not list(stub.temporary.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_that_is_interrupted_leaves_nothing(
    number: signal.Signals, model: Path, tmp_path: Path, stub: Stub
) -> None:
    with subprocess.Popen(
        [SCRIPT, "--store", tmp_path / "store", "launch", "codex", "--model", model],
        env=os.environ | stub.environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert "its log is" in process.stderr.readline()

        process.send_signal(number)

        assert process.wait(60) == 128 + number
    assert not list(stub.temporary.iterdir())
    assert not running_servers(tmp_path / "store")
    assert not stub.said.exists()


def test_a_client_that_is_not_installed_is_named_with_how_to_install_it(
    tmp_path: Path, stub: Stub
) -> None:
    done = stub.launch(tmp_path, "codex", "--model", "m", PATH="/nowhere")

    refused(done, "Codex CLI is not installed", "npm install -g @openai/codex")


def test_without_a_server_and_a_model_it_says_what_to_give(tmp_path: Path, stub: Stub) -> None:
    for words in (["codex"], ["codex", "--print"]):
        refused(stub.launch(tmp_path / "store", *words), "No server with a model runs", "--model")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("key", ["", "wrong"])
def test_another_api_key_is_said(key: str, server: ServerProcess, stub: Stub) -> None:
    environment: Mapping[str, str] = {"PERSIST_CACHE_API_KEY": key} if key else {}

    refused(stub.launch(server.store, "codex", **environment), "asks for its API key", "--api-key")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["codex", "--json"], "--json goes with --print"),
        (["codex", "--port", "0"], "--port"),
        (["codex", "--store", ""], "--store needs a folder"),
        (["codex", "--model", " "], "--model needs a name"),
        (["aider"], "launch aider --print"),
        (["copilot"], "'claude', 'codex', 'opencode'"),
        ([], "CLIENT"),
    ],
)
def test_a_wrong_call_is_one_sentence(words: list[str], said: str, tmp_path: Path) -> None:
    refused(script(tmp_path / "store", "launch", *words), said, status=2)


def test_a_variable_of_opencode_that_cannot_be_added_to_is_said(
    server: ServerProcess, stub: Stub
) -> None:
    more = {"OPENCODE_CONFIG_CONTENT": "{ // a comment", "PERSIST_CACHE_API_KEY": KEY}

    refused(stub.launch(server.store, "opencode", **more), "OPENCODE_CONFIG_CONTENT is set")


def test_what_cannot_be_added_to_is_said_before_a_server_is_started(
    tmp_path: Path, stub: Stub
) -> None:
    words = ("opencode", "--model", tmp_path / "none")

    done = stub.launch(tmp_path / "store", *words, OPENCODE_CONFIG_CONTENT="[")

    refused(done, "OPENCODE_CONFIG_CONTENT is set")
    assert "Starting" not in done.err


def test_what_runs_is_found_by_the_models_other_names(
    server: ServerProcess, model: Path, stub: Stub, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(model)
    for name in (model, tmp_path / "link", f"{model.parent}/../{model.parent.name}/tiny"):
        said = stub.launch(
            server.store, "codex", "--print", "--json", "--model", name, PERSIST_CACHE_API_KEY=KEY
        )
        assert json.loads(said.out)["url"] == server.url
    other = stub.launch(server.store, "codex", "--print", "--json", "--model", "org/other")
    assert json.loads(other.out)["url"] == "http://127.0.0.1:8080"
    assert not json.loads(other.out)["running"]
    shown = stub.launch(server.store, "pi", "--print", "--model", "org/other")
    assert f"--store {server.store} serve --model org/other --port 8080" in shown.out
