"""A prefill that is interrupted keeps what it computed, and whoever asks again goes on from there.

What was computed is counted at the model's calls. What goes on has the bits of what was never
interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.generate import BatchGenerator

from persist_cache import Store
from persist_cache.entry import PARTIAL_LABEL
from persist_cache.server import underway
from persist_cache.server.ticket import Ticket
from persist_cache.server.upstream.batch import Batch
from persist_cache.server.validation import RefusedError
from persist_cache.store.evict import Evictor
from persist_cache.tokens import pack_tokens
from tests.holding import CHAT, STEP, WAYS, Gate, held_up, models_in
from tests.loops import Answered, Loop, words
from tests.waiting import until

KEPT_KINDS = ["plain", "sliding", "hybrid", "convolutions"]
CUT = 3 * STEP
"""Tokens that are computed before anything happens."""
LAST = 247
"""Tokens of the prompt but the last, which is computed with the reply."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return models_in(tmp_path_factory.mktemp("models"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(underway, "PATIENCE_S", 0.0)


class Client:
    """A client that may leave."""

    def __init__(self) -> None:
        self._gone = threading.Event()
        self.ticket = Ticket()
        self.ticket.has_left = self._gone.is_set

    def leave(self) -> None:
        self._gone.set()

    def is_over(self) -> bool:
        """Whether nothing more is computed of its prompt."""
        return self.ticket.underway.has_ended


def bits(loop: Loop, **sampling: Any) -> tuple[Answered, list[tuple[int, float]]]:
    """An answer, with the log probability of each of its tokens."""
    said: list[tuple[int, float]] = []

    def read(answer: Iterator[Any]) -> list[Any]:
        found = list(answer)
        said.extend((one.token, one.logprob) for one in found)
        return found

    return loop.ask(CHAT, read=read, **sampling), said


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KEPT_KINDS)
def test_prefill_that_is_cut_is_kept_and_gone_on_with(
    model: Callable[[str], Path], kind: str, way: str, impatient: None
) -> None:
    with Loop(model(kind), prefill_step_size=STEP) as loop:
        loop.ask(text="w1 w2")
        whole, right = bits(loop, **WAYS[way])
    client = Client()
    with Loop(model(kind), prefill_step_size=STEP) as loop:
        with held_up(loop, CUT, client.ticket, **WAYS[way]) as asked:
            client.leave()
        with pytest.raises(ConnectionAbortedError):
            asked.result()
        until(client.is_over)
        computed = loop.prefilled()
        again, said = bits(loop, **WAYS[way])

        assert 0 < computed < len(whole.prompt) - 1 - STEP
        assert again.cached == computed
        assert again.ticket.fetch is not None
        assert again.ticket.fetch.source == "memory"
        assert computed + loop.prefilled() == len(whole.prompt) - 1
        assert said == right


@pytest.mark.parametrize("way", WAYS)
def test_prompt_that_is_cut_at_the_end_of_a_piece_leaves_that_piece(
    model: Callable[[str], Path], way: str, tmp_path: Path, impatient: None
) -> None:
    """The system part is one, whatever becomes of the rest."""
    client = Client()
    with Loop(model("hybrid"), tmp_path / "store", prefill_step_size=STEP) as loop:
        with held_up(loop, STEP, client.ticket, **WAYS[way]) as asked:
            client.leave()
        with pytest.raises(ConnectionAbortedError):
            asked.result()
        until(client.is_over)
        loop.cache.flush()
        assert loop.cache.store is not None
        kept = {(one.tier.label, one.num_tokens, one.label) for one in loop.cache.store.entries()}

    assert ("system", 45, "") in kept


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_prompt_that_is_cut_again_and_again_is_computed_once(
    model: Callable[[str], Path], kind: str, impatient: None
) -> None:
    total = 0
    with Loop(model(kind), prefill_step_size=STEP) as loop:
        for cut in (1, 2, 3):
            client = Client()
            with held_up(loop, STEP, client.ticket) as asked:
                client.leave()
            with pytest.raises(ConnectionAbortedError):
                asked.result()
            until(client.is_over)
            total += loop.prefilled()
            assert total >= cut * STEP
        answered = loop.ask(CHAT)
        total += loop.prefilled()

        assert total == len(answered.prompt) - 1


