"""The server as a service: files that managers of services understand, and no other is touched."""

from __future__ import annotations

import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from persist_cache_cli import blas
from persist_cache_cli.demo import openblas
from persist_cache_cli.service.units import Service, is_ours, launchd_agent, systemd_unit
from tests.cli import Run, runner

ODD = [
    "plain",
    "two words",
    "100%",
    "%h",
    'a "quote"',
    "back\\slash",
    "$HOME",
    "${HOME}",
    "ä;#'",
    "",
]
SERVICE = Service(
    ["/usr/bin/env", *ODD], "/tmp/a folder/100%", {"HF_HOME": "/with space/100%"}, 20.0, "/l og"
)


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(tmp_path / "my store", capfd)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a `systemctl` of ours was asked, a line each; homes are folders of their own."""
    log = tmp_path / "asked"
    tool = tmp_path / "bin" / "systemctl"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # Else OpenBLAS would be looked for, and found for the rest of the process, in that home.
    monkeypatch.setattr(blas, "_has_reference_blas", lambda: False)
    return log


@pytest.fixture
def unit(asked: Path, tmp_path: Path) -> Path:
    return tmp_path / "config" / "systemd" / "user" / "persist-cache.service"


def exec_line(text: str) -> str:
    (line,) = [one for one in text.splitlines() if one.startswith("ExecStart=")]
    return line


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_finds_nothing_wrong_with_a_unit(tmp_path: Path) -> None:
    path = tmp_path / "persist-cache.service"
    path.write_text(systemd_unit(SERVICE))

    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
    )

    assert done.returncode == 0, done.stderr
    assert "persist-cache.service" not in done.stderr


def test_words_of_a_unit_are_quoted() -> None:
    line = exec_line(systemd_unit(SERVICE))

    assert line == (
        'ExecStart=:"/usr/bin/env" "plain" "two words" "100%%" "%%h" "a \\"quote\\"" '
        '"back\\\\slash" "$HOME" "${HOME}" "ä;#\'" ""'
    )
    assert "\nWorkingDirectory=-/tmp/a folder/100%%\n" in systemd_unit(SERVICE)
    assert '\nEnvironment="HF_HOME=/with space/100%%"\n' in systemd_unit(SERVICE)


def test_an_agent_has_the_words_as_they_are() -> None:
    text = launchd_agent(SERVICE)
    agent = plistlib.loads(text.encode())

    assert agent["ProgramArguments"] == list(SERVICE.command)
    assert agent["WorkingDirectory"] == SERVICE.folder
    assert agent["EnvironmentVariables"] == SERVICE.variables
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ExitTimeOut"] > SERVICE.grace_s
    assert is_ours(text)


@pytest.mark.parametrize("make", [systemd_unit, launchd_agent])
def test_what_no_file_can_say_is_refused(make: object) -> None:
    with pytest.raises(ValueError, match="cannot be in the file"):
        make(Service(["/bin/a", "two\nlines"], "/"))  # type: ignore[operator]


@pytest.mark.parametrize("manager", ["systemd", "launchd"])
def test_print_shows_the_file_and_changes_nothing(
    manager: str, run: Run, asked: Path, tmp_path: Path
) -> None:
    done = run(
        *("service", "install", "--print", "--manager", manager),
        *("--model", "my models/4B", "--port", "9000", "--unload-after", "15m"),
    )

    assert done.status == 0
    assert is_ours(done.out)
    if manager == "systemd":
        assert exec_line(done.out).endswith(
            '"serve" "--model" "my models/4B" "--port" "9000" "--unload-after" "15m"'
        )
    else:
        words = plistlib.loads(done.out.encode())["ProgramArguments"]
        assert words[words.index("--store") + 1] == str(tmp_path / "my store")
    assert not asked.exists()
    assert not (tmp_path / "config").exists()
    assert not (tmp_path / "home").exists()


def test_install_writes_and_starts_it_and_uninstall_takes_that_back(
    run: Run, asked: Path, unit: Path
) -> None:
    assert run("service", "install", "--manager", "systemd", "--port", "9000").status == 0
    first = unit.read_text()
    assert run("service", "install", "--manager", "systemd", "--port", "9001").status == 0
    assert unit.read_text() == first.replace("9000", "9001")
    assert list(unit.parent.iterdir()) == [unit]
    asked.unlink()

    done = run("service", "uninstall", "--manager", "systemd")

    assert done.status == 0
    assert not unit.exists()
    assert "disable --now persist-cache.service" in asked.read_text()


@pytest.mark.parametrize("action", ["install", "uninstall"])
def test_a_file_of_somebody_elses_is_left_alone(
    action: str, run: Run, asked: Path, unit: Path
) -> None:
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/bin/true\n")

    done = run("service", action, "--manager", "systemd")

    assert done.status == 1
    assert "was not written by" in done.sentence
    assert unit.read_text() == "[Service]\nExecStart=/bin/true\n"
    assert not asked.exists()


@pytest.mark.parametrize("action", ["status", "logs", "uninstall"])
def test_where_there_is_no_service_that_is_said(action: str, run: Run, asked: Path) -> None:
    done = run("service", action, "--manager", "systemd")

    assert done.status == 3
    assert "service install" in done.sentence


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["install", "--api-key", "s3cret"], "persist-cache.toml"),
        (["install", "--admin-token=s3cret"], "persist-cache.toml"),
        (["install", "--quota", "salt:s3cret=1GB"], "put quota under [serve]"),
        (["install", "--ttl=user=1d", "--ttl=salt:s3cret=7d"], "put ttl under [serve]"),
        (["install", "--disk-bytes", "much"], "not a size"),
        (["install", "--model", "m", "--prot", "1"], "`serve` has no --prot"),
        (["install", "--port", "many"], "many"),
        (["status", "--port", "1"], "takes no --port"),
        (["logs", "--print"], "takes no --print"),
        (["restart"], "restart"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str], said: str, run: Run, asked: Path, unit: Path
) -> None:
    done = run("service", *arguments)

    assert done.status == 2
    assert said in done.sentence
    assert "s3cret" not in done.sentence
    assert not unit.exists()


def test_a_manager_that_fails_is_quoted(run: Run, asked: Path, unit: Path, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "systemctl"
    tool.write_text("#!/bin/sh\necho 'Failed to connect to bus.' >&2\nexit 1\n")

    done = run("service", "install", "--manager", "systemd")

    assert done.status == 1
    assert "Failed to connect to bus." in done.sentence
    assert f"{unit} is written, but not started" in done.sentence


def test_a_manager_out_of_reach_does_not_keep_the_file(
    run: Run, asked: Path, unit: Path, tmp_path: Path
) -> None:
    assert run("service", "install", "--manager", "systemd").status == 0
    tool = tmp_path / "bin" / "systemctl"
    tool.write_text("#!/bin/sh\necho 'Failed to connect to bus.' >&2\nexit 1\n")

    done = run("service", "uninstall", "--manager", "systemd")

    assert done.status == 1
    assert done.sentence.startswith(f"Error: Removed {unit}, but ")
    assert not unit.exists()


def test_salts_of_the_configuration_stay_in_it(run: Run, asked: Path, tmp_path: Path) -> None:
    config = tmp_path / "persist-cache.toml"
    config.write_text('[serve]\nquota = "salt:s3cret=1GB"\n')

    done = run("--config", config, "service", "install", "--print", "--ttl", "salt=7d")

    assert done.status == 0, done.err
    assert "s3cret" not in done.out
    assert "salt=7d" in done.out


def of_unit(text: str, name: str) -> str | None:
    """What a unit sets a variable to."""
    lines = [one for one in text.splitlines() if one.startswith(f'Environment="{name}=')]
    return lines[0].partition("=")[2].strip('"').partition("=")[2] if lines else None


@pytest.fixture
def slow_linux(asked: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A plain install on Linux: MLX's own BLAS, and no other one preloaded."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(blas, "_has_reference_blas", lambda: True)
    monkeypatch.setattr(blas, "_is_preloaded", lambda: False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    return monkeypatch


FOUND = {"LD_PRELOAD": "/lib/libopenblas.so.0", "LD_LIBRARY_PATH": "/lib"}
UNKNOWN = {"LD_PRELOAD": "libm.so.6", "LD_LIBRARY_PATH": "/own"}


@pytest.mark.parametrize(
    ("found", "shell", "wanted"),
    [
        ({**FOUND, "LD_LIBRARY_PATH": "/lib:/own"}, {"LD_LIBRARY_PATH": "/own"}, FOUND),
        ({"LD_PRELOAD": FOUND["LD_PRELOAD"]}, {"LD_LIBRARY_PATH": "/lib"}, FOUND),
        (None, UNKNOWN, UNKNOWN),
    ],
    ids=["without the shell's own", "found by the shell's folders", "not known here"],
)
def test_a_service_multiplies_by_the_openblas_that_is_there(
    slow_linux: pytest.MonkeyPatch,
    run: Run,
    unit: Path,
    found: dict[str, str] | None,
    shell: dict[str, str],
    wanted: dict[str, str],
) -> None:
    slow_linux.setattr(openblas, "find", lambda: found and (Path("/lib"), found))
    slow_linux.setattr(blas, "_is_preloaded", lambda: found is None)
    for name, value in shell.items():
        slow_linux.setenv(name, value)
    done = run("service", "install", "--manager", "systemd")

    assert (done.status, done.err) == (0, "")
    assert {name: of_unit(unit.read_text(), name) for name in wanted} == wanted


def test_a_service_without_openblas_is_told_where_it_comes_from(
    slow_linux: pytest.MonkeyPatch, run: Run, unit: Path
) -> None:
    slow_linux.setattr(openblas, "find", lambda: None)
    done = run("service", "install", "--manager", "systemd")

    assert done.status == 0
    assert blas.WHEEL in done.err
    assert "install the service again" in done.err
    assert of_unit(unit.read_text(), "LD_PRELOAD") is None
