"""The fuzz of conversations: a short run finds nothing wrong, and its judge finds what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.torture.serving import Answer, Ask, judge
from tests.torture.tiny import KINDS, write_model

REPOSITORY = Path(__file__).parent.parent
PROMPT = [1, 6, *range(20, 60), 2, 1, 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from mlx_lm import load

    mx.disable_compile()
    folder = write_model(tmp_path_factory.mktemp("models") / "plain", KINDS["plain"], 1)
    yield load(str(folder))[0]
    mx.enable_compile()


def answered(model: Any, count: int) -> Answer:
    """A greedy answer that was computed without a cache, a token at a time."""
    answer = Answer(Ask(), prompt=list(PROMPT), model=model)
    for _ in range(count):
        row = np.array(model(mx.array([answer.prompt + answer.tokens]))[0, -1])
        answer.tokens.append(int(row.argmax()))
        answer.logprobs.append(float(row.max() - np.log(np.exp(row).sum())))
    return answer


def test_right_answer_is_found_right(model: Any) -> None:
    judged = judge(answered(model, 6), 1e-3)

    assert (judged.tokens, judged.ties, judged.wrong) == (6, 0, 0)
    assert judged.worst < 1e-4


def test_wrong_token_is_found_and_those_after_it_are_compared_on_its_path(model: Any) -> None:
    answer = answered(model, 2)
    row = np.array(model(mx.array([answer.prompt + answer.tokens]))[0, -1])
    answer.tokens.append(int(row.argmin()))
    answer.logprobs.append(float(row.min() - np.log(np.exp(row).sum())))
    following = Answer(Ask(), prompt=answer.prompt + answer.tokens, model=model)
    row = np.array(model(mx.array([following.prompt]))[0, -1])
    answer.tokens.append(int(row.argmax()))
    answer.logprobs.append(float(row.max() - np.log(np.exp(row).sum())))

    judged = judge(answer, 1e-3)

    assert (judged.tokens, judged.wrong) == (4, 1)
    assert "token 2 of the reply" in judged.said


def test_token_that_is_right_with_another_probability_is_found(model: Any) -> None:
    answer = answered(model, 4)
    answer.logprobs[3] += 0.01

    assert judge(answer, 1e-3).wrong == 1


def test_answer_of_another_prompt_is_found(model: Any) -> None:
    answer = answered(model, 4)
    answer.prompt[5] += 1

    assert judge(answer, 1e-3).wrong > 0


def test_token_as_good_as_the_best_is_a_tie(model: Any) -> None:
    answer = answered(model, 1)
    row = np.array(model(mx.array([answer.prompt]))[0, -1])
    second = int(np.argsort(row)[-2])
    answer.tokens, answer.logprobs = [second], [float(row[second] - np.log(np.exp(row).sum()))]
    gap = float(row.max() - row[second])

    assert judge(answer, 2 * gap).ties == 1
    assert judge(answer, gap / 2).wrong == 1


@pytest.mark.long
def test_random_conversations_are_answered_as_without_a_cache() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture.conversations", "--json", "--minutes", "0.5"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout, done.stderr[-3000:]
    report = json.loads(done.stdout)

    assert report["findings"] == []
    assert done.returncode == 0
    assert set(report["kinds"]) == set(KINDS)
    assert report["all"]["tokens"] > 0
    assert report["all"]["from memory"] > 0
    assert report["all"]["from disk"] > 0
