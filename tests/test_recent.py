"""What a server remembers of its latest requests: within its bytes, in memory alone, and why."""

from __future__ import annotations

import gc
import json
import random
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persist_cache.cache.stats import Fetch
from persist_cache.server.recent.chunks import (
    CHUNK_TOKENS,
    Chunks,
    cut_body,
    cut_tokens,
    joined,
    shared_tokens,
    tokens_in,
)
from persist_cache.server.recent.diagnosis import of_messages, of_openai
from persist_cache.server.recent.ring import Ring
from persist_cache.server.ticket import CutPrompt, Ticket
from persist_cache.stability.causes.kinds import Kind
from tests.pairs import LONG, PROSE, chat, edited

MODEL = ("small", None, None)


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring()
    yield made
    made.close()


def ticket(
    body: Any, tokens: Sequence[int], found: int = 0, *, model: Any = MODEL, reason: str = ""
) -> Ticket:
    """A request that was answered, with that many tokens from memory."""
    made = Ticket(json.dumps(body).encode())
    made.tokenized(CutPrompt(None, (), tokens, (), (), ""))
    made.model_key = model
    made.looked(Fetch("memory" if found else "miss", found, reason))
    return made


def told(ring: Ring, made: Ticket, name: str, state: Any = "done", client: str = "ada/1.0") -> None:
    """Have a request recorded."""
    id = ring.begin(made, response_id=name, path="/v1/chat/completions", client=client)
    ring.end(id, state)
    assert ring.settle()


def prompt(body: Any) -> list[int]:
    """Stands for a tokenizer: a token for each character."""
    return [ord(one) for message in body["messages"] for one in message["content"]]


# ---- pieces --------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, 1 << 18) | st.integers(-(1 << 60), 0), max_size=3 * CHUNK_TOKENS)


@given(st.binary(max_size=40_000))
def test_a_body_comes_back_as_it_was(body: bytes) -> None:
    chunks = Chunks()

    assert joined(chunks.add(cut_body(body))) == body


@given(TOKENS, TOKENS, st.integers(0, 2000))
def test_tokens_come_back_and_are_compared(one: list[int], other: list[int], same: int) -> None:
    other = one[:same] + other
    chunks = Chunks()
    a, b = (chunks.add(cut_tokens(some)) for some in (one, other))

    assert (tokens_in(a), tokens_in(b)) == (one, other)
    count = shared_tokens(a, b)
    assert one[:count] == other[:count]
    assert count == min(len(one), len(other)) or one[count] != other[count]


def test_what_is_dropped_takes_nothing() -> None:
    chunks = Chunks()
    kept = [chunks.add(cut_body(text * 50)) for text in (b"a\\n", b"bc\\n", b"a\\n", b"{}")]
    before = chunks.nbytes
    for one in kept:
        chunks.drop(one)

    assert before > 0
    assert chunks.nbytes == 0


def test_a_line_put_in_leaves_what_follows_in_the_same_pieces() -> None:
    drawn = random.Random(0)
    lines = ["".join(drawn.choices("abcdefgh ", k=70)) for _ in range(2_000)]
    chunks = Chunks()
    chunks.add(cut_body(json.dumps("\n".join(lines)).encode()))
    before = chunks.nbytes

    lines.insert(3, "Another one.")
    chunks.add(cut_body(json.dumps("\n".join(lines)).encode()))

    assert chunks.nbytes - before < before / 10


# ---- the ring ------------------------------------------------------------------------------------


def test_the_latest_come_first_and_no_more_than_asked_for(ring: Ring) -> None:
    for number in range(5):
        told(ring, ticket(chat(), [number]), f"r{number}")

    latest = ring.latest(3)

    assert [one.about.response_id for one in latest] == ["r4", "r3", "r2"]
    assert ring.latest(9, after=latest[1].number) == latest[:1]


def test_a_request_that_is_not_over_is_not_listed(ring: Ring) -> None:
    ring.begin(ticket(chat(), [1]), response_id="r", path="/", client=None)

    assert ring.latest(9) == []
    assert ring.record("r") is None


def test_requests_of_other_texts_push_out_the_oldest() -> None:
    ring = Ring(200_000)
    drawn = random.Random(0)
    for number in range(20):
        text = "".join(drawn.choices("abcdefghijklmnop \n", k=8_000))
        told(ring, ticket(chat(text), drawn.choices(range(100_000), k=2_000)), f"r{number}")
        assert ring.nbytes <= 200_000
    ring.close()

    assert ring.record("r0") is None
    assert ring.record("r19") is not None
    assert 3 < len(ring.latest(99)) < 20


