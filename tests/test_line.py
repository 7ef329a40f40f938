"""Who waits for whom: a line of requests of which nothing is computed here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from persist_cache.server.flight import Flight, Line
from persist_cache.server.ticket import CutPrompt, Ticket
from persist_cache.server.underway import Underway

LOAD = object()
MODEL = ("m", None, None)
SYSTEM = list(range(1000, 1300))


class Waits(Exception):
    """Raised when somebody would have to wait."""


def pause() -> None:
    raise Waits


def nothing_known(kept: int) -> int:
    return 0


def never_asked(kept: int) -> int:
    raise AssertionError("there is nothing to look for")


def cut(tokens: Sequence[int], *, load: object = LOAD, thought: int = 0) -> CutPrompt:
    end = len(tokens) - thought
    pieces = [one for one in (tokens[:end], tokens[end:]) if one]
    return CutPrompt(load, [], tokens, pieces, ["user", "assistant"][: len(pieces)], "normal")


class Requests:
    """Requests in one line."""

    def __init__(self) -> None:
        self.line = Line()

    def come(
        self,
        tokens: Sequence[int] | None,
        model: object = MODEL,
        *,
        load: object = LOAD,
        thought: int = 0,
        **more: object,
    ) -> Flight:
        """A request comes, and its prompt is known unless it is None."""
        flight = Flight(Ticket(), model, **more)  # type: ignore[arg-type]
        self.line.enter(flight)
        if tokens is not None:
            flight.ticket.tokenized(cut(tokens, load=load, thought=thought))
        return flight

    def computing(self, *args: object, anywhere: bool = True, **more: object) -> Flight:
        """A request whose prompt is being computed from its first token on."""
        flight = self.come(*args, **more)  # type: ignore[arg-type]
        self.line.queued(flight)
        flight.ticket.underway.begin(0, anywhere=anywhere)
        return flight

    def waits(
        self,
        flight: Flight,
        known: Callable[[int], int] = nothing_known,
    ) -> bool:
        """Whether a request waits for what is computed for another one."""
        try:
            self.line.wait_for_shared(flight, known, pause, 0)
        except Waits:
            return True
        return False

    def has_turn(self, flight: Flight) -> bool:
        try:
            self.line.wait_for_turn(flight, pause, 0)
        except Waits:
            return False
        return True


def prompt(number: int, count: int = 500) -> list[int]:
    return [number, *range(count)]


def test_the_same_prompt_waits_until_it_is_computed() -> None:
    requests = Requests()
    first = requests.computing(prompt(1))
    second = requests.come(prompt(1))
    steps = iter([256, 500])

    def compute() -> None:
        if (done := next(steps, 0)) == 0:
            raise Waits
        first.ticket.underway.reached(done)
        if done == 500:
            first.ticket.underway.kept(done)

    before = requests.line.wait_for_shared(second, lambda kept: kept, compute, 0)

    assert before == 0
    assert not list(steps)


@pytest.mark.parametrize(
    "other",
    [
        {"model": ("n", None, None)},
        {"model": ("m", "adapter", None)},
        {"model": ("m", None, "draft")},
        {"load": object()},
        {"salt": b"other"},
        {"shares_nothing": True},
    ],
    ids=["model", "adapter", "draft", "load", "salt", "images"],
)
def test_what_is_computed_for_another_owner_is_not_waited_for(other: dict[str, object]) -> None:
    requests = Requests()
    requests.computing(prompt(1), **other)  # type: ignore[arg-type]

    assert not requests.waits(requests.come(prompt(1)), never_asked)


def test_prompts_that_share_less_wait_for_nothing_and_look_for_nothing() -> None:
    requests = Requests()
    requests.computing(prompt(1))
    requests.computing([*SYSTEM[:255], *prompt(2)])

    for tokens in (prompt(3), [*SYSTEM[:255], *prompt(4)], prompt(1)[:256], [1, 2]):
        assert not requests.waits(requests.come(tokens), never_asked)
    assert requests.waits(requests.come([*SYSTEM[:255], *prompt(2)[:2], 9]))


def test_what_is_known_is_not_waited_for() -> None:
    requests = Requests()
    requests.computing([*SYSTEM, *prompt(1)])
    follower = requests.come([*SYSTEM, *prompt(2)])

    assert not requests.waits(follower, lambda kept: len(SYSTEM))
    assert not requests.waits(follower, lambda kept: len(SYSTEM) - 255)
    assert requests.waits(follower, lambda kept: len(SYSTEM) - 256)


def test_nobody_waits_for_one_who_came_later() -> None:
    requests = Requests()
    first = requests.come(prompt(1))
    requests.computing(prompt(1))

    assert not requests.waits(first, never_asked)
    assert requests.has_turn(first)


def test_the_one_that_shares_most_is_waited_for() -> None:
    requests = Requests()
    requests.computing([*SYSTEM, *prompt(1)])
    most = requests.computing([*SYSTEM, *prompt(2)])
    requests.computing([*SYSTEM, *prompt(2)])
    follower = requests.come([*SYSTEM, *prompt(2)])

    seen = []

    def look() -> None:
        seen.append(most.ticket.underway.followers)
        raise Waits

    with pytest.raises(Waits):
        requests.line.wait_for_shared(follower, nothing_known, look, 0)

    assert seen == [1]
    assert most.ticket.underway.followers == 0


def test_what_is_shared_is_kept_where_the_prompts_part() -> None:
    requests = Requests()
    first = requests.computing([*SYSTEM, *prompt(1)])

    requests.waits(requests.come([*SYSTEM, *prompt(2)]))

    assert first.ticket.underway.next_place(0, 10_000) == len(SYSTEM)


@pytest.mark.parametrize("anywhere", [True, False])
def test_what_was_passed_is_waited_for_if_a_longer_cache_can_be_cut(anywhere: bool) -> None:
    requests = Requests()
    first = requests.computing([*SYSTEM, *prompt(1)], anywhere=anywhere)
    first.ticket.underway.reached(400)
    follower = requests.come([*SYSTEM, *prompt(2)])

    assert requests.waits(follower) == anywhere
    first.ticket.underway.kept(512)
    assert not requests.waits(follower, lambda kept: len(SYSTEM))


@pytest.mark.parametrize("anywhere", [True, False])
def test_what_is_not_kept_is_not_waited_for(anywhere: bool) -> None:
    """The open thought at the end of a prompt, and what sampling looks back at."""
    requests = Requests()
    first = requests.computing(prompt(1), anywhere=anywhere, thought=8)
    second = requests.computing(prompt(2), anywhere=anywhere, leave_tokens=20)
    followers = requests.come([*prompt(1), 5, 6]), requests.come([*prompt(2), 5, 6])

    for follower in followers:
        assert requests.waits(follower)
    for one, place in ((first, 501 - 8), (second, 501 - 20)):
        assert one.ticket.underway.next_place(0, 10_000) == place
        one.ticket.underway.kept(place)
    for follower in followers:
        assert not requests.waits(follower, never_asked)


def test_one_that_ends_before_is_waited_for_no_more() -> None:
    requests = Requests()
    first, second = requests.computing(prompt(1)), requests.computing(prompt(1))
    third = requests.come(prompt(1))

    assert requests.waits(third)
    first.ticket.prefilled()
    assert requests.waits(third)
    requests.line.leave(second)
    assert not requests.waits(third, never_asked)


def test_what_was_kept_and_cannot_be_found_is_waited_for_once() -> None:
    """Memory may be too small, and the disk off: then everybody computes, at the same time."""
    requests = Requests()
    first, second = requests.computing(prompt(1)), requests.computing(prompt(1))
    third = requests.come(prompt(1))

    def keep() -> None:
        assert not second.ticket.underway.followers
        first.ticket.underway.kept(500)

    requests.line.wait_for_shared(third, nothing_known, keep, 0)


def test_an_earlier_prompt_has_to_be_known_or_over() -> None:
    requests = Requests()
    first, second, third = (requests.come(None) for _ in range(3))
    later = requests.come(prompt(1))

    assert requests.has_turn(first)
    assert not requests.has_turn(later)
    first.ticket.tokenized(cut(prompt(2)))
    second.ticket.prefilled()
    assert not requests.has_turn(later)
    third.ticket.tokenized(cut(prompt(3)))
    assert requests.has_turn(later)


def test_a_request_for_another_model_waits_for_those_that_are_held_back() -> None:
    requests = Requests()
    earlier = requests.come(prompt(1))
    other = requests.come(None, ("n", None, None))
    same = requests.come(prompt(2))

    assert not requests.has_turn(other)
    assert not requests.has_turn(same)
    requests.line.queued(earlier)
    assert requests.has_turn(other)
    requests.line.queued(other)
    assert requests.has_turn(same)


def test_images_are_waited_for_by_nobody() -> None:
    requests = Requests()
    requests.come(None, shares_nothing=True)

    assert requests.has_turn(requests.come(prompt(1)))


def test_who_waits_is_woken_by_a_prompt_that_becomes_known() -> None:
    requests = Requests()
    first, second = requests.come(None), requests.come(prompt(1))
    waits = threading.Event()

    def wait() -> None:
        waits.set()
        requests.line.wait_for_turn(second, lambda: None, 60)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waits.wait(60)
    first.ticket.tokenized(cut(prompt(2)))
    thread.join(30)

    assert not thread.is_alive()


followed, entered = Underway.followed, list[Any]()


def follow_for_ever(underway: Underway, came: float) -> AbstractContextManager[None]:
    entered.append(followed(underway, came))
    entered[-1].__enter__()
    return nullcontext()


BREAKS: dict[str, tuple[type, str, Callable[..., Any], Callable[[], None]]] = {
    "it is switched off": (
        Line,
        "wait_for_shared",
        lambda *_, **__: None,
        test_the_same_prompt_waits_until_it_is_computed,
    ),
    "nobody is told that one has passed": (
        Underway,
        "kept",
        lambda *_: None,
        test_the_same_prompt_waits_until_it_is_computed,
    ),
    "nobody is told that one has ended": (
        Underway,
        "end",
        lambda *_: False,
        test_one_that_ends_before_is_waited_for_no_more,
    ),
    "nobody is told that one has died": (
        Line,
        "leave",
        lambda *_: None,
        test_one_that_ends_before_is_waited_for_no_more,
    ),
    "whoever is gone still counts": (
        Underway,
        "followed",
        follow_for_ever,
        test_the_one_that_shares_most_is_waited_for,
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_break_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner, method, broken, test = BREAKS[name]
    test()
    monkeypatch.setattr(owner, method, broken)

    with pytest.raises((AssertionError, Waits)):
        test()
