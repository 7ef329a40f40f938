"""What `--stabilize` and its header may say."""

from __future__ import annotations

import pytest

from persist_cache.stability.names import DEFAULTS, REPAIRS, parse_names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", frozenset()),
        ("all", frozenset(REPAIRS)),
        ("date", DEFAULTS | {"date"}),
        (" env , date", DEFAULTS | {"env", "date"}),
        ("billing", DEFAULTS),
    ],
)
def test_names_add_to_what_is_done_anyway_but_for_none(text: str, expected: frozenset[str]) -> None:
    assert parse_names(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dats", "no repair 'dats'; did you mean 'date'?"),
        ("remainders,env", "did you mean 'reminders'?"),
        ("env,", "a name is missing"),
        ("", "a name is missing"),
        ("env,none", "'none' stands alone"),
        ("all,date", "'all' stands alone"),
        ("x" * 1000, "'" + "x" * 40 + "'"),
    ],
)
def test_name_of_no_repair_is_refused_in_a_sentence_with_the_nearest(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{10,300}$") as refused:
        parse_names(text)

    assert said in str(refused.value)
