"""What is taken out of system texts, and that nothing else ever is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persist_cache.stability import repairs
from tests.examples import examples

BILLING = "x-anthropic-billing-header: cc_version=2.1.104.f27; cc_entrypoint=cli; cch=00000;"
SHORT_BILLING = "x-anthropic-billing-header: cc_version=2.1.197.1c0; cc_entrypoint=sdk-cli;"
"""As Claude Code sends it to other servers than Anthropic's."""
COUNTDOWN = "<total_tokens>968584 tokens left</total_tokens>"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (BILLING, ""),
        (f"{BILLING}\nYou are an agent.", "You are an agent."),
        (f"You are an agent.\n{BILLING}", "You are an agent."),
        (f"One.\n{BILLING}\nTwo.", "One.\nTwo."),
        (f"{BILLING}\n{BILLING.replace('00000', 'a1b2c')}\nTwo.", "Two."),
        (f"```\ncode\n```\n{BILLING}\nTwo.", "```\ncode\n```\nTwo."),
        (f"{SHORT_BILLING}\nTwo.", "Two."),
        (f"{SHORT_BILLING} cc_is_subagent=true;\nTwo.", "Two."),
        (f"{BILLING} cc_workload=cron; cc_is_subagent=true;\nTwo.", "Two."),
    ],
)
def test_billing_line_goes_from_a_system_text_and_is_named(text: str, left: str) -> None:
    assert repairs.system_text(text) == repairs.Repaired(left, ("billing",))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (COUNTDOWN, ""),
        (f"You are an agent.\n{COUNTDOWN}", "You are an agent."),
        (f"You are an agent. {COUNTDOWN}\n", "You are an agent."),
        (f"You are an agent.\n\n{COUNTDOWN}\n{COUNTDOWN}", "You are an agent."),
    ],
)
def test_countdown_goes_from_the_end_of_a_system_text_and_is_named(text: str, left: str) -> None:
    assert repairs.system_text(text) == repairs.Repaired(left, ("countdown",))


def test_what_changes_in_both_places_leaves_the_same_text() -> None:
    texts = [
        f"{BILLING.replace('f27', version).replace('00000', digest)}\nBe brief.\n"
        f"<total_tokens>{left} tokens left</total_tokens>"
        for version, digest, left in [("f27", "00000", 900_000), ("0a1", "9f3e2", 7)]
    ]

    found = [repairs.system_text(text) for text in texts]

    assert found[0] == found[1] == repairs.Repaired("Be brief.", ("billing", "countdown"))


def lookalikes(number: int) -> list[str]:
    """Texts that have the look of a billing line or a countdown, none exactly so."""
    drawn = random.Random(18)
    shapes = [
        lambda: f"  {BILLING}",
        lambda: f"> {BILLING}",
        lambda: f"`{BILLING}`",
        lambda: f"{BILLING} It is sent with each request.",
        lambda: f"The line {BILLING}",
        lambda: f"```\n{BILLING}\n```",
        lambda: f"~~~text\n```\n{BILLING}\n~~~\nis what it looks like.",
        lambda: BILLING.replace("x-", "X-"),
        lambda: BILLING.replace("cch=00000;", f"cch={drawn.randrange(10**3)};"),
        lambda: BILLING.replace("cch=00000;", "cch=zzzzz;"),
        lambda: BILLING.replace("cch=00000;", ""),
        lambda: f"{SHORT_BILLING} cc_is_subagent=perhaps;",
        lambda: f"{SHORT_BILLING} cc_region=here;",
        lambda: BILLING[:-1],
        lambda: BILLING.replace(": ", ":"),
        lambda: BILLING.replace("; ", ";"),
        lambda: BILLING.replace("cc_version", "version"),
        lambda: "\n".join(f"{place + 1}: {line}" for place, line in enumerate(["", BILLING])),
        lambda: f"{COUNTDOWN} was at its end.",
        lambda: f"`{COUNTDOWN}`",
        lambda: COUNTDOWN.replace("968584", "N"),
        lambda: COUNTDOWN.replace("968584", f"-{drawn.randrange(10**6)}"),
        lambda: COUNTDOWN.replace(" left", ""),
        lambda: COUNTDOWN.replace("total", "Total"),
        lambda: f"{COUNTDOWN[:-1]}",
        lambda: f"<total_tokens>{drawn.randrange(10**6)} tokens left",
        lambda: f"{COUNTDOWN}\n\nNow the task.",
    ]
    prose = ["Read the file.", "def main() -> None:\n    pass", "Héllo 🙂", "a\n\nb", "<b>x</b>"]
    made = []
    for place in range(number):
        shape = shapes[place % len(shapes)]()
        before = "\n".join(drawn.choices(prose, k=drawn.randrange(4)))
        made.append(f"{before}\n{shape}" if before else shape)
    return made


def test_lookalikes_in_a_system_text_stay_to_the_letter() -> None:
    for text in lookalikes(500):
        assert repairs.system_text(text) == repairs.Repaired(text), text


PIECES = st.sampled_from(
    [
        BILLING,
        COUNTDOWN,
        "\n",
        " ",
        "```",
        "~~~",
        "```\n",
        f"\n{BILLING}\n",
        "text",
        "<total_tokens>",
    ]
)


@settings(max_examples=examples(60, 300))
@given(st.lists(PIECES, max_size=12).map("".join))
def test_repairs_are_idempotent(text: str) -> None:
    once = repairs.system_text(text)

    assert repairs.system_text(once.text) == repairs.Repaired(once.text)
    assert bool(once.names) == (once.text != text)


def test_inline_system_message_becomes_one_of_the_user_in_its_place() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "system", "content": "Plan mode is on."},
        {"role": "assistant", "content": "Yes?"},
    ]

    said, names = repairs.inline_system_as_user(messages)

    assert names == ("inline-system",)
    assert [one["role"] for one in said] == ["system", "user", "user", "assistant"]
    assert said[2]["content"] == "<system-message>\nPlan mode is on.\n</system-message>"
    assert repairs.inline_system_as_user(said) == (said, ())


def test_system_messages_at_the_head_are_no_inline_ones() -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}]

    assert repairs.inline_system_as_user(messages) == (messages, ())
