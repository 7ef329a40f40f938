"""Why two prompts part: the cause, its place, what it costs, and what would mend it."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persist_cache.prefill.loading import load_tokenizer
from persist_cache.server.rendering import decode, read_request, render
from persist_cache.stability.causes.cause import Cause, Parting, cause_of
from persist_cache.stability.causes.kinds import Kind
from persist_cache.stability.causes.reading import read_body
from persist_cache.stability.causes.shapes import shape, shared
from persist_cache.stability.names import REPAIRS
from tests.pairs import LONG, PROSE, Body, Pair, all_pairs, chat, edited, messages
from tests.tiny_models import build_model_dir

PAIRS = all_pairs()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(build_model_dir(tmp_path_factory.mktemp("model"))))


def common(one: list[int], other: list[int]) -> int:
    places = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in places if a != b), min(len(one), len(other)))


def parting_of(tokenizer: Any, first: Body, second: Body) -> Parting:
    """Where the prompts of two bodies part, unrepaired, by the template of a tiny model."""
    asked = (read_request(one, stabilize=frozenset()) for one in (first, second))
    old, new = (render(tokenizer, one).tokens for one in asked)
    at = common(old, new)
    head, *rest = (decode(tokenizer, one) for one in (new[at - 24 : at], old[at:], new[at:]))
    return Parting(at, len(old), len(new), head, *(one[:120] for one in rest))


def cause(tokenizer: Any, first: Body, second: Body) -> Cause | None:
    parting = parting_of(tokenizer, first, second)
    return cause_of(read_body(first), read_body(second), parting)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_what_differs_is_named_with_its_place_and_its_repair(tokenizer: Any, pair: Pair) -> None:
    found = cause(tokenizer, pair.first, pair.second)

    assert found is not None
    assert (found.kind, found.at, found.repairs) == (pair.kind, pair.at, pair.repairs)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_cost_is_what_the_earlier_prompt_has_behind_the_parting(tokenizer: Any, pair: Pair) -> None:
    old, new = (render(tokenizer, read_request(one)).tokens for one in (pair.first, pair.second))
    found = cause(tokenizer, pair.first, pair.second)

    assert found is not None
    assert found.position == common(old, new)
    assert found.lost_tokens == min(len(old), len(new) - 1) - common(old, new)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_texts_are_those_of_both_sides_from_the_character_on(tokenizer: Any, pair: Pair) -> None:
    found = cause(tokenizer, pair.first, pair.second)

    assert found is not None
    assert found.character is not None
    assert found.old != found.new
    assert found.old.isprintable()
    assert found.new.isprintable()


@pytest.mark.parametrize("make", [chat, messages])
def test_a_conversation_that_goes_on_has_no_cause(tokenizer: Any, make: Any) -> None:
    assert cause(tokenizer, make(PROSE, *LONG[:3]), make(PROSE, *LONG)) is None


def test_the_same_request_again_has_no_cause(tokenizer: Any) -> None:
    assert cause(tokenizer, chat(PROSE, *LONG), chat(PROSE, *LONG)) is None


def test_several_changes_of_one_text_are_all_named(tokenizer: Any) -> None:
    said = "Working directory: /home/ada/parser\nPlatform: linux\nToday's date is 2026-11-25.\n"
    first = chat(f"{PROSE}{said}{PROSE}")
    second = edited(edited(first, "/home/ada/parser", "/srv/lexer"), "2026-11-25", "2026-11-26")

    found = cause(tokenizer, first, second)

    assert found is not None
    assert (found.kind, found.also) == (Kind.ENV, (Kind.DATE,))
    assert found.repairs == ("env", "date")


def test_the_change_at_the_parting_is_named_though_another_stands_first_in_the_body(
    tokenizer: Any,
) -> None:
    # This template prints the tools behind the system message.
    first = chat(f"{PROSE}Today's date is 2026-11-25.\n")
    second = edited(first, "2026-11-25", "2026-11-26")
    second["tools"].reverse()

    found = cause(tokenizer, first, second)

    assert found is not None
    assert found.kind is Kind.DATE


def test_what_a_repair_took_out_is_no_cause(tokenizer: Any) -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1.{}; cc_entrypoint=cli;"
    first, second = (messages(f"{billing.format(number)}\n{PROSE}") for number in "12")
    parting = Parting(50, 80, 80)

    taken_out = [read_body(one, repaired=["billing"]) for one in (first, second)]
    left_in = [read_body(one) for one in (first, second)]

    assert cause_of(taken_out[0], taken_out[1], Parting(79, 80, 80)) is None
    found = cause_of(left_in[0], left_in[1], parting)
    assert found is not None
    assert (found.kind, found.repairs) == (Kind.BILLING, ("billing",))
    assert found.switches == ("CLAUDE_CODE_ATTRIBUTION_HEADER=0",)


def test_what_was_repaired_is_not_advised(tokenizer: Any) -> None:
    tools = next(one for one in PAIRS if one.name == "tools-reversed")
    dated = next(one for one in PAIRS if one.name == "date-iso-chat")
    sides = [
        [read_body(one, repaired=["tools", "date"]) for one in (pair.first, pair.second)]
        for pair in (tools, dated)
    ]

    assert cause_of(sides[0][0], sides[0][1], Parting(79, 80, 80)) is None
    found = cause_of(
        sides[1][0], sides[1][1], Parting(60, 80, 80)
    )  # it was moved, and differs there
    assert found is not None
    assert (found.kind, found.repairs) == (Kind.DATE, ())


def test_countdown_is_named() -> None:
    said = "<total_tokens>{} tokens left</total_tokens>"
    first, second = (messages(PROSE + said.format(number)) for number in (1999, 1203))

    found = cause_of(read_body(first), read_body(second), Parting(50, 80, 80))

    assert found is not None
    assert (found.kind, found.repairs) == (Kind.COUNTDOWN, ("countdown",))


FORGETTING = (
    "{%- set ns = namespace(last=0) -%}{%- for one in messages if one.role == 'user' -%}"
    "{%- set ns.last = messages.index(one) -%}{%- endfor -%}"
    "{%- for one in messages %}<|im_start|>{{ one.role }}\n"
    "{% if one.reasoning_content and loop.index0 > ns.last %}<think>{{ one.reasoning_content }}"
    "</think>{% endif %}{{ one.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def with_template(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = build_model_dir(tmp_path_factory.mktemp("templates"))

    def load(template: str) -> Any:
        (folder / "chat_template.jinja").write_text(template)
        return load_tokenizer(str(folder))

    return load


def test_a_template_that_prints_later_system_messages_at_the_head_is_named() -> None:
    # Where `inline-system` may not be done; else there is nothing to part.
    first = chat(PROSE, *LONG[:3])
    second = chat(PROSE, *LONG[:3], ("system", "Plan only."), ("user", "Go on."))

    found = cause_of(read_body(first), read_body(second), Parting(40, 200, 240))

    assert found is not None
    assert (found.kind, found.where, found.repairs) == (Kind.INLINE_SYSTEM, "", ("inline-system",))
    assert found.lost_tokens == 160


def test_a_template_that_forgets_thoughts_with_the_next_question_is_named(
    with_template: Any,
) -> None:
    first = chat(PROSE, LONG[0])
    thought = {"role": "assistant", "content": "I look.", "reasoning_content": "What is it? " * 9}
    first["messages"] += [thought, {"role": "tool", "content": "A parser. " * 9}]
    second = copy.deepcopy(first)
    second["messages"] += [
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "?"},
    ]

    found = cause(with_template(FORGETTING), first, second)

    assert found is not None
    assert (found.kind, found.where, found.repairs) == (Kind.THINKING, "", ("thinking",))


def test_a_template_that_drops_thoughts_is_named() -> None:
    first = chat(PROSE, LONG[0], ("assistant", "<think>Hm.</think>Yes."), ("user", "Sure?"))
    second = chat(PROSE, LONG[0], ("assistant", "<think>Hm.</think>Yes."), ("user", "Sure?"))
    second["messages"] += [
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "?"},
    ]

    found = cause_of(read_body(first), read_body(second), Parting(90, 200, 240))

    assert found is not None
    assert (found.kind, found.repairs) == (Kind.THINKING, ("thinking",))


def test_a_tools_result_that_the_client_took_out_is_named(tokenizer: Any) -> None:
    first = chat(PROSE, *LONG)
    second = edited(first, LONG[1][1], "[Old tool result content cleared]")

    found = cause(tokenizer, first, second)

    assert found is not None
    assert (found.kind, found.repairs) == (Kind.RESULT_CLEARED, ())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("reasoning_effort", "low"),
        ("thinking", {"type": "disabled"}),
    ],
)
def test_an_option_that_changes_the_prompt_is_named(option: str, value: Any) -> None:
    first, second = chat(), chat(**{option: value})

    found = cause_of(read_body(first), read_body(second), Parting(10, 80, 80))

    assert found is not None
    assert (found.kind, found.character) == (Kind.OPTION, None)
    assert found.at.startswith(option)


def test_another_model_has_nothing_in_common() -> None:
    bodies = [read_body(chat(), model=name) for name in ("small", "large")]

    found = cause_of(bodies[0], bodies[1], Parting(80, 80, 80))

    assert found is not None
    assert (found.kind, found.position, found.lost_tokens) == (Kind.MODEL, 0, 79)
    assert (found.old, found.new) == ("small", "large")


def test_a_salt_is_named_and_not_told() -> None:
    bodies = [read_body(chat(cache_salt=one)) for one in ("ada", "bob")]

    found = cause_of(bodies[0], bodies[1], Parting(80, 80, 80))

    assert found is not None
    assert (found.kind, found.old, found.new) == (Kind.SALT, "", "")


@pytest.mark.parametrize(
    "line",
    [
        "Today's date is Wednesday, November {}, 2026.",
        "Today's date: Wed Nov {} 2026",
        "Current date: 2026-11-{}T08:00:00Z",
        "The current date is 11/{}/2026.",
        "Current time is 08:{}:17",
        "It is {} November 2026.",
        "Current Time: 11/24/2026, 8:{}:01 AM (Europe/Berlin, UTC+1:00)",
    ],
)
def test_dates_of_known_clients_are_dates(line: str) -> None:
    old, new = f"Hello.\n{line.format(24)}\nBye.", f"Hello.\n{line.format(25)}\nBye."
    at = shared(old, new)

    assert shape(old, at, new, at) is Kind.DATE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Use 24 files.", "Use 25 files."),
        ("Version 2.1.4 is used.", "Version 2.1.5 is used."),
        ("Ask Ada.", "Ask Bob."),
        ("Write to chapter 3.", "Write to chapter 4."),
        ("The answer is may be.", "The answer is march on."),
    ],
)
def test_what_is_no_date_and_no_folder_is_of_no_shape(old: str, new: str) -> None:
    at = shared(old, new)

    assert shape(old, at, new, at) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<environment_context>\n  <cwd>/a/b</cwd>", "<environment_context>\n  <cwd>/a/c</cwd>"),
        (
            "I'm currently working in the directory: /home/x",
            "I'm currently working in the directory: /srv",
        ),
        ("Current branch: main", "Current branch: fix"),
        ("Your files are in /home/ada/one/.", "Your files are in /home/ada/two/."),
    ],
)
def test_folders_and_git_are_environment(old: str, new: str) -> None:
    at = shared(old, new)

    assert shape(old, at, new, at) is Kind.ENV


@given(st.text(max_size=300), st.text(max_size=300))
def test_shared_is_the_common_beginning(one: str, other: str) -> None:
    count = shared(one, other)

    assert one[:count] == other[:count]
    assert count == min(len(one), len(other)) or one[count] != other[count]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = ["messages", "system", "input", "prompt", "tools", "instructions", "thinking", "text"]
BODIES = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": JSON}),
    max_size=4,
)


@given(BODIES, BODIES, MESSAGES, st.integers(0, 40))
def test_any_two_bodies_are_compared(
    one: Body, other: Body, said: list[Body], position: int
) -> None:
    """Whatever was answered once; a body is never refused here."""
    other = {**other, "messages": said}

    found = cause_of(read_body(one), read_body(other), Parting(position, 40, 40))

    assert found is None or found.sentence.endswith(".")


def test_each_repair_that_is_named_has_a_cause() -> None:
    named = {kind.known.repair for kind in Kind}

    assert set(REPAIRS) <= named


def test_each_number_of_the_documents_has_a_kind() -> None:
    codes = {kind.known.code for kind in Kind} - {""}

    assert codes == {f"T{number}" for number in range(1, 14)}


def test_little_is_shown_of_long_requests() -> None:
    """What is shown of two texts does not grow with them."""
    drawn = random.Random(0)
    turns = [("user", " ".join(drawn.choices(PROSE.split(), k=200))) for _ in range(100)]
    first = chat(PROSE * 50, *turns)
    second = copy.deepcopy(first)
    second["messages"][60]["content"] += " And this."

    found = cause_of(read_body(first), read_body(second), Parting(9_000, 20_000, 20_000))

    assert found is not None
    assert (found.kind, found.at) == (Kind.MESSAGE, "messages.60.content")
    assert len(found.old) + len(found.new) + len(found.before) < 600


MENDED = [one for one in PAIRS if one.repairs]


@pytest.mark.parametrize("pair", MENDED, ids=lambda pair: pair.name)
def test_the_repair_that_is_named_mends_it(tokenizer: Any, pair: Pair) -> None:
    chosen = frozenset(pair.repairs)
    old, new = (
        render(tokenizer, read_request(one, stabilize=chosen)).tokens
        for one in (pair.first, pair.second)
    )
    found = cause(tokenizer, pair.first, pair.second)

    assert found is not None
    # What was moved, and what the user says, is computed again.
    assert common(old, new) > found.position + 0.5 * found.lost_tokens
