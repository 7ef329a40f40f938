"""What is kept of a request: what its headers and its body say, and what the server's rules are."""

from __future__ import annotations

import logging
from email.message import Message
from typing import Any

import pytest

from persist_cache import PromptCache, Store
from persist_cache.cache.origin import Origin
from persist_cache.fingerprint.value import Fingerprint, salt_digest
from persist_cache.server import quiet
from persist_cache.server.privacy import Rules, privacy_of, scrub
from persist_cache.server.rendering import read_request
from persist_cache.server.validation import RefusedError, decode_object
from tests.live_fakes import FakeCodec, FakeLayer

ASKED_NOT, DEFAULT, RESPECT = Rules(), Rules(no_store=True), Rules(respect_store=True)


def headers(*values: str) -> Message:
    said = Message()
    for value in values:
        said["x-persist-cache"] = value
    return said


@pytest.mark.parametrize(
    ("rules", "said", "body", "no_store"),
    [
        (ASKED_NOT, (), {}, False),
        (ASKED_NOT, ("no-store",), {}, True),
        (ASKED_NOT, ("No-Store",), {}, True),
        (ASKED_NOT, ("store",), {}, False),
        (ASKED_NOT, ("store", "no-store"), {}, True),
        (ASKED_NOT, ("store, no-store",), {}, True),
        (ASKED_NOT, (), {"no_store": True}, True),
        (ASKED_NOT, (), {"no_store": None}, False),
        (ASKED_NOT, ("store",), {"no_store": True}, True),
        (ASKED_NOT, ("no-store",), {"no_store": False}, True),
        (ASKED_NOT, (), {"store": False}, False),
        (RESPECT, (), {"store": False}, True),
        (RESPECT, (), {"store": True}, False),
        (RESPECT, (), {"store": None}, False),
        (RESPECT, ("store",), {"store": False}, True),
        (DEFAULT, (), {}, True),
        (DEFAULT, (), {"store": True}, True),
        (DEFAULT, ("store",), {}, False),
        (DEFAULT, (), {"no_store": False}, False),
        (DEFAULT, ("store",), {"no_store": True}, True),
    ],
)
def test_where_a_request_says_two_things_nothing_is_kept(
    rules: Rules, said: tuple[str, ...], body: dict[str, Any], no_store: bool
) -> None:
    found = privacy_of(headers(*said), body, rules)

    assert found.no_store is no_store
    assert found.may_publish is not no_store


@pytest.mark.parametrize(
    ("said", "body"),
    [
        (("nostore",), {}),
        (("",), {}),
        (("no-store; x",), {}),
        ((), {"no_store": 1}),
        ((), {"no_store": "true"}),
        ((), {"cache_salt": ""}),
        ((), {"cache_salt": ["a"]}),
        ((), {"cache_salt": "x" * 1025}),
        (("no-store",), {"prompt_cache_options": {"prewarm": True}}),
    ],
)
def test_what_is_not_understood_is_refused(said: tuple[str, ...], body: dict[str, Any]) -> None:
    with pytest.raises(RefusedError) as refused:
        privacy_of(headers(*said), body, ASKED_NOT)

    assert refused.value.status == 400


def test_store_is_read_only_where_it_is_respected() -> None:
    assert not privacy_of(headers(), {"store": "nonsense"}, ASKED_NOT).no_store
    with pytest.raises(RefusedError):
        privacy_of(headers(), {"store": "nonsense"}, RESPECT)


@pytest.mark.parametrize("salt", ["a", "ä" * 1024, "\ud800"])
def test_a_salt_is_kept_as_its_digest(salt: str) -> None:
    found = privacy_of(headers(), {"cache_salt": salt}, ASKED_NOT)

    assert found.salt == salt_digest(salt)
    assert len(found.salt) == 64
    assert not found.may_publish


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": "Hi"},
        {"input": "Hi"},
        {"system": "S", "messages": [{"role": "user", "content": "Hi"}]},
    ],
)
def test_a_body_in_a_file_says_it_in_each_protocol(body: dict[str, Any]) -> None:
    assert read_request({**body, "cache_salt": "x"}).salt == salt_digest("x")
    assert read_request({**body, "no_store": True}).no_store
    assert read_request(body).salt == ""
    assert not read_request(body).no_store


def test_salted_identities_differ_by_that_alone() -> None:
    plain = Fingerprint.from_fields({"weights": "w"}, {"name": "n"})
    salted = plain.salted(salt_digest("x"))

    assert salted.digest != plain.digest != plain.salted(salt_digest("y")).digest
    assert salted.salted("") == plain
    assert plain.salted("") is plain
    assert [one.name for one in salted.diff(plain.fields)] == ["cache_salt"]
    assert plain.may_publish
    assert not salted.may_publish