@pytest.mark.parametrize("way", WAYS)
def test_prefill_goes_on_for_a_client_that_may_come_back(
    model: Callable[[str], Path], way: str
) -> None:
    """It completes, nobody is answered, and the retry finds all of it."""
    client = Client()
    with Loop(model("plain"), prefill_step_size=STEP) as loop:
        with held_up(loop, CUT, client.ticket, **WAYS[way]) as asked:
            client.leave()
            with pytest.raises(ConnectionAbortedError):
                asked.result(60)
        until(client.is_over)
        again = loop.ask(CHAT, **WAYS[way])

        assert again.cached == len(again.prompt) - 1
        assert loop.prefilled() == len(again.prompt) - 1


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_retry_takes_over_what_is_computed_for_nobody(
    model: Callable[[str], Path], kind: str
) -> None:
    """Beside each other in one batch, both would compute the same."""
    client = Client()
    with Loop(model(kind), prefill_step_size=STEP) as loop, ThreadPoolExecutor(1) as others:
        loop.generator._time_budget = [None]  # upstream looks at the queue after each chunk
        with held_up(loop, CUT, client.ticket) as asked:
            client.leave()
            retry = others.submit(loop.ask, CHAT)
            until(lambda: not loop.generator.requests.empty())
        with pytest.raises(ConnectionAbortedError):
            asked.result()

        assert CUT <= retry.result().cached < LAST
        assert loop.prefilled() == LAST


@pytest.mark.parametrize("way", WAYS)
def test_prefill_that_another_request_waits_for_goes_on(
    model: Callable[[str], Path], way: str, impatient: None
) -> None:
    client = Client()
    with Loop(model("plain"), prefill_step_size=STEP) as loop:
        with client.ticket.underway.followed(0.0):
            with held_up(loop, CUT, client.ticket, **WAYS[way]) as asked:
                client.leave()
                with pytest.raises(ConnectionAbortedError):
                    asked.result(60)
            until(client.is_over)

        assert loop.ask(CHAT).cached == len(client.ticket.prompt.tokens) - 1  # type: ignore[union-attr]


def test_prefill_beside_which_nothing_is_computed_makes_way_for_who_waits(
    model: Callable[[str], Path],
) -> None:
    """Served alone, it would keep the retry itself from being looked at."""
    client = Client()
    with Loop(model("plain"), prefill_step_size=STEP) as loop, ThreadPoolExecutor(1) as others:
        with held_up(loop, CUT, client.ticket, seed=1) as asked:
            retry = others.submit(loop.ask, CHAT, seed=1)
            until(lambda: not loop.generator.requests.empty())
            client.leave()
        with pytest.raises(ConnectionAbortedError):
            asked.result()

        assert CUT <= retry.result().cached < len(retry.result().prompt) - 1
        assert loop.prefilled() == len(retry.result().prompt) - 1


def test_prefill_of_nobody_makes_way_for_who_waits_for_the_end_of_the_batch(
    model: Callable[[str], Path],
) -> None:
    """A request that cannot be in it, for another model or with a seed."""
    client = Client()
    with Loop(model("plain"), prefill_step_size=STEP) as loop, ThreadPoolExecutor(1) as others:
        loop.generator._time_budget = [None]  # upstream looks at the queue after each chunk
        with held_up(loop, CUT, client.ticket) as asked:
            other = others.submit(loop.ask, text="w1 w2", seed=1)
            until(lambda: not loop.generator.requests.empty())
            client.leave()
        with pytest.raises(ConnectionAbortedError):
            asked.result()

        assert other.result().reply
        assert loop.ask(CHAT).cached < LAST


