"""How requests of a server are shown: lines that fit a terminal, and bars that are true."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persist_cache_cli import dashboard
from persist_cache_cli.output import text_width
from persist_cache_cli.requests import bar, block, line

PARTED: dict[str, Any] = {
    "id": "81ce05b2f6a7",
    "response_id": "chatcmpl-1",
    "shared_tokens": 1988,
    "cause": "env",
    "code": "T8",
    "sentence": "The folder, or what git says of it, differs.",
    "where": "system",
    "at": "messages.0.content",
    "role": "system",
    "character": 8710,
    "also": ["date"],
    "lost_tokens": 5739,
    "lost_s": 8.9,
    "repairs": ["env", "date"],
    "switches": [],
    "before": "\\n<env>\\n  Working directory: /home/ada/",
    "old": "parser",
    "new": "",
}


def request(**more: Any) -> dict[str, Any]:
    return {
        "id": "3f9c2a71d0e4",
        "number": 7,
        "response_id": "chatcmpl-2",
        "time": 1_790_000_000.0,
        "path": "/v1/chat/completions",
        "model": "mlx-community/Qwen3-4B-4bit",
        "client": "opencode/1.18.33 ai-sdk/provider-utils/3.0.9 runtime/bun/1.2.21",
        "state": "done",
        "source": "memory",
        "num_tokens": 7728,
        "cached_tokens": 1988,
        "computed_tokens": 5740,
        "written_tokens": 5739,
        "output_tokens": 12,
        "first_token_s": 9.4,
        "total_s": 10.0,
        "reason": "what is stored goes on differently",
        "repaired": [],
        "parted": PARTED,
        **more,
    }


WIDTHS = [40, 80, 140, 200]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "said",
    [
        request(),
        request(client="", parted=None, source="miss", cached_tokens=0),
        request(num_tokens=0, cached_tokens=0, source=None, first_token_s=None, state="failed"),
        request(num_tokens=1_234_567, cached_tokens=1_234_566, client="客户端" * 30),
        request(parted={**PARTED, "cause": None, "code": None, "sentence": ""}),
    ],
)
def test_a_line_fits_the_terminal(said: dict[str, Any], width: int) -> None:
    assert text_width(line(said, width)) <= max(width, 60)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_block_fits_the_terminal(width: int) -> None:
    assert all(
        text_width(one) <= width for lines in block(request(), width) for one in lines.split("\n")
    )


def test_a_narrow_line_names_the_cause_and_a_wide_one_what_mends_it_and_who_asked() -> None:
    assert line(request(), 80).endswith("1,988/7,728   9.4 s  T8 env")
    assert "--stabilize env,date" in line(request(), 140)
    assert "opencode" in line(request(), 140)


@given(st.integers(1, 100_000), st.integers(0, 100_000), st.integers(4, 60))
def test_a_bar_shows_what_there_was_and_nothing_else(total: int, found: int, width: int) -> None:
    found = min(found, total - 1)

    drawn = bar(request(num_tokens=total, cached_tokens=found, source="disk"), width)

    assert len(drawn) == width
    assert ("█" in drawn) == (found > 0)
    assert ("░" in drawn) == (not found or found < total - 1)
    assert "▓" not in drawn


def test_memory_and_disk_have_bars_of_their_own() -> None:
    assert "▓" in bar(request(), 20)
    assert "█" in bar(request(source="disk"), 20)


def test_a_block_says_all_that_is_known() -> None:
    text = "\n".join(block(request(repaired=["billing"]), None))

    for part in (
        "1,988 of 7,728 tokens",
        "from memory; what is stored goes on differently",
        "The folder, or what git says of it, differs. (T8) Further on: date.",
        "messages.0.content (system), character 8,710, token 1,988, compared with request 81ce",
        "5,739 tokens, about 8.9 s",
        "--stabilize env,date",
        "(nothing)",
        "repaired  billing",
    ):
        assert part in text


def test_a_request_that_goes_on_has_no_cause_to_show() -> None:
    said = request(parted={**PARTED, "cause": None, "code": None, "sentence": ""})

    text = "\n".join(block(said, None))

    assert "None: it goes on from request 81ce05b2f6a7." in text
    assert "mended" not in text


STATS: dict[str, Any] = {
    "model": "org/客户端\x1b[31m" * 9,
    "time": 1_790_000_000.0,
    "server": {"disk_off": ""},
    "store": {
        "bytes": {"total": 5 << 30},
        "max_bytes": 1 << 30,
        "written_today_bytes": 1 << 20,
        "daily_write_bytes": None,
        "tiers": [{"tier": name, "bytes": 1 << 29} for name in ("system", "user", "assistant")],
    },
}
WINDOW = {
    "window": "hour", "since": 0.0, "requests": 3, "failed": 0, "left": 0, "tokens_asked": 10**9,
    "tokens_reused": {"disk": 10**8, "memory": 3}, "saved_s": 1e6, "unmeasured": 0,
}  # fmt: skip
BRANCH = {
    "id": "a" * 16, "short_id": "aaa", "labels": ["\x07客" * 80], "tier": "system",
    "below": {"bytes": 1 << 40, "entries": 10**6},
}  # fmt: skip


@pytest.mark.parametrize("off", ["", "the folder is \x1b[31manother user's, and that is long"])
@pytest.mark.parametrize("size", [(40, 10), (80, 24), (200, 60)])
def test_top_fits_the_terminal_and_obeys_nothing(size: tuple[int, int], off: str) -> None:
    width, height = size
    stats = {**STATS, "server": {"disk_off": off}}
    history = {"windows": [WINDOW, {**WINDOW, "window": "start"}]}

    shown = dashboard.lines(
        stats, history, [request()] * 50, [BRANCH] * 9, {}, width=width, height=height
    )

    assert all(text_width(one) <= max(width, 60) for one in shown)
    assert all(one.isprintable() for one in shown)