def test_a_short_prompt_stays_in_memory_alone(store: Store) -> None:
    identity = Fingerprint.from_fields({"weights": "w"})
    with PromptCache(store=store, identify=lambda _: identity, codec=FakeCodec()) as cache:
        for tokens, memory_only in (([1, 2, 3], True), ([4, 5, 6], False)):
            origin = Origin(memory_only=memory_only)
            cache.look_up("m", tokens, origin=origin)
            done = [FakeLayer(tokens)]
            cache.insert_cache("m", tokens, done, cache_type="user", origin=origin)
        cache.flush()

        assert cache.known_tokens("m", [1, 2, 3]) == 3
        assert [store.match(identity, one).num_tokens for one in ([1, 2, 3], [4, 5, 6])] == [0, 3]


def test_a_private_look_leaves_memory_and_store_as_they_are(store: Store) -> None:
    identity = Fingerprint.from_fields({"weights": "w"})
    with PromptCache(store=store, identify=lambda _: identity, codec=FakeCodec()) as cache:
        cache.look_up("m", [1, 2, 3, 4], origin=Origin())
        cache.insert_cache("m", [1, 2, 3, 4], [FakeLayer([1, 2, 3, 4])], cache_type="user")
        cache.flush()
        before = store.entries(), len(cache), cache.nbytes
        origin = Origin(keeps_nothing=True)

        held, rest, fetch = cache.look_up("m", [1, 2, 3, 4, 5, 6], origin=origin)
        cache.insert_cache("m", [1, 2, 3, 4, 5, 6], [FakeLayer([1, 2, 3, 4, 5, 6])], origin=origin)
        cache.flush()

        assert held is not None
        assert (len(rest), fetch.num_tokens) == (2, 4)
        assert (store.entries(), len(cache), cache.nbytes) == before
        assert cache.recent_fetches()[-1].digest == b""


def test_what_is_read_ahead_for_a_private_request_is_its_alone(store: Store) -> None:
    identity = Fingerprint.from_fields({"weights": "w"})
    tokens = list(range(50))
    with PromptCache(store=store, identify=lambda _: identity, codec=FakeCodec()) as cache:
        cache.look_up("m", tokens, origin=Origin())
        cache.insert_cache("m", tokens, [FakeLayer(tokens)], cache_type="user")
        cache.flush()
        cache.trim_to(n_sequences=0)
        ahead = cache.load_ahead("m", [*tokens, 7, 8], in_passing=True)
        assert ahead is not None
        assert len(cache) == 0

        held, rest, fetch = cache.look_up(
            "m", [*tokens, 7, 8], origin=Origin(keeps_nothing=True), ahead=ahead
        )

        assert held is not None
        assert held[0].tokens == tokens
        assert (len(rest), fetch.source, fetch.num_tokens, len(cache)) == (2, "disk", 50, 0)


def test_scrub_empties_what_others_hold() -> None:
    inner = [{"text": "secret"}]
    outer = {"messages": inner, "more": [[1, 2]]}

    scrub(outer)

    assert outer == {}
    assert inner == []


def test_a_quiet_thread_logs_no_details(caplog: pytest.LogCaptureFixture) -> None:
    handler = caplog.handler
    root = logging.getLogger()
    if handler not in root.handlers:
        root.addHandler(handler)
    quiet.install()
    caplog.set_level(logging.DEBUG)
    ours = logging.getLogger("persist_cache.server.http")
    with quiet.quiet():
        logging.error("a body: secret")
        ours.debug("secret")
        try:
            raise ValueError("secret")
        except ValueError:
            ours.exception("it failed")
    ours.debug("loud again")

    assert "secret" not in caplog.text
    assert [one.message for one in caplog.records] == ["it failed", "loud again"]


@pytest.mark.parametrize(
    "body",
    [
        '{"no_store": true, "no_store": false}',
        '{"cache_salt": "a", "cache_salt": "b"}',
        '{"store": false, "a": 1, "store": true}',
    ],
)
def test_what_is_kept_is_said_once(body: str) -> None:
    with pytest.raises(RefusedError, match="twice"):
        decode_object(body.encode())


def test_other_fields_may_stand_twice_the_last_one_counts() -> None:
    assert decode_object(b'{"a": 1, "a": 2, "no_store": true}') == {"a": 2, "no_store": True}
