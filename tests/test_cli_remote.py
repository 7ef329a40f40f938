"""`persist-cache remote`, and `warm --publish`, as people and scripts use them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from persist_cache import Store
from persist_cache.remote import make_secret, read_settings
from tests.cli import Run, prepared_script, runner
from tests.fakes import put
from tests.test_cli_docs import fields, section
from tests.tiny_models import build_model_dir

SYSTEM = "You are a helpful assistant who answers in a short sentence. " * 25
PROMPT = list(range(1000, 1600))


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may touch the user's own settings, or use his credentials."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith(("AWS_", "PERSIST_CACHE_REMOTE")):
            monkeypatch.delenv(name)


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(tmp_path / "store", capfd)


@pytest.fixture
def there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs commands on another machine's store."""
    return runner(tmp_path / "there", capfd)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "shared"
    path.mkdir()
    return path


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "team.secret"
    make_secret(path)
    return path


@pytest.fixture
def entry(tmp_path: Path) -> str:
    """A system prompt, and what was said to it."""
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put(store, [*PROMPT, 7, 8], tier="user", real=True)
        return put(store, PROMPT, tier="system", real=True)


# ---- which one -----------------------------------------------------------------------------------


def test_the_first_makes_a_secret_that_only_the_owner_can_read(
    run: Run, place: Path, tmp_path: Path
) -> None:
    done = run("remote", "add", place, "--new-secret", "--publish-plain")

    assert (done.status, done.err) == (0, "")
    made = Path(run("remote", "status", "--no-probe", "--json").json["secret_file"])
    assert tmp_path / "store" not in made.parents
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert made.read_text().strip() not in done.out
    assert f"The secret is in {made}" in done.out
    assert f"persist-cache remote add {place.as_uri()} --secret-file FILE" in done.out
    assert "unencrypted: whoever can read the remote can read them" in done.out


def test_the_others_read_with_that_secret_until_they_are_to_publish(
    run: Run, place: Path, secret: Path
) -> None:
    done = run("remote", "add", place, "--secret-file", secret)

    assert (done.status, done.err) == (0, "")
    assert "It only reads there" in done.out
    said = run("remote", "status", "--json").json
    assert (said["url"], said["publish_plain"]) == (place.as_uri(), False)
    assert said["secret_file"] == str(secret)