@pytest.mark.parametrize("way", WAYS)
def test_client_that_leaves_while_it_is_answered_ends_the_answer(
    model: Callable[[str], Path], way: str
) -> None:
    """However patient a prefill is."""
    client = Client()
    count = 0

    def read(answer: Iterator[Any]) -> list[Any]:
        nonlocal count
        for _ in answer:
            count += 1
            if count == 3:
                client.leave()
        return []

    with Loop(model("plain")) as loop:
        with pytest.raises(ConnectionAbortedError):
            loop.ask(
                CHAT,
                ticket=client.ticket,
                read=read,
                max_tokens=1 << 30,
                **WAYS[way],
            )
        after = loop.ask(text="w1 w2", seed=2)

    assert count == 3
    assert after.reply


def test_client_that_leaves_behind_a_full_batch_is_noticed(
    model: Callable[[str], Path], impatient: None
) -> None:
    """Upstream reports nothing of a prompt while as many answers as it takes are under way."""
    enough = threading.Event()

    def read(answer: Iterator[Any]) -> list[Any]:
        for _ in answer:
            if enough.is_set():
                break
        return []

    client, short = Client(), [{"role": "user", "content": "w3 w4"}]
    options: dict[str, Any] = {
        "prefill_step_size": STEP,
        "decode_concurrency": 2,
        "prompt_concurrency": 2,
    }
    with Loop(model("plain"), **options) as loop, ThreadPoolExecutor(3) as clients:
        gate = Gate(loop, STEP)
        first = clients.submit(loop.ask, short, read=read, max_tokens=1 << 30)
        asked = clients.submit(loop.ask, CHAT, ticket=client.ticket)
        second = clients.submit(loop.ask, text="w5 w6 w7", read=read, max_tokens=1 << 30)
        gate.open()
        # One of three waits for a place; whichever does, none is stuck.
        client.leave()
        with pytest.raises(ConnectionAbortedError):
            asked.result(60)
        until(client.is_over)
        enough.set()
        first.result(60)
        second.result(60)

        assert loop.ask(CHAT).reply


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["plain", "sliding", "hybrid"])
def test_server_that_ends_keeps_what_is_being_computed(
    model: Callable[[str], Path], kind: str, way: str, tmp_path: Path
) -> None:
    """On disk, so that the next one goes on from there."""
    store = tmp_path / "store"
    with (
        ThreadPoolExecutor(1) as ending,
        Loop(model(kind), store, prefill_step_size=STEP) as loop,
    ):
        with held_up(loop, CUT, Ticket(), **WAYS[way]) as asked:
            ended = ending.submit(loop.generator.stop_and_join)
            until(lambda: loop.generator.is_ending)
        with pytest.raises(RefusedError, match="The server is stopping"):
            asked.result()
        ended.result()
        computed = loop.prefilled()
    with Loop(model(kind), store, prefill_step_size=STEP) as loop:
        loop.ask(text="w1 w2")
        loop.count()
        again = loop.ask(CHAT, **WAYS[way])

        assert CUT <= computed < len(again.prompt) - 1 - STEP
        assert again.ticket.fetch is not None
        assert again.ticket.fetch.source == "disk"
        assert again.cached == computed
        assert computed + loop.prefilled() == len(again.prompt) - 1


