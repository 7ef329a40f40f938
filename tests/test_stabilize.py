"""What repairs change in a conversation, where what they move goes, and what they never touch."""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persist_cache.stability import volatile
from persist_cache.stability.conversation import Stabilized, stabilize
from persist_cache.stability.dates import is_date_line
from persist_cache.stability.moved import Moves
from persist_cache.stability.names import DEFAULTS, REPAIRS
from tests.examples import examples
from tests.prompt_shapes import (
    CLAUDE_CODE,
    CODEX,
    CRUSH,
    DATES,
    ENVIRONMENTS,
    HOME_ASSISTANT,
    LOOKALIKES,
    OPENCODE,
    PI,
    prompts,
)

ALL = frozenset(REPAIRS)
REQUESTS = Path(__file__).parent / "requests"
SKILLS = "The following skills are available:\n\n{}"


def chat(system: str, *turns: str) -> list[dict[str, Any]]:
    """A chat whose turns are the user's and the assistant's, one after the other."""
    roles = ("user", "assistant")
    said = [{"role": roles[at % 2], "content": turn} for at, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *said]


def ask(system: str, *turns: str, moves: Moves | None = None, names: Any = ALL) -> Stabilized:
    return stabilize(chat(system, *turns), None, names, moves)


def texts(done: Stabilized) -> list[str]:
    return [str(one["content"]) for one in done.messages]


def reminder(text: str) -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>"


# ---- date and folder -----------------------------------------------------------------------------


@pytest.mark.parametrize("line", DATES)
def test_line_that_tells_the_date_goes_behind_the_first_message_of_the_user(line: str) -> None:
    done = ask(f"You are an agent.\n{line}\nBe brief.", "Hello", "Hi", "And?", names={"date"})

    assert texts(done) == ["You are an agent.\nBe brief.", f"Hello\n\n{line}", "Hi", "And?"]
    assert done.names == ("date",)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("You help. Today's date is 2026-11-25.", "You help."),
        ("You help. Today's date is 2026-11-25. Be brief.", "You help. Be brief."),
        ("Today's date is 2026-11-25. Be brief.", "Be brief."),
    ],
)
def test_whole_sentence_that_tells_the_date_leaves_a_line(text: str, left: str) -> None:
    done = ask(text, "Hello", names={"date"})

    assert texts(done) == [left, "Hello\n\nToday's date is 2026-11-25."]


def test_quotations_that_are_closed_and_apostrophes_hide_no_date() -> None:
    said = "Read the users' notes (all), say \u201cno\u201d or 'yes'. {}Don't be late."

    done = ask(said.format("Today is Monday. "), "Hello", names={"date"})

    assert texts(done) == [said.format(""), "Hello\n\nToday is Monday."]


def test_time_of_home_assistant_leaves_the_prompt() -> None:
    done = ask(HOME_ASSISTANT, "Light on", names={"date"})

    assert "Current time" not in texts(done)[0]
    assert texts(done)[1].endswith("Current time is 09:15:00. Today's date is 2026-11-25.")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_two_folders_on_two_days_leave_the_same_system_prompt(name: str) -> None:
    prompt = ENVIRONMENTS[name]
    here = prompt.format(folder="/home/a/one", day="Wed Nov 25 2026", iso="2026-11-25", file="x")
    there = prompt.format(folder="/srv/b/two", day="Thu Nov 26 2026", iso="2026-11-26", file="yy")

    found = [ask(one, "Hello", names={"env", "date"}) for one in (here, there)]

    assert texts(found[0])[0] == texts(found[1])[0]
    assert found[0].names == ("date", "env")
    kept = texts(found[0])
    for line in here.splitlines():
        assert not line.strip() or any(line.strip() in text for text in kept), line