@pytest.mark.parametrize("alike", [True, False])
def test_it_takes_no_more_than_its_bytes_by_the_allocator(alike: bool) -> None:
    """Prompts of 30,000 tokens: a conversation that grows, and such that share nothing."""
    limit = 1 << 20
    drawn = random.Random(0)
    words = [f"word{number}" for number in range(5_000)]
    pool, text = drawn.choices(range(150_000), k=60_000), " ".join(drawn.choices(words, k=20_000))
    tracemalloc.start()
    try:
        ring = Ring(limit)
        for number in range(20):
            start = 0 if alike else number * 700
            tokens = [*pool[start : start + 29_000], *pool[number * 500 : number * 500 + 1_000]]
            said = text if alike else "".join(drawn.choices(text, k=100_000))
            body = chat(PROSE, ("user", said), ("user", f"Turn {number}."))
            told(ring, ticket(body, tokens, 29_000), f"r{number}")
            assert ring.nbytes <= limit
        del tokens, said, body
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    ring.close()

    assert taken <= limit
    assert (len(ring.latest(99)) == 20) == alike


def test_a_body_nested_deeply_is_remembered_and_harms_no_comparison(ring: Ring) -> None:
    deep: Any = {}
    for _ in range(900):
        deep = {"properties": deep}
    body = chat()
    body["tools"][0]["function"]["parameters"] = deep
    told(ring, ticket(body, [1, 2, 3, 4]), "first")
    told(ring, ticket(body, [1, 2, 9, 9], 2), "second")

    assert ring.record("second") is not None
    assert of_openai(ring, ticket(body, [1, 2, 9, 9], 2), "first") == {"type": "unavailable"}


def test_requests_that_come_faster_than_they_are_recorded_are_let_go() -> None:
    """What waits holds whole prompts, beside the bytes that are counted."""
    go_on = threading.Event()
    ring = Ring(seconds=lambda model, tokens: float(go_on.wait(60)))
    body = chat(PROSE, *LONG)
    other = edited(body, PROSE, "Say hello." + PROSE)
    told(ring, ticket(body, prompt(body)), "first")
    for number in range(40):  # the second one is being recorded meanwhile
        id = ring.begin(ticket(other, prompt(other)), response_id=f"r{number}", path="/", client="")
        ring.end(id)
    go_on.set()

    assert ring.settle(timeout_s=60)
    assert 2 < len(ring.latest(99)) < 40
    assert ring.record("r39") is None
    assert of_openai(ring, ticket(body, prompt(body)), "r39")["type"].endswith("not_found")
    ring.close()


def test_a_body_too_large_is_remembered_without_it(ring: Ring) -> None:
    body = chat("a" * (5 << 20))
    told(ring, ticket(body, [1, 2, 3]), "r")

    assert ring.nbytes < 20_000
    assert ring.record("r") is not None


# ---- why -----------------------------------------------------------------------------------------


def test_a_request_is_compared_with_the_one_that_shares_most(ring: Ring) -> None:
    long = chat(PROSE, *LONG)
    title = {"messages": [{"role": "user", "content": "Name this."}]}
    dated = edited(long, "Write that down.", "Forget what I said so far.")
    told(ring, ticket(long, prompt(long)), "long")
    told(ring, ticket(title, prompt(title)), "title")
    shared = len(prompt(long)) - len("Write that down.")
    told(ring, ticket(dated, prompt(dated), shared, reason="it differs"), "dated")

    record = ring.record("dated")

    assert record is not None
    assert record.parted is not None
    assert record.parted.response_id == "long"
    assert record.parted.shared_tokens == shared
    assert record.parted.cause is not None
    assert record.parted.cause.kind is Kind.QUESTION


def test_prompts_that_part_at_their_first_line_are_compared_by_their_bodies(ring: Ring) -> None:
    drawn = random.Random(0)
    text = "\n".join("".join(drawn.choices("abcdefgh ", k=70)) for _ in range(200))
    first = chat(f"Today's date is 2026-11-25.\n{text}")
    second = edited(first, "2026-11-25", "2026-11-26")
    other = chat("Today's date is a day like others.")
    told(ring, ticket(first, prompt(first)), "first")
    told(ring, ticket(other, prompt(other)), "other")
    told(ring, ticket(second, prompt(second), 25), "second")

    record = ring.record("second")

    assert record is not None
    assert record.parted is not None
    assert record.parted.response_id == "first"
    assert record.parted.cause is not None
    assert record.parted.cause.kind is Kind.DATE


def test_another_clients_request_that_begins_alike_by_chance_is_none_to_compare_with(
    ring: Ring,
) -> None:
    first, second = chat("You are Ada." + PROSE), chat("You are Bob. " + PROSE.upper())
    told(ring, ticket(first, prompt(first)), "first")
    told(ring, ticket(second, prompt(second), 8), "second", client="bob/1.0")

    record = ring.record("second")

    assert record is not None
    assert record.parted is None


