"""What `explain` says is true, can be seen, and ends with the status that it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store
from persist_cache.entry import PARTIAL_LABEL
from persist_cache.queries.as_json import divergence_texts
from persist_cache.queries.explain import Divergence, explain, with_memory
from tests import cli, tiny_models
from tests.fakes import FakeSource, fingerprint

SYSTEM = "You are a helpful assistant. Answer in a short sentence. " * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> cli.Run:
    return cli.runner(tmp_path / "store", capfd)


@pytest.fixture
def ask(run: cli.Run, model: Path, tmp_path: Path) -> Any:
    """Explains a conversation with this system text and question."""

    def asked(system: str, question: str, *options: str) -> cli.Done:
        path = tmp_path / "request.json"
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        path.write_text(json.dumps({"messages": messages}))
        return run("explain", "--model", model, "--messages", path, *options)

    return asked


@pytest.mark.parametrize(
    ("stored", "prompt", "code", "named"),
    [
        ("café in Zürich", "cafe\u0301 in Zu\u0308rich", "normalization", "NFC/NFD"),
        ("10 km", "10\u00a0km", "white_space", "white space"),
        ("one line\r\nmore", "one line\nmore", "white_space", "white space"),
        ("zero width", "zero\u200b width", "white_space", "white space"),
        ("soft hyphen", "so\u00adft hyphen", "invisible", "invisible characters"),
        ("it's mine", "it\u2019s mine", "look_alike", "look alike"),
    ],
)
def test_a_difference_that_cannot_be_seen_is_shown_and_named(
    run: cli.Run, model: Path, ask: Any, stored: str, prompt: str, code: str, named: str
) -> None:
    run("warm", "--model", model, "--system", f"{SYSTEM} Known: {stored}. {SYSTEM}")

    said = ask(f"{SYSTEM} Known: {prompt}. {SYSTEM}", "Hello", "--json").json
    shown = ask(f"{SYSTEM} Known: {prompt}. {SYSTEM}", "Hello").out

    divergence = said["divergence"]
    assert divergence["difference"] == code
    assert "The texts shown differ only in" in said["message"]
    assert named in said["message"]
    assert named in " ".join(shown.split())
    left, right = divergence["stored_text"][:12], divergence["prompt_text"][:12]
    assert left != right
    assert (left + right).isprintable()
    assert "\\" in left + right
    assert left in shown
    assert right in shown


def test_a_parting_within_a_character_shows_the_characters(
    run: cli.Run, model: Path, ask: Any
) -> None:
    run("warm", "--model", model, "--system", f"{SYSTEM} Caf\u00e9 noir. {SYSTEM}")

    said = ask(f"{SYSTEM} Caf\u00e8 noir. {SYSTEM}", "Hello", "--json").json["divergence"]

    assert said["before_text"].endswith("Caf")
    assert said["stored_text"].startswith("é noir")
    assert said["prompt_text"].startswith("è noir")
    assert said["difference"] is None
    assert "\ufffd" not in said["before_text"] + said["prompt_text"][:8] + said["stored_text"][:8]


def test_what_acts_on_a_terminal_is_escaped(run: cli.Run, model: Path, ask: Any) -> None:
    run("warm", "--model", model, "--system", f"{SYSTEM} \x1b[31mred \x07 {SYSTEM}")

    shown = ask(f"{SYSTEM} \x1b[32mgreen \u202e {SYSTEM}", "Hello").out

    assert all(one == "\n" or one.isprintable() for one in shown)
    assert "\\x1b" in shown


def test_the_same_text_in_other_tokens_is_told_by_its_tokens() -> None:
    texts = {1: "a", 2: "b", 3: "ab", 4: "c"}

    def decode(tokens: list[int]) -> str:
        return "".join(texts[token] for token in tokens)

    found = divergence_texts(Divergence(1, [4], prompt=[1, 2], stored=[3]), decode)

    assert found.difference == "tokens"
    assert (found.stored, found.prompt) == ("(tokens 3 …)", "(tokens 1, 2 …)")
    assert found.sentence == "The text shown is the same, but its tokens are not."


def test_a_prompt_that_ends_differs_in_nothing() -> None:
    found = divergence_texts(
        Divergence(1, [4], prompt=[], stored=[3]), lambda tokens: "x" * len(tokens)
    )

    assert (found.difference, found.sentence) == (None, "")
    assert (found.stored, found.prompt) == ("x", "(nothing: it ends here)")


# ---- enough, or not ----------------------------------------------------------------------------


def tokens_file(tmp_path: Path, num_tokens: int) -> Path:
    path = tmp_path / f"{num_tokens}.json"
    path.write_text(json.dumps([7 + place % 90 for place in range(num_tokens)]))
    return path


@pytest.fixture
def stored(model: Path, tmp_path: Path) -> None:
    """A prompt of 91 tokens, 90 of which a request with it finds."""
    from persist_cache import identify

    ids = json.loads(tokens_file(tmp_path, 91).read_text())
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        identity = identify(str(model))
        assert identity is not None
        store.put(identity, ids, FakeSource(ids))


@pytest.mark.parametrize(
    ("num_tokens", "options", "status"),
    [
        (91, (), 0),
        (101, (), 0),  # 91 of 100
        (102, (), 0),  # 91 of 101: 90.1 %
        (103, (), 3),  # 91 of 102: 89.2 %
        (1000, (), 3),
        (1000, ("--at-least", "5"), 0),
        (1000, ("--at-least", "10"), 3),
        (91, ("--at-least", "100"), 0),
        (93, ("--at-least", "100"), 3),
    ],
)
def test_check_fails_below_its_threshold_and_says_so(
    num_tokens: int,
    options: tuple[str, ...],
    status: int,
    run: cli.Run,
    model: Path,
    stored: None,
    tmp_path: Path,
) -> None:
    asked = ("explain", "--model", model, "--tokens", tokens_file(tmp_path, num_tokens), "--check")

    done = run(*asked, *options)
    said = run(*asked, *options, "--json")

    assert (done.status, said.status) == (status, status)
    assert ("Check passed" if status == 0 else "Check failed") in done.out
    assert f"{options[1] if options else 90} %" in done.out
    found = min(91, num_tokens - 1)
    assert said.json["cached_tokens"] == found
    assert said.json["check"] == {
        "percent": pytest.approx(100 * found / (num_tokens - 1)),
        "at_least": float(options[1] if options else 90),
        "passed": status == 0,
    }


def test_check_of_six_in_thirty_two_tokens_fails(
    run: cli.Run, model: Path, stored: None, tmp_path: Path
) -> None:
    path = tmp_path / "short.json"
    path.write_text(json.dumps([*(7 + place for place in range(6)), *([3] * 26)]))

    assert run("explain", "--model", model, "--tokens", path, "--check").status == 3
    assert run("explain", "--model", model, "--tokens", path).status == 0


def test_nothing_found_never_passes(run: cli.Run, model: Path, tmp_path: Path) -> None:
    path = tokens_file(tmp_path, 5)

    done = run("explain", "--model", model, "--tokens", path, "--check", "--at-least", "0")

    assert done.status == 3


def test_at_least_needs_check(run: cli.Run, model: Path, tmp_path: Path) -> None:
    path = tokens_file(tmp_path, 5)

    done = run("explain", "--model", model, "--tokens", path, "--at-least", "50")

    assert done.status == 2
    assert "--at-least says what is enough for --check" in done.err


# ---- where it would come from, and where it went ------------------------------------------------


@pytest.mark.parametrize(("now", "memory"), [(30, 30), (20, 0), (10, 10)])
def test_memory_and_disk_that_differ_are_both_told(tmp_path: Path, now: int, memory: int) -> None:
    tokens = list(range(100, 140))
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        store.put(fingerprint(), tokens[:20], FakeSource(tokens[:20]))

        found = with_memory(
            explain(store, fingerprint(), tokens), now_tokens=now, memory_tokens=memory
        )

    assert (found.cached_tokens, found.now_tokens, found.memory_tokens) == (20, now, memory)
    assert f"{now} of 40 tokens now, and 20 after a restart" in found.message
    assert f"memory has {memory}, the disk 20" in found.message


def test_memory_and_disk_that_agree_are_not_told_twice(tmp_path: Path) -> None:
    tokens = list(range(100, 140))
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        found = explain(store, fingerprint(), tokens)

    assert with_memory(found, now_tokens=0, memory_tokens=0).message == found.message


def test_partial_prefills_are_said_to_be_replaced(
    run: cli.Run, model: Path, tmp_path: Path
) -> None:
    system = ("warm", "--model", model, "--system", SYSTEM, "--prefill-step-size", 16, "--json")
    (warmed,) = run(*system).json
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        (entry,) = store.entries()
        assert entry.label != PARTIAL_LABEL
    ids = tokens_of(tmp_path / "store", warmed["id"])
    (tmp_path / "part.json").write_text(json.dumps(ids[:16]))
    asked = ("explain", "--model", model, "--tokens", tmp_path / "part.json")
    assert run(*asked, "--json").json["outcome"] == "hit"

    run("evict", warmed["id"], "--yes")
    part = run(*asked)
    (tmp_path / "whole.json").write_text(json.dumps(ids))
    whole = run("explain", "--model", model, "--tokens", tmp_path / "whole.json")

    assert "replaced by a longer one, which is gone, too" in part.out
    assert "evicted by request" not in part.out
    assert "evicted by request" in whole.out


def tokens_of(root: Path, entry: str) -> list[int]:
    from persist_cache.queries.details import tokens_of as read

    with Store.open(root, min_free_bytes=0) as store:
        return read(store, entry)