def test_client_without_a_system_text_but_that_gets_no_empty_message() -> None:
    messages = [
        {"role": "system", "content": "You help."},
        {"role": "system", "content": "The time is 2026-11-25 17:26:16.087243"},
        {"role": "user", "content": "Hello"},
    ]

    done = stabilize(messages, None, {"date"})

    assert [one["role"] for one in done.messages] == ["system", "user"]
    assert done.places == (0, None, 1)
    assert texts(done)[1] == "Hello\n\nThe time is 2026-11-25 17:26:16.087243"


def test_environment_alone_takes_the_block_and_the_date_alone_the_line() -> None:
    prompt = OPENCODE.format(folder="/a", day="Wed Nov 25 2026", iso="2026-11-25", file="x")

    by_date = ask(prompt, "Hello", names={"date"})
    by_env = ask(prompt, "Hello", names={"env"})

    assert by_date.names == ("date",)
    assert "Working directory: /a" in texts(by_date)[0]
    assert texts(by_date)[1] == "Hello\n\nToday's date: Wed Nov 25 2026"
    assert by_env.names == ("env",)
    assert "<env>" not in texts(by_env)[0]
    assert texts(by_env)[1].startswith("Hello\n\n<env>\n")


def test_date_in_a_reminder_goes_behind_what_the_user_says() -> None:
    said = reminder("# currentDate\nToday's date is 2026-11-25.") + "\n\nFix it."

    done = stabilize([{"role": "user", "content": said}], None, {"date"})

    expected = reminder("# currentDate") + "\n\nFix it.\n\nToday's date is 2026-11-25."
    assert texts(done) == [expected]


def test_content_in_parts_is_repaired_as_text_is() -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": f"You help.\n{DATES[0]}"}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]

    done = stabilize(messages, None, {"date"})

    assert done.messages[0]["content"] == "You help."
    assert done.messages[1]["content"] == [
        {"type": "text", "text": "Hello"},
        {"type": "text", "text": f"\n\n{DATES[0]}"},
    ]


def test_system_prompt_without_a_user_keeps_what_it_has() -> None:
    messages = [{"role": "system", "content": DATES[0]}]

    assert stabilize(messages, None, ALL).messages == messages


# ---- where it stays ------------------------------------------------------------------------------


def day(number: int) -> str:
    return f"You help.\nToday's date: 2026-11-{number:02d}"


def test_what_changes_in_mid_conversation_goes_with_the_newest_message_and_stays_there() -> None:
    moves = Moves()
    before = texts(ask(day(25), "One", "Aa", "Two", moves=moves))
    after = texts(ask(day(26), "One", "Aa", "Two", "Bb", "Three", moves=moves))
    later = texts(ask(day(26), "One", "Aa", "Two", "Bb", "Three", "Cc", "Four", moves=moves))

    assert after[: len(before)] == before
    assert after[-1] == "Three\n\nToday's date: 2026-11-26"
    assert later[: len(after)] == after
    assert later[-2:] == ["Cc", "Four"]


def test_only_what_changed_is_told_again() -> None:
    moves = Moves()
    system = "You help.\n<env>\nWorking directory: /a\n</env>\nBe brief.\n{}"
    ask(system.format(DATES[0]), "One", "Aa", "Two", moves=moves)

    done = ask(system.format("Today's date: 2027-01-01"), "One", "Aa", "Two", "B", "X", moves=moves)

    assert texts(done)[-1] == "X\n\nToday's date: 2027-01-01"


def test_request_that_is_sent_again_is_the_same_prompt() -> None:
    moves = Moves()
    ask(day(25), "One", "Aa", "Two", moves=moves)
    first = texts(ask(day(26), "One", "Aa", "Two", "Bb", "Three", moves=moves))

    assert texts(ask(day(26), "One", "Aa", "Two", "Bb", "Three", moves=moves)) == first


def test_time_that_changes_with_each_request_leaves_what_was_said_alone() -> None:
    moves, turns, before = Moves(), ["One"], list[str]()
    for minute in range(6):
        system = f"You help.\nCurrent time: 09:{minute:02d}:00"
        said = texts(ask(system, *turns, moves=moves))
        # The first answer is not known yet when it is asked for: one turn may be lost.
        assert minute < 2 or said[: len(before)] == before
        before = said
        turns += [f"Answer {minute}", f"Question {minute}"]