def test_requests_that_wait_when_the_server_ends_are_told_in_a_sentence(
    model: Callable[[str], Path],
) -> None:
    with Loop(model("plain"), prefill_step_size=STEP) as loop, ThreadPoolExecutor(2) as others:
        with held_up(loop, CUT, Ticket(), seed=1):
            queued = others.submit(loop.ask, text=words(3, 20))
            until(lambda: not loop.generator.requests.empty())
            ended = others.submit(loop.generator.stop_and_join)
            until(lambda: loop.generator.is_ending)

        with pytest.raises(RefusedError, match=r"The server is stopping; ask again"):
            queued.result()
        ended.result()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed is saved after each chunk."""
    monkeypatch.setattr(underway, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(underway, "_SAVE_EVERY_SHARE", 0.0)
    monkeypatch.setattr(underway, "LEAST_SAVED_BYTES", 0)


MODES: dict[str, dict[str, Any]] = {"plain": {}, "seed": {}, "kv_bits": {"kv_bits": 8}, "draft": {}}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_computed_is_on_disk_while_the_rest_is_computed(
    model: Callable[[str], Path], mode: str, tmp_path: Path, eager: None
) -> None:
    """Nothing of it is left when the prompt is complete, and nothing is written twice."""
    options: dict[str, Any] = dict(MODES[mode])
    if mode == "draft":
        options["draft"] = model("draft")
    folder = model("quantized" if mode == "kv_bits" else "plain")
    sampling: dict[str, Any] = {"seed": 1} if mode == "seed" else {}
    with Loop(folder, tmp_path / "store", prefill_step_size=STEP, **options) as loop:
        store = loop.cache.store
        assert store is not None
        loop.ask(text="w1 w2", **sampling)
        with held_up(loop, CUT, Ticket(), **sampling) as asked:
            longest = until(
                lambda: max(
                    (one.num_tokens for one in store.entries() if one.label == PARTIAL_LABEL),
                    default=0,
                )
            )
            assert longest >= STEP
        answered = asked.result()
        loop.cache.flush()

        lengths = {entry.num_tokens: entry.label for entry in store.entries()}
        rows = rows_of(store, answered.prompt)

    assert set(lengths.values()) == {""}
    assert len(answered.prompt) - 1 in lengths
    assert longest not in lengths
    assert sorted(rows) == list(range(len(answered.prompt) - 1))


def rows_of(store: Store, prompt: Sequence[int]) -> list[int]:
    """Positions of a prompt's tokens whose rows are in files; more than once where they are so."""
    found: list[int] = []
    with store.read() as txn:
        for number, blob in txn.blobs():
            end = blob.start + blob.num_tokens
            tokens = txn.tokens(number, 0, blob.num_tokens)
            if tokens == pack_tokens(prompt[blob.start : end]):
                found += range(blob.start, end)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["sliding", "hybrid"])
