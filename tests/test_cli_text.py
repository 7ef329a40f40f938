"""`show --text` and `evict --match` read prompts back with the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from persist_cache import Fingerprint, Store
from tests.cli import prepared_script
from tests.fakes import FakeSource
from tests.tiny_models import build_model_dir

SYSTEM = "You are the Librarian of a small town.\n"
PROMPTS = {
    "system": SYSTEM,
    "dragons": SYSTEM + "Tell me about DRAGONS, please.",
    "weather": SYSTEM + "What is the weather like — né?\n\x1b[31mred",
}
IMAGE = -(1 << 60) + 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def fill(root: Path, model: Path, name: str = "org/tiny") -> dict[str, str]:
    """Entries of `PROMPTS`, as a server of this model would store them; their ids."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    identity = Fingerprint.from_fields({"weights": name}, {"name": name, "path": str(model)})
    ids = {}
    with Store.open(root, min_free_bytes=0) as store:
        for what, text in PROMPTS.items():
            tokens = [*tokenizer.encode(text), *([IMAGE] if what == "dragons" else [])]
            entry = store.put(identity, tokens, FakeSource(tokens)).entry
            assert entry is not None
            ids[what] = entry
    return ids


@pytest.fixture
def ids(root: Path, model: Path) -> dict[str, str]:
    return fill(root, model)


def left(root: Path) -> set[str]:
    return {entry["id"] for entry in prepared_script(root, "list", "--json").json}


def test_show_text_is_the_prompt(root: Path, ids: dict[str, str]) -> None:
    shown = prepared_script(root, "show", ids["dragons"], "--text")
    alone = prepared_script(root, "show", ids["dragons"], "--text", "-q")
    as_json = prepared_script(root, "show", ids["dragons"], "--text", "--json")

    assert shown.status == alone.status == as_json.status == 0
    assert shown.err == alone.err == as_json.err == ""
    assert shown.out.endswith("\n\n" + PROMPTS["dragons"] + "\n")
    assert alone.out == PROMPTS["dragons"] + "\n"
    assert as_json.json["text"] == PROMPTS["dragons"], "an image has no text"


def test_show_text_gives_a_terminal_no_orders(root: Path, ids: dict[str, str]) -> None:
    shown = prepared_script(root, "show", ids["weather"], "--text")

    assert "\x1b" not in shown.out
    assert "What is the weather like — né?\n" in shown.out
    assert (
        prepared_script(root, "show", ids["weather"], "--text", "--json")
        .json["text"]
        .endswith("red")
    )


@pytest.mark.parametrize(
    ("text", "matching"),
    [
        ("dragons, PLEASE", {"dragons"}),
        ("— né", {"weather"}),
        ("librarian", {"system", "dragons", "weather"}),
    ],
)
def test_evict_match_takes_prompts_with_that_text(
    root: Path, ids: dict[str, str], text: str, matching: set[str]
) -> None:
    gone = {ids[one] for one in matching}
    planned = prepared_script(root, "evict", "--match", text, "--dry-run", "--json").json
    assert {entry["id"] for entry in planned["entries"]} == gone
    assert left(root) == set(ids.values())

    done = prepared_script(root, "evict", "--match", text, "--yes")

    assert (done.status, done.err) == (0, "")
    assert left(root) == set(ids.values()) - gone


def test_evict_match_of_nothing_evicts_nothing(root: Path, ids: dict[str, str]) -> None:
    done = prepared_script(root, "evict", "--match", "submarine", "--yes")

    assert done.status == 3
    assert done.sentence == "Error: Nothing matches; nothing was evicted."
    assert left(root) == set(ids.values())


def test_evict_match_leaves_pinned_entries_and_obeys_the_other_filters(
    root: Path, ids: dict[str, str]
) -> None:
    prepared_script(root, "pin", ids["dragons"])
    prepared_script(root, "label", ids["weather"], "today")

    done = prepared_script(
        root, "evict", "--match", "librarian", "--label", "tod*", "--yes", "--json"
    )

    assert [entry["id"] for entry in done.json["entries"]] == [ids["weather"]]
    prepared_script(root, "evict", "--match", "librarian", "--yes")
    assert ids["dragons"] in left(root)


def test_model_that_is_gone_does_not_keep_others_from_matching(
    root: Path, model: Path, ids: dict[str, str]
) -> None:
    fill(root, model, name="org/other")
    with Store.open(root) as store:
        tokens = list(range(9))
        lost = Fingerprint.from_fields({"weights": "lost"}, {"name": "lost", "path": "/gone/lost"})
        store.put(lost, tokens, FakeSource(tokens))

    done = prepared_script(root, "evict", "--match", "dragons", "--yes", "--json")

    assert done.status == 0
    assert len(done.json["entries"]) == 2, "of both models that can be read"
    assert done.err.startswith("Warning: ")
    assert done.err.count("\n") == 1
    assert "lost" in done.err