def test_conversations_of_two_folders_that_read_alike_are_not_mixed_up() -> None:
    moves = Moves()
    system = "You help.\nWorking directory: /{}"
    for folder in "ab":
        ask(system.format(folder), "Hi", moves=moves)
    for folder in "ab":
        said = texts(ask(system.format(folder), "Hi", "Hello.", "Go", moves=moves))
        assert said[1] == f"Hi\n\nWorking directory: /{folder}"
    for folder in "ba":
        said = texts(ask(system.format(folder), "Hi", "Hello.", "Go", "Ok", "On", moves=moves))
        assert said[1] == f"Hi\n\nWorking directory: /{folder}"
        assert said[-1] == "On"


def test_conversation_of_another_client_gets_nothing_of_the_first_one() -> None:
    moves = Moves()
    ask("You help.\nWorking directory: /secret", "Hi", moves=moves)

    said = texts(ask("You help.\nWorking directory: /b", "Hi", "Hello.", "Go", moves=moves))

    assert not any("secret" in text for text in said)


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("Use:\n```sh\nls\n\npwd\n```\n{}\n\nBe brief.", "See `/home/u/.c/projects/-x/memory`."),
        ("<a>\n{}\n</a>\n<rules>\nBe brief.\n</rules>", "# Memory\nIn /home/u/.c/projects/-x/."),
        ("# One\n<a>\n{}\n# Two\nx\n</a>", "See /home/u/.c/projects/-x/."),
        (
            "{}\nSystem: refuse what is illegal.\nUser: Ada. Be kind to her.",
            "Working directory: /a/b",
        ),
    ],
)
def test_what_stands_beside_the_folder_stays_whole(text: str, moved: str) -> None:
    done = ask(text.format(moved), "Hello", names={"env"})

    assert texts(done) == [text.replace("{}\n", ""), f"Hello\n\n{moved}"]


@pytest.mark.parametrize(
    "system",
    [
        "x-anthropic-billing-header: " + "<example " * 30_000,
        "/.a/projects/-x\n\n" * 10_000,
        "# A\n<x>\n" + "/.a/projects/-x\n\n" * 10_000,
        "Today is Monday. A b c. " * 20_000,
        "A. Today is " + " " * 200_000 + "x",
    ],
)
def test_long_text_takes_no_longer_than_its_length_bounds(system: str) -> None:
    begun = time.process_time()

    ask(system, "Hello")

    assert time.process_time() - begun < 8


def test_what_is_remembered_is_bounded_and_forgetting_costs_reuse_alone() -> None:
    moves = Moves(max_requests=50, max_bytes=20_000)
    for number in range(500):
        system = f"You help.\nWorking directory: /{'x' * 300}/{number}"
        ask(system, f"Hi {number}", "Hello.", "Go", moves=moves)
        assert len(moves) <= 50
        assert moves.nbytes <= 20_000

    said = texts(ask("You help.\nWorking directory: /b", "Hi 0", "Hello.", "Go", moves=moves))

    assert said[1] == "Hi 0\n\nWorking directory: /b"


def test_looking_without_keeping_changes_no_later_prompt() -> None:
    moves = Moves()
    ask(day(25), "One", "Aa", "Two", moves=moves)
    looked = stabilize(chat(day(26), "One", "Aa", "Two", "B", "C"), None, ALL, moves, keep=False)

    asked = ask(day(26), "One", "Aa", "Two", "B", "C", moves=moves)

    assert looked.messages == asked.messages
    assert len(moves) == 2


# ---- tools, reminders, results -------------------------------------------------------------------


def tool(name: str, **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"b": {"type": "string"}, "a": {}}, **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def reordered(value: Any, drawn: random.Random) -> Any:
    """A value with its keys in another order."""
    if isinstance(value, dict):
        names = list(value)
        drawn.shuffle(names)
        return {name: reordered(value[name], drawn) for name in names}
    return [reordered(one, drawn) for one in value] if isinstance(value, list) else value


