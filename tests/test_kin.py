"""Why nothing is stored for a model of which something is: the field that differs is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from persist_cache import PromptCache, Store
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.queries.explain import explain
from persist_cache.store.reasons import kind_of_reason, reason_of
from tests.fakes import Clock, FakeSource
from tests.live_fakes import MODEL, FakeCodec

PROMPT = [1, 2, 3]
FIELDS: dict[str, Any] = {
    "model_type": "llama",
    "config": "c" * 32,
    "weights": "w" * 32,
    "mlx_lm": "0.32.1",
    "kv_bits": None,
    "max_kv_size": None,
}
INFO = {"name": "org/model", "path": "/models/model"}


def identity(**fields: Any) -> Fingerprint:
    return Fingerprint.from_fields({**FIELDS, **fields}, INFO)


def put(store: Store, model: Fingerprint, tokens: Sequence[int] = PROMPT) -> str:
    entry = store.put(model, tokens, FakeSource(tokens)).entry
    assert entry is not None
    return entry


def reason(store: Store, model: Fingerprint) -> str:
    return store.match(model, PROMPT).reason


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mlx_lm": "0.32.2"}, "stored under another mlx-lm: 0.32.1 → 0.32.2"),
        (
            {"kv_bits": 8, "kv_group_size": 64, "quantized_kv_start": 5000},
            "stored under another kv_bits: unset → 8",
        ),
        ({"max_kv_size": 4096}, "stored under another max_kv_size: unset → 4096"),
        ({"layout": 2}, "stored under another layout: 1 → 2"),
        ({"weights": "v" * 32}, "stored under another weights"),
        ({"config": "d" * 32}, "stored under another config"),
        ({"adapter.weights": "a" * 32}, "stored under another adapter.weights"),
        (
            {"mlx_lm": "0.32.2", "kv_bits": 8, "config": "d" * 32},
            "stored under another config, kv_bits and mlx-lm: "
            "kv_bits unset → 8, mlx-lm 0.32.1 → 0.32.2",
        ),
    ],
)
def test_miss_names_the_fields_that_differ_from_what_is_stored(
    store: Store, fields: dict[str, Any], expected: str
) -> None:
    put(store, identity())

    assert reason(store, identity(**fields)) == expected


def test_salt_is_only_another_salt(tmp_path: Path, store: Store) -> None:
    salts = [Fingerprint.from_fields({**FIELDS, "salt": one}, INFO) for one in ("ab12", "cd34")]
    put(store, salts[0])

    assert reason(store, salts[1]) == "stored under another salt"
    assert reason(store, identity()) == "stored under another salt"


def test_identity_with_the_fewest_differences_is_named_and_then_the_latest(
    store: Store, clock: Clock
) -> None:
    put(store, identity(mlx_lm="0.31.0", kv_bits=4))
    put(store, identity(mlx_lm="0.31.0"))
    clock.advance(1)
    put(store, identity(mlx_lm="0.32.0"))

    assert reason(store, identity()) == "stored under another mlx-lm: 0.32.0 → 0.32.1"


def test_identity_without_entries_and_another_model_are_not_named(store: Store) -> None:
    store.evict([put(store, identity(mlx_lm="0.32.0"))])
    stranger = {**FIELDS, "weights": "x" * 32}
    put(store, Fingerprint.from_fields(stranger, {"name": "org/other", "path": "/models/other"}))

    assert reason(store, identity()) == "nothing is stored for this model"


def test_model_whose_own_entries_are_gone_has_nothing_stored(store: Store) -> None:
    store.evict([put(store, identity())])
    assert reason(store, identity()) == "nothing is stored for this model"

    put(store, identity(mlx_lm="0.32.0"))
    assert reason(store, identity()) == "stored under another mlx-lm: 0.32.0 → 0.32.1"


def test_model_with_entries_of_its_own_is_told_of_its_prompts(store: Store) -> None:
    put(store, identity(mlx_lm="0.32.0"))
    put(store, identity(), [7, 8, 9])

    assert reason(store, identity()) == "no stored prompt begins with the first token"
    assert store.match(identity(), [7, 8, 9], limit=0).reason == ""


def test_look_up_of_kin_reads_namespaces_and_no_prompts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from persist_cache.index.transaction import Reader

    for number in range(20):
        put(store, identity(mlx_lm=f"0.31.{number}"), range(10 * number, 10 * number + 9))

    def refuse(*_: Any) -> Any:
        raise AssertionError("tokens were read")

    monkeypatch.setattr(Reader, "tokens", refuse)
    assert reason(store, identity()).startswith("stored under another mlx-lm: 0.31.")


def test_upgrade_is_counted_by_field_logged_once_and_told_in_the_header(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from persist_cache.server.ticket import cache_header

    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put(store, identity())
        new = identity(mlx_lm="0.32.2")
        with PromptCache(store=store, identify=lambda model: new, codec=FakeCodec()) as cache:
            for _ in range(3):
                cache.fetch_nearest_cache(MODEL, PROMPT)
            stats = cache.stats()
            header = cache_header(cache.last_fetch)
        counters = store.stats().counters

    assert stats.misses == {"stored under another mlx-lm": 3}
    assert counters["misses:stored under another mlx-lm"] == 3
    assert header == 'miss; tokens=0; reason="stored under another mlx-lm: 0.32.1 -> 0.32.2"'
    assert sum("0.32.1 → 0.32.2" in one.getMessage() for one in caplog.records) == 1
    assert {reason_of(one).value for one in stats.misses} == {"other_identity"}
    assert kind_of_reason("stored under another salt") == "stored under another salt"


def test_real_identities_of_one_model_are_kin(tmp_path: Path, store: Store) -> None:
    from tests.test_cli_store import fake_model

    folder = fake_model(tmp_path / "model")

    def identify(**options: Any) -> Fingerprint:
        found = Identifier(memo_path=tmp_path / "memo.json", **options)((str(folder), None, None))
        assert found is not None
        return found

    put(store, identify())

    assert reason(store, identify(kv_bits=8)) == "stored under another kv_bits: unset → 8"
    assert reason(store, identify(salt="someone")) == "stored under another salt"
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert reason(store, identify()) == "stored under another weights"


def test_explain_names_the_upgrade_also_after_the_new_model_has_stored_a_prompt(
    store: Store,
) -> None:
    """Fetches do not: it would cost a walk in each former version at each miss."""
    template, prompt = [1, 2], [1, 2, *range(100, 150)]
    put(store, identity(), prompt)
    new = identity(mlx_lm="0.32.2")
    put(store, new, [*template, *range(200, 250)])

    found = explain(store, new, [*prompt, 9])

    assert (found.outcome, found.cached_tokens) == ("diverges", 2)
    assert [(one.name, one.old, one.new) for one in found.changes] == [
        ("mlx_lm", "0.32.1", "0.32.2")
    ]
    assert "52 tokens are stored under another mlx-lm: 0.32.1 → 0.32.2." in found.message
    put(store, new, prompt)
    assert explain(store, new, [*prompt, 9]).changes == []


def test_explain_says_nothing_of_a_template_that_former_versions_share(store: Store) -> None:
    put(store, identity(), [1, 2, 3, *range(100, 150)])
    new = identity(mlx_lm="0.32.2")
    put(store, new, [1, 2, *range(200, 250)])

    assert explain(store, new, [1, 2, 3, 4]).changes == []


def test_explain_says_nothing_of_other_models_where_something_is_found(store: Store) -> None:
    prompt = [1, 2, *range(100, 150)]
    stranger = {**FIELDS, "weights": "x" * 32}
    put(store, Fingerprint.from_fields(stranger, {"name": "another", "path": "/b"}), prompt)
    put(store, identity(), [1, 2, *range(200, 250)])

    assert explain(store, identity(), prompt).changes == []
