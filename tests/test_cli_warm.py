"""`warm` and `explain` as processes, with a tiny model: what scripts and people rely on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from persist_cache import Store, StoreAccessError
from persist_cache.entry import PARTIAL_LABEL
from tests.cli import prepared_script
from tests.tiny_models import build_model_dir

SYSTEM = "You are a helpful assistant who answers in a short sentence. " * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def command(store: Path, *arguments: object) -> list[str]:
    program = [sys.executable, "-m", "persist_cache_cli", "--store", str(store)]
    return [*program, *(str(argument) for argument in arguments)]


def request(path: Path, question: str, system: str = SYSTEM) -> Path:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    path.write_text(json.dumps({"messages": messages}))
    return path


def test_warm_then_explain_says_all_system_tokens(model: Path, store: Path, tmp_path: Path) -> None:
    warmed = prepared_script(
        store, "warm", "--model", model, "--system", SYSTEM, "--label", "mine", "--json"
    )
    assert warmed.status == 0, warmed.err
    (report,) = json.loads(warmed.out)
    chat = request(tmp_path / "chat.json", "Hello!")

    explained = prepared_script(store, "explain", "--model", model, "--messages", chat)

    assert explained.status == 0, explained.err
    assert f"all {report['num_tokens']:,} system tokens" in explained.out
    assert report["id"] in explained.out


def test_date_in_the_system_prompt_is_named_with_both_texts(
    model: Path, store: Path, tmp_path: Path
) -> None:
    """open-webui #28527, sglang #34553: 0 tokens reused, and nobody knows why."""
    prepared_script(store, "warm", "--model", model, "--system", f"Today is Monday. {SYSTEM}")
    chat = request(tmp_path / "chat.json", "Hello!", f"Today is Sunday. {SYSTEM}")

    explained = prepared_script(store, "explain", "--model", model, "--messages", chat, "--json")

    said = json.loads(explained.out)
    assert said["outcome"] == "diverges"
    assert said["divergence"]["before_text"].endswith("Today is ")
    assert said["divergence"]["stored_text"].startswith("Mon")
    assert said["divergence"]["prompt_text"].startswith("Sun")


def test_changed_model_option_is_named_by_field(model: Path, store: Path, tmp_path: Path) -> None:
    prepared_script(store, "warm", "--model", model, "--system", SYSTEM)
    chat = request(tmp_path / "chat.json", "Hello!")

    explained = prepared_script(
        store, "explain", "--model", model, "--messages", chat, "--kv-bits", 8, "--json"
    )

    said = json.loads(explained.out)
    assert said["outcome"] == "other_model"
    assert {"field": "kv_bits", "stored": "null", "now": "8"} in said["changes"]


def test_evicted_prompt_is_explained_as_gone(model: Path, store: Path, tmp_path: Path) -> None:
    prepared_script(store, "warm", "--model", model, "--system", SYSTEM)
    with Store.open(store) as opened:
        opened.evict([entry.id for entry in opened.entries()])
    chat = request(tmp_path / "chat.json", "Hello!")

    explained = prepared_script(store, "explain", "--model", model, "--messages", chat, "--check")

    assert explained.status == 3
    assert "evicted by request" in explained.out


def test_warming_again_computes_nothing_and_sets_the_marks(model: Path, store: Path) -> None:
    prepared_script(store, "warm", "--model", model, "--system", SYSTEM)

    again = prepared_script(
        store, "warm", "--model", model, "--system", SYSTEM, "--pin", "--label", "x", "--ttl", "7d"
    )

    assert "stored already" in again.out
    with Store.open(store) as opened:
        (entry,) = opened.entries()
    assert (entry.pinned, entry.label) == (True, "x")
    assert entry.expires == pytest.approx(time.time() + 7 * 86400, abs=600)


def test_what_is_warmed_belongs_to_a_group_with_all_that_it_begins_with(
    model: Path, store: Path, tmp_path: Path
) -> None:
    chat = request(tmp_path / "chat.json", "Hello!")
    words = ("warm", "--model", model, "--messages", chat, "--group")

    for group in ("team", "other"):
        assert prepared_script(store, *words, group).status == 0
        with Store.open(store) as opened:
            found = {entry.tier.label: entry.groups for entry in opened.entries()}
        wanted = ("team", "other")[: 1 + (group == "other")]
        assert found == {"system": wanted, "user": wanted}