def test_tools_are_the_same_in_whatever_order_they_come() -> None:
    drawn = random.Random(5)
    given = [tool("b", required=["b", "a"]), tool("a"), tool("c")]
    shuffled = reordered(given, drawn)
    drawn.shuffle(shuffled)

    found = [stabilize(chat("x", "y"), tools, {"tools"}) for tools in (given, shuffled)]

    assert json.dumps(found[0].tools) == json.dumps(found[1].tools)
    assert found[0].names == ("tools",)
    assert stabilize(chat("x", "y"), found[0].tools, {"tools"}).names == ()


def test_lists_of_reminders_are_sorted_and_nothing_is_removed() -> None:
    skills = [SKILLS.format(f"- {a}\n  more of {a}\n- {b}") for a, b in ("zx", "xz")]
    skills[1] = SKILLS.format("- x\n- z\n  more of z")
    names = ["Deferred:\nWebSearch\nWebFetch", "Deferred:\nWebFetch\nWebSearch"]
    one = f"{reminder(skills[0])}\n\n{reminder(names[0])}\n\nFix it.\n- b\n- a"
    other = f"{reminder(names[1])}\n\n{reminder(skills[1])}\n\nFix it.\n- b\n- a"

    found = [stabilize(chat("x", said), None, {"reminders"}) for said in (one, other)]

    assert found[0].messages == found[1].messages
    assert sorted(texts(found[0])[1].split()) == sorted(one.split())
    assert texts(found[0])[1].endswith("Fix it.\n- b\n- a")


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (
            "- z: Z.\n- b: B.\nTRIGGER when: b.\nSKIP: c.\n- a: A.",
            "- a: A.\n- b: B.\nTRIGGER when: b.\nSKIP: c.\n- z: Z.",
        ),
        ("- b\n- a\n\n  More of a.", "- b\n- a\n\n  More of a."),
        ("- b\n- a\nIs that of a, or of all?", "- b\n- a\nIs that of a, or of all?"),
        ("- b\n- a\nOthers:\n- d\n- c", "- a\n- b\nOthers:\n- c\n- d"),
        ("- b\n- a\n</list>", "- a\n- b\n</list>"),
    ],
)
def test_lines_that_go_on_with_a_point_stay_below_it(said: str, left: str) -> None:
    done = stabilize(chat("x", reminder(said)), None, {"reminders"})

    assert texts(done)[1] == reminder(left)


def test_instructions_of_a_project_keep_their_order_within_a_reminder() -> None:
    said = reminder("# claudeMd\nContents of /a/CLAUDE.md:\n- second\n- first")

    assert stabilize(chat("x", said), None, {"reminders"}).names == ()


def test_time_at_which_a_result_was_cleared_goes() -> None:
    cleared = "[Old tool result content cleared at {}]"
    results = [
        {"role": "tool", "tool_call_id": "1", "content": cleared.format("2026-11-25T09:00:00Z")},
        {
            "role": "tool",
            "tool_call_id": "2",
            "content": cleared.format("2026-11-26T10:01:02.123Z"),
        },
        {"role": "tool", "tool_call_id": "3", "content": f"grep: {cleared.format('2026-11-25')}"},
    ]

    done = stabilize(results, None, {"cleared"})

    assert texts(done) == ["[Old tool result content cleared]"] * 2 + [results[2]["content"]]
    assert done.names == ("cleared",)


# ---- what is never touched -----------------------------------------------------------------------


@pytest.mark.parametrize("number", range(20))
def test_lookalikes_stay_wherever_they_stand(number: int) -> None:
    messages, tools = prompts(number)
    before = copy.deepcopy((messages, tools))

    done = stabilize(messages, tools, ALL, Moves())

    assert (messages, tools) == before
    assert done.messages == messages
    assert done.names == ()


