"""What a new user stumbles over is answered by a sentence that says what to do."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
from rich.progress import Progress

from persist_cache.cache.stats import Fetch
from persist_cache.doctor import judgement
from persist_cache.doctor.facts import ModelCache
from persist_cache.server.recent.records import Outcome
from persist_cache.server.told import line_of
from persist_cache_cli import blas
from persist_cache_cli.commands import demo
from persist_cache_cli.demo import openblas
from persist_cache_cli.prompts import read_text
from persist_cache_cli.store_access import command_line
from tests.cli import Run, prepared_script, runner
from tests.server_process import ServerProcess
from tests.tiny_models import build_model_dir
from tests.waiting import until


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(tmp_path / "store", capfd)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("model") / "tiny")


# ---- arguments -----------------------------------------------------------------------------------


def test_prompt_that_names_a_file_is_taken_as_text_with_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Be kind.")

    assert read_text(str(prompt), "--system") == str(prompt)
    assert f"write --system @{prompt}" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["Be kind.", "two\nlines", "x" * 5_000, "nul\0"])
def test_no_other_prompt_is_warned_about(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert read_text(text, "--system") == text
    assert capfd.readouterr().err == ""


def test_folder_is_no_bundle(run: Run) -> None:
    done = run("import", ".")

    assert done.status == 2
    assert "is a folder; name the file" in done.sentence


def test_explain_of_no_tokens_says_so(model: Path, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]")

    for tokens, says in ((tmp_path / "none.json", "holds no token"), ("[]", "takes a file")):
        done = prepared_script(tmp_path / "store", "explain", "--model", model, "--tokens", tokens)

        assert done.status == 2
        assert says in done.sentence


@pytest.mark.parametrize(("name", "says"), [("nope", "nope"), ("org/nope", "hf download org/nope")])
def test_doctor_says_once_that_a_model_is_not_here(run: Run, name: str, says: str) -> None:
    done = run("doctor", "--model", name)

    (problem,) = re.findall(r"problem: (.*)", done.out)
    assert done.status == 1
    assert problem.startswith(f"The model {name!r} cannot be identified: no such folder")
    assert says in problem
    assert "template" not in done.out.partition("\n\n")[0]


def test_model_that_is_known_and_cannot_be_loaded_is_not_called_unknown() -> None:
    (finding,) = judgement.judge_model(ModelCache("m", "ab", "Model type x not supported."))

    assert finding.message == "The model 'm': Model type x not supported."


# ---- a slow BLAS ---------------------------------------------------------------------------------


@pytest.fixture
def plain_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain install on Linux: MLX's own BLAS, and no other one preloaded."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(blas, "_has_reference_blas", lambda: True)
    monkeypatch.setattr(blas, "_is_preloaded", lambda: False)


@pytest.mark.usefixtures("plain_linux")
def test_slow_blas_is_told_with_the_command_that_installs_a_fast_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openblas, "find", lambda: None)

    assert f"install --no-deps {blas.WHEEL}`" in blas.advice("warm …")


@pytest.mark.usefixtures("plain_linux")
def test_slow_blas_is_told_with_the_command_that_uses_the_one_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables = {"LD_PRELOAD": "/lib/libopenblas.so.0", "LD_LIBRARY_PATH": "/lib"}
    monkeypatch.setattr(openblas, "find", lambda: (Path("/lib"), variables))

    said = blas.advice("serve …")

    assert "LD_PRELOAD=/lib/libopenblas.so.0 LD_LIBRARY_PATH=/lib persist-cache serve …" in said


@pytest.mark.usefixtures("plain_linux")
@pytest.mark.parametrize("change", ["_is_preloaded", "_has_reference_blas", "darwin"])
def test_nothing_is_told_where_nothing_is_to_be_gained(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "darwin":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(blas, change, lambda: change == "_is_preloaded")

    assert blas.advice("doctor") == ""


@pytest.mark.usefixtures("plain_linux")
def test_doctor_tells_of_a_slow_blas(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openblas, "find", lambda: None)

    said = run("doctor", "--json").json["findings"]

    assert any(blas.WHEEL in one["message"] and one["level"] == "note" for one in said)


# ---- the server's log ----------------------------------------------------------------------------


def outcome(**changes: object) -> Outcome:
    said: dict[str, object] = {
        "state": "done",
        "tokens": range(1919),
        "model": None,
        "fetch": Fetch("disk", 1904, "what is stored goes on differently"),
        "output_tokens": 10,
        "first_token_s": 0.5,
        "total_s": 0.98,
    }
    return Outcome(**{**said, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {},
            "/x: disk hit, 1,904 of 1,919 prompt tokens reused, 10 generated, first after 0.50 s, "
            "0.98 s; what is stored goes on differently",
        ),
        (
            {"fetch": Fetch("miss", 0, "nothing is stored for this model")},
            "/x: miss, 1,919 prompt tokens computed, 10 generated, first after 0.50 s, 0.98 s; "
            "nothing is stored for this model",
        ),
        (
            {"fetch": None, "tokens": (), "first_token_s": None, "state": "failed"},
            "/x: it did not come to a prompt, 10 generated, 0.98 s; it failed",
        ),
        (
            {"repaired": ("date",), "state": "left", "fetch": Fetch("memory", 5, "")},
            "/x: memory hit, 5 of 1,919 prompt tokens reused, 10 generated, first after 0.50 s, "
            "0.98 s; repaired: date; its client left",
        ),
    ],
)
def test_line_of_a_request(changes: dict[str, object], says: str) -> None:
    assert line_of("/x", outcome(**changes)) == says


def test_server_logs_one_line_a_request_without_its_words(model: Path, tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "xylophone"}], "max_tokens": 3}
    with ServerProcess(model, tmp_path / "store", tmp_path) as server:
        for stream in (False, True):
            answer = server.request("POST", "/v1/chat/completions", json={**body, "stream": stream})
            assert answer.status_code == 200
        server.request("GET", "/v1/models")

        def lines() -> list[str]:
            text = server.log.read_text()
            return re.findall(r"/v1/chat/completions: (?:miss|\w+ hit), .*generated.*", text)

        until(lambda: len(lines()) == 2)

    assert lines()[0].startswith("/v1/chat/completions: miss, ")
    assert "/v1/chat/completions: memory hit" in lines()[1]
    assert "xylophone" not in server.log.read_text()


def test_a_command_to_be_copied_names_only_a_store_that_was_named(tmp_path: Path) -> None:
    assert command_line(None, "serve") == "persist-cache serve"
    assert command_line("/my store", "serve") == "persist-cache --store '/my store' serve"


def test_settings_fit_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from persist_cache_cli.commands import config

    monkeypatch.setattr(config, "terminal_width", lambda: 80)
    monkeypatch.setenv("PERSIST_CACHE_ADMIN_TOKEN", "secret")

    heading, *lines = run("--store", f"/{'far ' * 30}", "config", "show").out.splitlines()[1:]

    assert heading.split() == ["setting", "value", "from"]
    assert max(map(len, lines)) <= 80
    assert lines[0].endswith("flag --store")
    assert any(one.endswith("environment PERSIST_CACHE_ADMIN_TOKEN") for one in lines)


# ---- the demo ------------------------------------------------------------------------------------


def test_demo_says_where_its_model_is_and_that_its_store_is_gone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / f"my {'models' * 20}"
    model.mkdir()
    monkeypatch.setattr(demo, "smollm2", lambda dtype, progress: model)
    monkeypatch.setattr(demo, "_run", lambda console, path, store, *more: not store.mkdir())

    done = run("demo")

    assert done.status == 0, done.err
    assert "the store: " in done.out
    assert "It was temporary, and is gone." in done.out
    assert f"\n  persist-cache serve --model '{model}'\n  rm -r '{model}'\n" in done.out


def test_demo_says_what_was_kept_and_nothing_of_a_model_that_it_was_given(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_run", lambda console, path, store, *more: not store.mkdir())

    done = run("demo", "--model", "any", "--keep", tmp_path / "kept")

    assert done.status == 0, done.err
    assert f"{tmp_path / 'kept'}: " in done.out
    assert "rm -r" not in done.out


def test_demo_does_not_stand_at_the_end_of_a_full_bar_while_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = [
        {"event": "loaded", "seconds": 1.0},
        {"event": "prefill", "done": 9, "total": 9},
        {"event": "answering"},
        {"event": "answer", "text": "Yes."},
    ]
    worker = mock.MagicMock(stdout=[json.dumps(one) for one in said])
    worker.wait.return_value = 0
    monkeypatch.setattr(demo, "_worker", lambda *given: contextlib.nullcontext(worker))
    said_so: list[tuple[str, float | None]] = []

    class Bars(Progress):
        def refresh(self) -> None:
            said_so.extend((one.description, one.total) for one in self.tasks)

    monkeypatch.setattr(demo, "bars", lambda console: Bars(auto_refresh=False))
    console = mock.Mock()

    demo._work(console, "One", {"chats": [[{"content": "Well?"}]]}, {})

    assert ("One: answering", None) in said_so
    assert "Yes." in console.print.call_args.args[0]