def test_a_secret_in_the_environment_is_remembered_nowhere(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSIST_CACHE_REMOTE_SECRET", "a secret of the whole team")

    assert run("remote", "add", place).status == 0

    assert run("remote", "status", "--json").json["secret_file"] == ""
    for path in (tmp_path / "store").rglob("*"):
        assert not path.is_file() or b"a secret of the whole team" not in path.read_bytes()
    monkeypatch.delenv("PERSIST_CACHE_REMOTE_SECRET")
    assert "secret" in run("remote", "status").sentence


def test_a_mirror_is_not_said_to_be_one_that_could_be_published_to(run: Run) -> None:
    added = run("remote", "add", "https://host/a", "--public-key", "AB" * 32).out

    assert "a mirror" in added
    assert "--publish-plain" not in added + run("remote", "status", "--no-probe").out


def test_a_publisher_tells_the_key_that_readers_trust(
    run: Run, there: Run, place: Path, entry: str
) -> None:
    done = run("remote", "add", place, "--new-publisher", "--publish-plain", "--json").json
    assert run("remote", "push", entry).status == 0

    added = there("remote", "add", place, "--public-key", done["public_key"])

    assert (added.status, added.err) == (0, "")
    assert (done["trust"], len(done["public_key"])) == ("publisher", 64)
    assert there("remote", "status").status == 0
    with Store.open(place.parent / "there") as store:
        put(store, [5, 5, 5], tier="system", real=True)
    refused = there("remote", "push")
    assert refused.status == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add", "s3://key:secret@bucket/a", "--new-secret"), "credentials belong to"),
        (("add", "ftp://host/a", "--new-secret"), "is no remote"),
        (("add", "http://example.org/a", "--new-secret"), "not encrypted on its way"),
        (("add", "s3://bucket/../b", "--new-secret"), ".."),
        (("add", "/tmp/a"), "one secret"),
        (("add", "/tmp/a", "--public-key", "zz"), "64 hex digits"),
        (("add", "/tmp/a", "--new-secret", "--new-publisher"), "Give one of"),
        (("add", "none", "--new-secret"), "remote remove"),
        (("add", "/tmp/a", "--new-secret", "--publish-tiers", "systems"), "unknown tier"),
        (("add", "/tmp/a", "--secret-file", "/nowhere"), "/nowhere"),
        (("add", "https://host/a", "--new-secret", "--publish-plain"), "only read"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_and_leaves_nothing_behind(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = run("remote", *arguments)

    assert done.status in (1, 2)
    assert words in done.sentence
    assert not (tmp_path / "store").exists()
    assert list(tmp_path.rglob("*secret*")) == []


def test_a_short_secret_is_refused(run: Run, place: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_text("12345")

    assert "16" in run("remote", "add", place, "--secret-file", short).sentence


def test_remove_forgets_it_and_leaves_what_lies_there(run: Run, place: Path, entry: str) -> None:
    run("remote", "add", place, "--new-secret", "--publish-plain")
    run("remote", "push", entry)
    before = sorted(place.rglob("*"))

    assert run("remote", "remove").out.endswith("What lies there stays.\n")

    assert sorted(place.rglob("*")) == before
    for action in ("status", "push", "remove"):
        done = run("remote", action)
        assert done.status == 3
        assert "remote add URL" in done.sentence


def test_without_a_store_there_is_no_remote_and_none_is_made(run: Run, tmp_path: Path) -> None:
    assert run("remote", "status").status == 3
    assert not (tmp_path / "store").exists()


# ---- trying it -----------------------------------------------------------------------------------


def test_status_tries_it_and_tells_what_it_was_good_for(run: Run, place: Path, entry: str) -> None:
    run("remote", "add", place, "--new-secret", "--publish-plain", "--budget", "1GB")
    run("remote", "push", entry)

    said = run("remote", "status", "--json").json
    text = run("remote", "status").out

    assert said["probe"]["reachable"]
    assert said["probe"]["may_read"]
    assert said["probe"]["may_create"]
    assert said["probe"]["create_is_exclusive"]
    assert said["probe"]["message"] == ""
    assert said["budget_bytes_per_day"] == 10**9
    assert said["counters"]["published"] == 1
    assert "may read and create" in text
    assert run("stats", "--json").json["counters"]["remote_published"] == 1
    (line,) = [one for one in run("stats").out.splitlines() if one.startswith("remote")]
    assert "0 hits, 0 misses" in line
    assert "KiB sent" in line


def test_doctor_tries_the_remote_and_names_what_is_wrong(
    run: Run, place: Path, secret: Path, entry: str
) -> None:
    run("remote", "add", place, "--secret-file", secret, "--publish-plain")

    well = run("doctor", "--json").json
    secret.unlink()
    ill = run("doctor", "--json").json

    assert well["remote"]["probe"]["create_is_exclusive"]
    assert well["ok"]
    assert ill["remote"]["probe"] is None
    assert any(str(secret) in one["message"] for one in ill["findings"])
    assert not ill["ok"]
    assert "it cannot be used" in run("doctor").out


def test_a_secret_that_others_can_read_is_told(run: Run, place: Path, secret: Path) -> None:
    secret.chmod(0o640)
    added = run("remote", "add", place, "--secret-file", secret).out
    status = run("remote", "status").out
    doctor = run("doctor").out
    secret.chmod(0o600)

    assert all("Other users of this machine" in one for one in (added, status))
    assert "Other users of this machine" in " ".join(doctor.split())
    assert "Other users" not in run("remote", "status").out


def test_a_probe_leaves_nothing_behind(run: Run, place: Path) -> None:
    run("remote", "add", place, "--new-secret", "--publish-plain")

    assert run("remote", "status").status == 0

    assert [path for path in place.rglob("*") if path.is_file()] == []


# ---- by hand -------------------------------------------------------------------------------------


def test_push_publishes_what_is_named_or_may_be_by_itself(
    run: Run, place: Path, entry: str
) -> None:
    run("remote", "add", place, "--new-secret", "--publish-plain")

    (first,) = run("remote", "push", "--json").json
    (again,) = run("remote", "push", entry[:8], "--json").json

    assert (first["id"], first["outcome"], first["num_tokens"]) == (entry, "sent", 600)
    assert first["bytes"] > 0
    assert (again["outcome"], again["bytes"]) == ("there_already", 0)
    assert "600 tokens were published already" in run("remote", "push").out


def test_nothing_is_published_before_somebody_agrees(
    run: Run, place: Path, secret: Path, entry: str
) -> None:
    run("remote", "add", place, "--secret-file", secret)

    done = run("remote", "push", entry)

    assert done.status == 1
    assert "--publish-plain" in done.err
    assert not place.exists() or not [path for path in place.rglob("*") if path.is_file()]


# ---- with a model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "tiny")


def test_what_one_machine_warms_and_publishes_another_one_pulls_and_warms(
    model: Path, place: Path, secret: Path, tmp_path: Path
) -> None:
    of_prompt = ("--model", model, "--system", SYSTEM)
    shared = ("--remote", place, "--remote-secret-file", secret)
    first, second, third = (tmp_path / name for name in ("a", "b", "c"))

    sent = prepared_script(
        first, "warm", *of_prompt, *shared, "--publish", "--publish-plain", "--json"
    )
    assert sent.status == 0, sent.err
    ((report,)) = sent.json
    assert report["published"] == "sent"

    assert prepared_script(second, "remote", "add", place, "--secret-file", secret).status == 0
    pulled = prepared_script(second, "remote", "pull", *of_prompt)
    warmed = prepared_script(second, "warm", *of_prompt, "--json")
    (said,) = warmed.json
    assert (pulled.status, pulled.err) == (0, "")
    assert f"{report['num_tokens']:,} of them came from the remote" in pulled.out
    assert said["found_tokens"] == report["num_tokens"]

    at_once = prepared_script(third, "warm", *of_prompt, *shared, "--json")
    (said,) = at_once.json
    assert (said["found_tokens"], said["missing_tokens"]) == (report["num_tokens"], 0)
    nothing = prepared_script(
        third, "remote", "pull", "--model", model, "--system", f"Else. {SYSTEM}", "--json"
    )
    assert nothing.status == 3
    assert nothing.json[0]["remote"]["why"] == "not_found"
    make_secret(tmp_path / "other.secret")
    fourth = tmp_path / "d"
    prepared_script(fourth, "remote", "add", place, "--secret-file", tmp_path / "other.secret")
    without = prepared_script(fourth, "remote", "pull", *of_prompt)
    assert without.status == 3
    assert "publisher's secret" in without.err


def test_warm_says_that_it_cannot_publish_before_it_computes(
    model: Path, place: Path, secret: Path, tmp_path: Path
) -> None:
    of_prompt = ("--model", model, "--system", SYSTEM)
    nowhere = prepared_script(tmp_path / "a", "warm", *of_prompt, "--publish")
    shared = ("--remote", place, "--remote-secret-file", secret)
    not_agreed = prepared_script(tmp_path / "b", "warm", *of_prompt, *shared, "--publish")

    assert nowhere.status == 1
    assert "no remote to publish to" in nowhere.sentence
    assert not_agreed.status == 1
    assert "--publish-plain" in not_agreed.sentence


@pytest.mark.parametrize("command", ["warm", "serve"])
def test_a_remote_that_cannot_be_used_is_not_remembered(
    model: Path, place: Path, tmp_path: Path, command: str
) -> None:
    given = ("--system", SYSTEM) if command == "warm" else ()
    done = prepared_script(tmp_path / "store", command, "--model", model, *given, "--remote", place)

    assert done.status == 1
    assert "needs the secret" in done.err
    with Store.open(tmp_path / "store", read_only=True) as store:
        assert read_settings(store) is None


# ---- documents -----------------------------------------------------------------------------------


def test_members_of_the_json_are_documented(run: Run, place: Path, entry: str) -> None:
    text = section("remote")
    added = run("remote", "add", place, "--new-secret", "--publish-plain", "--json").json
    status = run("remote", "status", "--json").json
    (pushed,) = run("remote", "push", "--json").json

    assert {"probe", "counters"} == fields("remote")
    for name in {*added, *status, *status["probe"], *pushed}:
        assert f"`{name}`" in text, name
