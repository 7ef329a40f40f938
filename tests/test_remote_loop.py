"""The loop of a remote knows of the library's threads: whoever closes it waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import pytest

from persist_cache.remote.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    with contextlib.closing(Loop()) as made:
        yield made


def begun(loop: Loop) -> asyncio.Future[int]:
    """A request of the library's that nobody has answered."""
    made = loop.begun(loop.create_future)
    assert isinstance(made, asyncio.Future)
    return made


def on_a_thread(work: object) -> None:
    assert callable(work)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_request_is_over_when_its_answer_was_handed_over(loop: Loop) -> None:
    answer = begun(loop)
    assert not loop.wait_left(0)
    on_a_thread(lambda: loop.call_soon_threadsafe(lambda _: None, answer))

    assert loop.wait_left(0)


def test_request_is_over_when_its_answer_comes_after_the_end(loop: Loop) -> None:
    answer = begun(loop)
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.call_soon_threadsafe(lambda _: None, answer)

    assert loop.wait_left(0)


def test_request_that_was_given_up_is_over_when_its_thread_has_seen_it(loop: Loop) -> None:
    answer = begun(loop)
    on_a_thread(answer.cancelled)
    assert not loop.wait_left(0)
    answer.cancel()
    assert answer.cancelled()
    assert not loop.wait_left(0)
    on_a_thread(answer.cancelled)

    assert loop.wait_left(0)


def test_futures_of_others_are_not_waited_for(loop: Loop) -> None:
    assert not loop.create_future().done()
    assert loop.wait_left(0)
