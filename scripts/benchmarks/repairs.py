"""What each repair brings: tokens of a second request that need not be computed, with and without.

The first request of a pair is answered, then the second one, by a tiny random model whose calls are
counted. Pairs are made up in the shapes of clients; recorded requests are asked once more as a new
session in another folder, on the next day.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Table, fresh

_NARROW: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 1,
    "head_dim": 16,
}
RECORDED = ("opencode-02", "qwen-01")
_CONTEXT_TOKENS = 65_536


def run(context: Context) -> Report:
    cases: list[dict[str, Any]] = []
    with context.scratch() as scratch:
        for case in context.pick(("pairs",), ("pairs", *RECORDED)):
            common.say(f"repairs: {case}")
            cases += fresh(compare, folder=str(scratch), case=case)
    return Report("repairs", "Repairs", {"cases": cases}, [_table(cases)])


def compare(folder: str, case: str) -> list[dict[str, Any]]:
    """Ask each pair with its repairs and without them; tokens of the second, and those computed."""
    from persist_cache.stability.names import REPAIRS, parse_names
    from tests import repair_pairs
    from tests.tiny_models import build_model_dir

    if case == "pairs":
        pairs = repair_pairs.pairs(150)
    else:
        body = repair_pairs.recorded(case)
        pairs = [repair_pairs.Pair("env,date", (body, repair_pairs.elsewhere(body)))]
    learned = [repair_pairs.recorded(name) for name in RECORDED]
    corpus = [json.dumps(one, ensure_ascii=False) for one in learned]
    found = []
    for number, pair in enumerate(pairs):
        model = build_model_dir(
            Path(folder) / f"{case}-{number}",
            vocab_size=4096,
            corpus=corpus,
            max_position_embeddings=_CONTEXT_TOKENS,
            **_NARROW,
        )
        (model / "chat_template.jinja").write_text(pair.template)
        without = frozenset(REPAIRS) - set(pair.name.split(","))
        ways = {"without": without, "with": parse_names(pair.name)}
        said = {way: _second(model, pair, names) for way, names in ways.items()}
        found.append({"repair": pair.name, "request": case if case != "pairs" else "", **said})
    return found


def _second(model: Path, pair: Any, names: frozenset[str]) -> dict[str, int] | None:
    """Tokens of the second prompt, and those that were computed; None if it is refused."""
    from persist_cache.server.validation import RefusedError
    from tests.loops import Loop
    from tests.sessions import SERVER
    from tests.waiting import until

    with Loop(model, **SERVER) as loop:
        until(lambda: loop.provider.model is not None, "no model was loaded")
        loop.count()
        lengths = []
        for body in pair.bodies:
            loop.prefilled()
            try:
                lengths.append(_ask(loop, pair, body, names))
            except RefusedError:
                return None
        return {"first": lengths[0], "tokens": lengths[1], "computed": loop.prefilled() + 1}


def _ask(loop: Any, pair: Any, body: dict[str, Any], names: frozenset[str]) -> int:
    """Have one body answered; the length of its prompt."""
    from persist_cache.server.protocols.openai import lenient
    from persist_cache.server.ticket import Ticket
    from tests import sessions

    if pair.protocol == "messages":
        ticket = sessions.ask(loop, body, names)
    else:
        ticket = Ticket()
        ticket.stabilize = names
        chat = lenient(body)
        loop.ask(chat["messages"], tools=chat.get("tools"), ticket=ticket, max_tokens=1)
    assert ticket.prompt is not None
    return len(ticket.prompt.tokens)


def _table(cases: list[dict[str, Any]]) -> Table:
    rows = []
    for case in cases:
        with_it, without = case["with"], case["without"]
        before = "refused"
        if without is not None:
            before = f"{without['tokens'] - without['computed']:,}"
        reused = with_it["tokens"] - with_it["computed"]
        name = f"{case['repair']}, {case['request']}" if case["request"] else case["repair"]
        rows.append(
            [
                name,
                f"{with_it['first']:,}",
                f"{with_it['tokens']:,}",
                before,
                f"{reused:,}",
                f"{reused / min(with_it['first'], with_it['tokens']):.1%}",
            ]
        )
    return Table(
        "Tokens of the first request of a pair, and of the second",
        ["repair", "first", "second", "reused without", "reused with", "of the first"],
        rows,
    )