@pytest.mark.parametrize("line", LOOKALIKES)
def test_line_that_only_looks_like_a_shape_stays_in_a_system_prompt(line: str) -> None:
    done = ask(f"You help.\n\n{line}\n\nBe brief.", "Hello")

    assert (done.names, texts(done)[0]) == ((), f"You help.\n\n{line}\n\nBe brief.")


def test_nothing_is_done_that_was_not_chosen() -> None:
    shapes = [CLAUDE_CODE, CODEX, CRUSH, HOME_ASSISTANT, OPENCODE, PI]
    for shape in shapes:
        text = shape.format(folder="/a", day="Wed Nov 25 2026", iso="2026-11-25", file="x")
        messages = chat(text, reminder("- b\n- a"))
        assert stabilize(messages, [tool("b"), tool("a")], DEFAULTS).messages == messages
        assert stabilize(messages, None, frozenset()).messages == messages


def test_recorded_requests_keep_each_line_somewhere() -> None:
    for path in sorted(REQUESTS.glob("*.json")):
        body = json.loads(path.read_text())["body"]
        if any(isinstance(one.get("content"), list) for one in body["messages"]):
            continue
        done = stabilize(body["messages"], body.get("tools"), ALL, Moves())
        kept = "\n".join(text for text in texts(done)).splitlines()
        for message in body["messages"]:
            for line in str(message.get("content") or "").splitlines():
                assert line in kept, (path.name, line)


PIECES = st.sampled_from(
    [
        *DATES[:4],
        *LOOKALIKES[:6],
        *(f"<env>\nWorking directory: {folder}\n</env>" for folder in ("/a", "/b c")),
        *("<env>", "</env>", "Working directory: /x", "- Platform: linux", "gitStatus: it is"),
        *("Current branch: main", " M a.py", "# Heading", "---", "```", "text", "", "- b", "- a"),
        *("<system-reminder>", "</system-reminder>", "## b", "## a", "Word", "Other"),
        *("x-anthropic-billing-header: cc_version=1.2.3; cc_entrypoint=cli;", "<example>"),
        *("<total_tokens>5 tokens left</total_tokens>", "/home/u/.x/projects/-home-u/memory"),
    ]
)
TEXT = st.lists(PIECES, max_size=12).map("\n".join)
TURNS = st.lists(TEXT, min_size=1, max_size=4)


@settings(max_examples=examples(80, 400), deadline=None)
@given(TEXT, TURNS, st.sets(st.sampled_from(REPAIRS)))
def test_repairs_are_idempotent_and_lose_nothing(
    system: str, turns: list[str], names: set[str]
) -> None:
    once = ask(system, *turns, names=names)
    again = stabilize(once.messages, None, names)

    assert again.messages == once.messages
    assert again.names == ()
    dropped = names & {"billing", "countdown"}
    if not dropped:
        given = sorted(word for text in (system, *turns) for word in text.split())
        assert sorted(word for text in texts(once) for word in text.split()) == given


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@settings(max_examples=examples(50, 200), deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), JSON), max_size=5))
def test_tools_are_equal_but_for_their_order(given: list[tuple[str, Any]]) -> None:
    tools = [tool(name, extra=value) for name, value in given]

    done = stabilize(chat("x", "y"), tools, {"tools"})

    kept = list(done.tools or [])
    assert kept == sorted(tools, key=lambda one: str(one["function"]["name"]))


@settings(max_examples=examples(50, 200), deadline=None)
@given(st.text(max_size=60))
def test_no_text_at_all_is_a_date_without_a_number_or_a_day(text: str) -> None:
    if is_date_line(text):
        assert any(one.isdigit() for one in text) or "day" in text.lower()


def test_what_is_not_to_be_kept_is_remembered_nowhere() -> None:
    date = "Today's date: 2026-07-01"
    reminder = f"<system-reminder>\n{date}\n</system-reminder>"
    private = chat(f"The secret of the house.\n{date}\n", reminder)
    volatile._remembered.cache_clear()

    done = stabilize(private, None, ALL, Moves(), keep=False)

    assert "date" in done.names
    assert volatile._remembered.cache_info().currsize == 0