def test_check_reports_and_changes_nothing(model: Path, store: Path) -> None:
    missing = prepared_script(store, "warm", "--model", model, "--system", SYSTEM, "--check")
    prepared_script(store, "warm", "--model", model, "--system", SYSTEM)
    present = prepared_script(store, "warm", "--model", model, "--system", SYSTEM, "--check", "-q")

    assert (missing.status, present.status) == (3, 0)
    assert "0 of" in missing.out
    assert present.out == ""


def test_tools_and_whole_conversations(model: Path, store: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    function = {"name": "clock", "description": "Tells the time.", "parameters": {}}
    tools.write_text(json.dumps([{"type": "function", "function": function}]))
    chat = request(tmp_path / "chat.json", "What time is it?")

    done = prepared_script(
        store, "warm", "--model", model, "--messages", chat, "--tools", tools, "--json"
    )
    explained = prepared_script(
        store, "explain", "--model", model, "--messages", chat, "--tools", tools, "--json"
    )

    (report,) = json.loads(done.out)
    said = json.loads(explained.out)
    assert report["tier"] == "user"
    assert (said["outcome"], said["cached_tokens"]) == ("hit", report["num_tokens"])


def test_manifest_warms_several_prompts(model: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(SYSTEM)
    manifest = tmp_path / "prompts.toml"
    manifest.write_text(
        f'[[prompt]]\nmodel = "{model}"\nsystem = "@one.txt"\nlabel = "one"\npin = true\n'
        f'[[prompt]]\nmodel = "{model}"\nsystem = "Another one. {SYSTEM}"\nttl = "1h"\n'
    )

    before = prepared_script(store, "warm", "--manifest", manifest, "--check", "--json")
    done = prepared_script(store, "warm", "--manifest", manifest, "--json")
    after = prepared_script(store, "warm", "--manifest", manifest, "--check", "--json")

    assert done.status == 0, done.err
    assert (before.status, after.status) == (3, 0)
    assert [report["missing_tokens"] for report in json.loads(after.out)] == [0, 0]
    with Store.open(store) as opened:
        assert {entry.label for entry in opened.entries()} == {"one", ""}


@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGKILL]
)
def test_interrupted_warm_goes_on_where_the_last_step_ended(
    model: Path, store: Path, how: signal.Signals
) -> None:
    arguments = ["warm", "--model", model, "--system", SYSTEM * 40, "--prefill-step-size", 64]
    process = subprocess.Popen(
        command(store, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        partial = _wait_for_partial(store, process)
        process.send_signal(how)
        said = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    if how == signal.SIGINT:
        found = re.search(
            r": ([\d,]+) of ([\d,]+) tokens are stored; the same command goes on", said
        )
        assert found, said
        assert partial <= int(found[1].replace(",", "")) < int(found[2].replace(",", ""))
    with Store.open(store) as opened:
        assert opened.check(read_data=True) == []

    again = prepared_script(store, *arguments, "--json")

    (report,) = json.loads(again.out)
    assert partial <= report["found_tokens"] < report["num_tokens"]
    with Store.open(store) as opened:
        assert [entry.num_tokens for entry in opened.entries()] == [report["num_tokens"]]
        assert opened.check(read_data=True) == []


def _wait_for_partial(store: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait until the first step is on disk; returns its tokens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with Store.open(store, read_only=True) as opened:
                for entry in opened.entries():
                    if entry.label == PARTIAL_LABEL:
                        return entry.num_tokens
        except StoreAccessError:
            pass  # not made yet
        os.sched_yield()
    raise AssertionError(f"no step was stored: {process.communicate()}")


BAD: dict[str, tuple[list[object], str]] = {
    "no model": (["warm", "--system", "x"], "--model"),
    "nothing to store": (["warm", "--model", "MODEL"], "--system or --messages"),
    "empty text": (["warm", "--model", "MODEL", "--system", " "], "empty"),
    "missing file": (["warm", "--model", "MODEL", "--system", "@nowhere.txt"], "cannot be read"),
    "unknown model": (["warm", "--model", "nowhere", "--system", "x"], "nowhere"),
    "unknown tier": (
        ["warm", "--model", "MODEL", "--system", "x", "--tier", "narrator"],
        "unknown tier",
    ),
    "bad length of time": (
        ["warm", "--model", "MODEL", "--system", "x", "--ttl", "soon"],
        "length of time",
    ),
    "label of two lines": (
        ["warm", "--model", "MODEL", "--system", "x", "--label", "a\nb"],
        "one line of text",
    ),
    "label with a terminal's commands": (["warm", "--manifest", "LABELLED"], "one line of text"),
    "label that is a book": (
        ["warm", "--model", "MODEL", "--system", "x", "--label", "x" * 201],
        "200 characters",
    ),
    "garbage messages": (["explain", "--model", "MODEL", "--messages", "GARBAGE"], "JSON"),
    "messages of the wrong shape": (
        ["explain", "--model", "MODEL", "--messages", "NUMBERS"],
        "wrong shape",
    ),
    "tokens of the wrong shape": (
        ["explain", "--model", "MODEL", "--tokens", "MESSAGES"],
        "wrong shape",
    ),
    "garbage manifest": (["warm", "--manifest", "GARBAGE"], "cannot be understood"),
    "both kinds of prompt": (
        ["explain", "--model", "MODEL", "--messages", "MESSAGES", "--tokens", "NUMBERS"],
        "either",
    ),
    "garbage template arguments": (
        ["warm", "--model", "MODEL", "--system", "x", "--chat-template-args", "{"],
        "JSON",
    ),
    "template arguments that are not the template's": (
        ["warm", "--model", "MODEL", "--system", "x", "--chat-template-args", '{"tokenize": 0}'],
        "must not set tokenize",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(
    name: str, model: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "garbage").write_text("{[")
    (tmp_path / "numbers").write_text("[1, 2, 3]")
    (tmp_path / "labelled").write_text(
        f'[[prompt]]\nmodel = "{model}"\nsystem = "x"\nlabel = "\\u001b[31m"\n'
    )
    request(tmp_path / "messages", "Hello!")
    names: dict[object, object] = {
        "MODEL": model,
        "GARBAGE": tmp_path / "garbage",
        "NUMBERS": tmp_path / "numbers",
        "LABELLED": tmp_path / "labelled",
        "MESSAGES": tmp_path / "messages",
    }
    arguments, expected = BAD[name]

    done = prepared_script(store, *(names.get(argument, argument) for argument in arguments))

    assert done.status in (1, 2)
    assert "Traceback" not in done.err
    lines = [line for line in done.err.splitlines() if line.startswith("Error")]
    assert len(lines) == 1, done.err
    assert expected in " ".join(done.err.split())


def test_warm_beside_a_process_that_reads(model: Path, store: Path, tmp_path: Path) -> None:
    """One store, one process that warms while another one looks, again and again."""
    reader = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import select, sys\nfrom persist_cache import Store\n"
            "with Store.open(sys.argv[1], min_free_bytes=0) as store:\n"
            "    print('open', flush=True)\n"
            "    while not select.select([sys.stdin], [], [], 0)[0]:\n"
            "        store.entries(); store.check(); store.stats()\n",
            str(store),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"open\n"

    done = prepared_script(
        store, "warm", "--model", model, "--system", SYSTEM * 4, "--prefill-step-size", 64
    )

    _, errors = reader.communicate(timeout=60)
    assert (done.status, reader.returncode, errors) == (0, 0, b"")


def test_warm_stores_under_the_identity_of_what_it_loaded(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks first whether the prompt is stored; other weights may be there when it loads."""
    import mlx_lm
    from click.testing import CliRunner

    from persist_cache.fingerprint.identifier import identify
    from persist_cache_cli.main import cli

    tiny = build_model_dir(tmp_path / "tiny", seed=1)
    before = identify(str(tiny))
    load = mlx_lm.load

    def replacing(*args: object, **kwargs: object) -> object:
        monkeypatch.setattr(mlx_lm, "load", load)
        build_model_dir(tiny, seed=2)
        return load(*args, **kwargs)

    monkeypatch.setattr(mlx_lm, "load", replacing)
    arguments = ["--store", str(store), "warm", "--model", str(tiny), "--system", SYSTEM, "--json"]

    done = CliRunner().invoke(cli, arguments)

    assert done.exit_code == 0, done.output
    with Store.open(store, min_free_bytes=0) as opened:
        (entry,) = opened.entries()
    after = identify(str(tiny))
    assert after is not None
    assert after != before
    assert entry.fingerprint == after.hex