def test_a_prompt_that_goes_on_has_no_cause(ring: Ring) -> None:
    first, second = chat(PROSE, *LONG[:3]), chat(PROSE, *LONG)
    told(ring, ticket(first, prompt(first)), "first")
    told(ring, ticket(second, prompt(second), len(prompt(first))), "second")

    record = ring.record("second")

    assert record is not None
    assert record.parted is not None
    assert (record.parted.response_id, record.parted.cause) == ("first", None)


@pytest.mark.parametrize(("state", "kind"), [("left", Kind.GIVEN_UP), ("done", Kind.NOT_KEPT)])
def test_what_is_shared_and_not_found_is_no_fault_of_the_prompt(
    ring: Ring, state: Any, kind: Kind
) -> None:
    body = chat(PROSE, *LONG)
    tokens = prompt(body)
    told(ring, ticket(body, tokens), "first", state)
    told(ring, ticket(body, tokens, 100, reason="what is stored ends here"), "again")

    record = ring.record("again")

    assert record is not None
    assert record.parted is not None
    assert record.parted.cause is not None
    assert record.parted.cause.kind is kind
    assert record.parted.cause.lost_tokens == len(tokens) - 1 - 100


def test_a_cache_that_cannot_be_cut_loses_what_stands_before_the_parting_too(ring: Ring) -> None:
    first = chat(f"{PROSE}Today's date is 2026-11-25.\n{PROSE}")
    second = edited(first, "2026-11-25", "2026-11-26")
    tokens = prompt(first)
    told(ring, ticket(first, tokens), "first")
    told(ring, ticket(second, prompt(second), 0, reason="no checkpoint there"), "second")
    asked = ticket(second, prompt(second), 0)

    record, said = ring.record("second"), of_openai(ring, asked, "first")

    assert record is not None
    assert record.parted is not None
    assert record.parted.cause is not None
    assert record.parted.cause.kind is Kind.DATE
    assert record.parted.cause.lost_tokens == len(tokens) - 1
    assert (said["cache_missed_tokens"], said["comparison_reusable_tokens"]) == (len(tokens), 0)


def test_what_is_no_longer_there_is_no_hit_and_no_divergence(ring: Ring) -> None:
    body = chat(PROSE, *LONG)
    told(ring, ticket(body, prompt(body)), "first")
    again = ticket(body, prompt(body), 0)

    assert of_openai(ring, again, "first") == {"type": "unavailable"}
    assert of_messages(ring, again, "first") is None


def test_another_model_is_named(ring: Ring) -> None:
    body = chat(PROSE, *LONG)
    tokens = prompt(body)
    told(ring, ticket(body, tokens), "small")
    told(ring, ticket(body, tokens, model=("large", None, None)), "large")

    record = ring.record("large")

    assert record is not None
    assert record.parted is not None
    assert record.parted.cause is not None
    assert (record.parted.cause.old, record.parted.cause.new) == ("small", "large")


def test_what_was_lost_has_a_price_by_measured_speed() -> None:
    ring = Ring(seconds=lambda model, tokens: tokens / 100)
    body = chat(PROSE, *LONG)
    other = edited(body, PROSE, "Say hello." + PROSE)
    told(ring, ticket(body, prompt(body)), "first")
    told(ring, ticket(other, prompt(other)), "second")
    ring.close()

    record = ring.record("second")

    assert record is not None
    assert record.parted is not None
    assert record.parted.cause is not None
    assert record.parted.lost_s == record.parted.cause.lost_tokens / 100


# ---- in the protocols' words ---------------------------------------------------------------------


def test_a_forgotten_answer_is_said_to_be_forgotten(ring: Ring) -> None:
    now = ticket(chat(), [1, 2])

    said = of_messages(ring, now, "msg_0")
    assert said == {"cache_miss_reason": {"type": "previous_message_not_found"}}
    assert of_openai(ring, now, "chatcmpl-0") == {"type": "comparison_response_not_found"}


def test_the_first_turn_has_nothing_to_compare(ring: Ring) -> None:
    assert of_messages(ring, ticket(chat(), [1, 2]), None) is None


def test_it_is_pending_before_the_look(ring: Ring) -> None:
    assert of_messages(ring, Ticket(), "msg_0") == {"cache_miss_reason": None}


def test_an_answer_that_is_not_over_can_be_compared_with(ring: Ring) -> None:
    body = chat(PROSE, *LONG)
    ring.begin(ticket(body, prompt(body)), response_id="r", path="/", client=None)

    again = ticket(body, prompt(body), len(prompt(body)) - 1)

    assert of_openai(ring, again, "r") == {"type": "cache_hit"}


def test_what_was_pushed_out_is_not_found() -> None:
    ring = Ring(60_000)
    drawn = random.Random(0)
    for number in range(20):
        tokens = drawn.choices(range(100_000), k=5_000)
        told(ring, ticket(chat(), tokens), f"r{number}")
    ring.close()

    assert of_openai(ring, ticket(chat(), [1]), "r0") == {"type": "comparison_response_not_found"}
