"""Whether a chat template only appends is found out by rendering, with what mends it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from persist_cache.doctor.template import (
    THINKING,
    TOOLS,
    TURNS,
    TemplateReport,
    check_template,
    judge_template,
)
from tests.cli import runner
from tests.repair_pairs import HEADS_ONLY, THINKING_TEMPLATE
from tests.test_templates import NINE
from tests.test_templates import render as rendered
from tests.tiny_models import CHAT_TEMPLATE, build_model_dir

WITHOUT_OPTION = THINKING_TEMPLATE.replace("preserve_thinking or ", "")
NO_THINKING = THINKING_TEMPLATE.replace("(preserve_thinking or ", "enable_thinking != false and (")
COUNTING = CHAT_TEMPLATE.replace("# Tools", "# Tools of {{ messages | length }} messages")
DATED = '{% set date_string = date_string or strftime_now("%d %b %Y") %}' + CHAT_TEMPLATE
FLIPPING = CHAT_TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif -%}", "<|im_start|>assistant\n<think>\n{% endif -%}"
)
NO_TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}{% endfor %}" + CHAT_TEMPLATE
)


def check(template: str) -> TemplateReport:
    def render(
        messages: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None,
        generation: bool,
        options: Mapping[str, Any],
    ) -> str:
        head = "".join(f"{{% set {name} = {value!s} %}}" for name, value in options.items())
        said = head + template
        if not generation:
            said = f"{{% set add_generation_prompt = false %}}{said}"
        return rendered(said, messages, tools)

    return check_template(render, template)


def outcomes(found: TemplateReport) -> dict[str, str]:
    return {one.kind: one.outcome for one in found.checks}


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, FLIPPING, HEADS_ONLY + CHAT_TEMPLATE, NINE])
def test_template_that_appends_is_said_to(template: str) -> None:
    found = check(template)

    assert found.appends
    assert set(outcomes(found).values()) == {"appends"}
    assert list(judge_template("m", found)) == []


@pytest.mark.parametrize(
    ("template", "mends", "says"),
    [
        (THINKING_TEMPLATE, {"preserve_thinking": True}, "--stabilize thinking mends it"),
        (WITHOUT_OPTION, None, "no option of the template"),
        (NO_THINKING, {"enable_thinking": False}, "changes what the model does"),
    ],
)
def test_template_that_drops_thoughts_parts_there_and_the_cure_is_named(
    template: str, mends: dict[str, bool] | None, says: str
) -> None:
    found = check(template)

    assert outcomes(found) == {TURNS: "appends", TOOLS: "appends", THINKING: "parts"}
    assert found.mends == mends
    parted = found.checks[-1]
    assert parted.earlier.startswith("<think>I look at alpha for the first.")
    assert parted.lost_characters > 50
    (finding,) = judge_template("m", found)
    assert finding.level == "note"
    assert says in finding.message


def test_template_whose_head_counts_messages_parts_with_tools() -> None:
    found = check(COUNTING)

    assert outcomes(found)[TURNS] == "appends"
    assert outcomes(found)[TOOLS] == "parts"
    assert found.checks[1].before.endswith("# Tools of ")


def test_template_that_refuses_is_no_fault() -> None:
    found = check(NO_TOOLS)

    assert outcomes(found) == {TURNS: "appends", TOOLS: "refused", THINKING: "refused"}
    assert "no tools here" in found.checks[1].reason
    assert list(judge_template("m", found)) == []


def test_date_in_a_template_is_named_with_its_option(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = build_model_dir(tmp_path / "model")
    (model / "chat_template.jinja").write_text(DATED)
    run = runner(tmp_path / "store", capfd)

    said = run("doctor", "--model", model)
    found = run("doctor", "--model", model, "--json").json

    assert said.status == 0
    assert "prints today's date" in " ".join(said.out.split())
    assert found["template"]["prints_date"] is True
    assert found["template"]["date_option"] == "date_string"
    assert found["template"]["appends"] is True
    assert found["ok"] is True


def test_doctor_shows_where_a_template_parts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = build_model_dir(tmp_path / "model")
    (model / "chat_template.jinja").write_text(THINKING_TEMPLATE)
    run = runner(tmp_path / "store", capfd)

    said = run("doctor", "--model", model)
    found = json.loads(run("doctor", "--model", model, "--json").out)["template"]

    assert "appends: turns, tool turns; does not only append: thinking" in said.out
    assert "--stabilize thinking" in said.out
    assert found["mends"] == {"preserve_thinking": True}