def test_states_are_on_disk_while_the_rest_is_computed_if_they_are_small(
    model: Callable[[str], Path],
    kind: str,
    way: str,
    tmp_path: Path,
    eager: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the newest, and none when the prompt is complete."""
    monkeypatch.setattr(underway, "STATES_EVERY_S", 0.0)
    monkeypatch.setattr(underway, "STATES_SHARE", 1e9)
    with Loop(model(kind), tmp_path / "store", prefill_step_size=STEP) as loop:
        store = loop.cache.store
        assert store is not None
        with held_up(loop, CUT, Ticket(), **WAYS[way]) as asked:
            until(lambda: PARTIAL_LABEL in {one.label for one in store.entries()})
            loop.cache.flush()
            partial = [one for one in store.entries() if one.label == PARTIAL_LABEL]
        answered = asked.result()
        loop.cache.flush()
        labels = {entry.label for entry in store.entries()}
        computed = loop.prefilled()

    assert len(partial) == 1
    assert labels == {""}
    assert computed == len(answered.prompt) - 1


@pytest.mark.parametrize("kind", ["sliding", "hybrid"])
def test_no_state_is_saved_on_the_way(
    model: Callable[[str], Path], kind: str, tmp_path: Path, eager: None
) -> None:
    """Unless it takes long."""
    assert kept_for(model(kind), tmp_path) == {("system", 45), ("user", 247)}


def test_short_prefill_is_saved_as_it_was_before(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    assert kept_for(model("plain"), tmp_path) == {("system", 45), ("user", 247)}


def kept_for(folder: Path, tmp_path: Path) -> set[tuple[str, int]]:
    """What is kept of a prompt, if nothing was kept and replaced on the way."""
    with Loop(folder, tmp_path / "store", prefill_step_size=STEP) as loop:
        loop.ask(CHAT)
        loop.cache.flush()
        store = loop.cache.store
        assert store is not None
        assert "replaced" not in store.stats().counters
        kept = {(entry.tier.label, entry.num_tokens) for entry in store.entries()}
    return {one for one in kept if one[0] != "assistant"}


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_cut_prompt_is_replaced_when_it_completes(
    model: Callable[[str], Path], kind: str, tmp_path: Path, impatient: None
) -> None:
    client = Client()
    with Loop(model(kind), tmp_path / "store", prefill_step_size=STEP) as loop:
        store = loop.cache.store
        assert store is not None
        with held_up(loop, CUT, client.ticket) as asked:
            client.leave()
        with pytest.raises(ConnectionAbortedError):
            asked.result()
        until(client.is_over)
        loop.cache.flush()
        labels = {entry.num_tokens: entry.label for entry in store.entries()}
        cut = loop.prefilled()
        answered = loop.ask(CHAT)
        loop.cache.flush()
        after = {entry.num_tokens for entry in store.entries()}

    assert labels[cut] == PARTIAL_LABEL
    assert answered.cached == cut
    assert cut not in after
    assert len(answered.prompt) - 1 in after


BREAKS: dict[str, tuple[dict[tuple[Any, str], Any], Callable[..., None], tuple[Any, ...]]] = {
    "it is never cut": (
        {(underway.Underway, "is_given_up"): lambda self: False},
        test_prefill_that_is_cut_is_kept_and_gone_on_with,
        ("plain", "batched", "impatient"),
    ),
    "what is cut is dropped": (
        {(Batch, "remove"): BatchGenerator.remove},
        test_prefill_that_is_cut_is_kept_and_gone_on_with,
        ("hybrid", "batched", "impatient"),
    ),
    "what is cut is dropped, alone": (
        {(underway.Underway, "is_new"): lambda self, num_tokens: False},
        test_prefill_that_is_cut_is_kept_and_gone_on_with,
        ("plain", "alone", "impatient"),
    ),
    "nobody is followed": (
        {(underway.Underway, "followed"): lambda self, came: contextlib.nullcontext()},
        test_prefill_that_another_request_waits_for_goes_on,
        ("batched", "impatient"),
    ),
    "nothing is in the way": (
        {(underway.Underway, "hurry"): lambda self, came: None},
        test_prefill_of_nobody_makes_way_for_who_waits_for_the_end_of_the_batch,
        (),
    ),
    "the end cuts nothing": (
        {
            (underway.Underway, "cut"): lambda self: None,
            (underway.Underway, "keep_now"): lambda self: None,
        },
        test_server_that_ends_keeps_what_is_being_computed,
        ("plain", "batched", "tmp_path"),
    ),
    "nothing is saved on the way": (
        {(underway.Underway, "claims_saving"): lambda self, *sizes: False},
        test_what_is_computed_is_on_disk_while_the_rest_is_computed,
        ("plain", "tmp_path", "eager"),
    ),
    "what was on the way stays": (
        {(Evictor, "retire"): lambda self, numbers: None},
        test_cut_prompt_is_replaced_when_it_completes,
        ("hybrid", "tmp_path", "impatient"),
    ),
}
"""What is left out, the test that has to find it, and its arguments: fixtures, or their values."""


@pytest.mark.parametrize("name", BREAKS)
def test_part_that_is_left_out_is_found_out(
    model: Callable[[str], Path],
    name: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left_out, test, given = BREAKS[name]
    fixtures = ("impatient", "eager", "tmp_path")
    arguments = [request.getfixturevalue(one) if one in fixtures else one for one in given]
    wait = functools.partial(until, timeout_s=2)
    monkeypatch.setitem(globals(), "until", wait)
    for (owner, attribute), value in left_out.items():
        monkeypatch.setattr(owner, attribute, value)

    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(model, *arguments)
