"""docs/start.md is followed literally, by a user with an empty home."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from persist_cache_cli.demo.openblas import preload_env
from tests.server_process import free_port

pytest_plugins = ["tests.real_model"]

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "start.md").read_text()
MODEL = "MODEL=mlx-community/SmolLM2-135M-Instruct"


@pytest.mark.long  # eight programs with a real model, half a minute of a processor
def test_first_session_can_be_copied_line_by_line(smollm2: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    script = "echo '---- block'\n".join(["", *blocks])
    assert script.count(MODEL) == 1
    # What differs from a user's: the model is here already, and the port is free.
    script = script.replace(MODEL, f"MODEL={smollm2}").replace("8091", str(free_port()))
    (tmp_path / "home").mkdir()
    env = {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **preload_env(),
    }

    done = subprocess.run(
        ["bash", "-eu", "-c", script],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    _, _, before, first, second, client, _, after = done.stdout.split("---- block\n")
    (warmed,) = re.findall(
        r"house: requests with this system prompt will find (\d+) tokens", before
    )
    assert f"all {warmed} system tokens" in before
    assert re.search(r"\bpinned\s+house\b", before)
    cached = [re.findall(r'"cached_tokens": (\d+)', one) for one in (first, second)]
    assert cached[0] == [warmed]
    assert re.search(rf"x-persist-cache: disk; tokens={warmed}\b", first)
    assert re.search(r"x-persist-cache: disk; ", second)
    assert int(cached[1][0]) > int(warmed)
    assert "There are 7 days in a week." in first
    assert "Page" in second or "#token=" in second
    (reused,) = re.findall(r"^(\d+) tokens were reused$", client, re.MULTILINE)
    assert int(reused) >= int(warmed)
    assert "1 entry gone" in after
    assert "house" not in after.partition("gone")[2]
    assert not (tmp_path / "store").exists()
    log = (tmp_path / "serve.log").read_text()
    assert log.count("/v1/chat/completions: disk hit") == 2
    assert not list((tmp_path / "home").glob(".cache/persist-cache/store*"))
