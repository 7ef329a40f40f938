"""The commands that need no model: what they do, on a store, without one, and beside a server."""

from __future__ import annotations

import importlib.metadata
import json
import mmap
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from persist_cache import Store
from persist_cache.fingerprint.identifier import identify
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.queries.totals import Survey
from persist_cache_cli.output import format_bytes
from tests.bulk_store import conversations
from tests.bulk_store import fill as fill_bulk
from tests.cli import OTHER, QUESTION, REPLY, SYSTEM, Run, contents, fill, runner, script
from tests.fakes import FakeSource, fetched, fingerprint, put


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def ids(root: Path) -> dict[str, str]:
    return fill(root)


@pytest.fixture
def run(root: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(root, capfd)


# ---- list ------------------------------------------------------------------------------------


def test_list_shows_every_entry_with_its_short_id(ids: dict[str, str], run: Run) -> None:
    done = run("list")

    lines = done.out.splitlines()
    assert done.status == 0
    assert lines[0].split()[:5] == ["id", "tier", "model", "tokens", "own"]
    assert {line.split()[0] for line in lines[1:]} == {one[:6] for one in ids.values()}
    assert "\x1b" not in done.out


def test_list_filters_sorts_and_limits(ids: dict[str, str], run: Run) -> None:
    def listed(*arguments: object) -> list[str]:
        return run("list", "-q", *arguments).out.split()

    assert listed("--tier", "user", "--sort", "tokens") in (
        [ids["question"], ids["other"]],
        [ids["other"], ids["question"]],
    )
    assert listed("--model", "MODEL-W1") == [ids["foreign"]]
    assert listed("--model", fingerprint(weights="w1").hex[:12]) == [ids["foreign"]]
    assert listed("--label", "the *") == [ids["system"]]
    assert listed("--sort", "tokens", "--limit", 1) == [ids["reply"]]
    assert listed("--tier", "system", "--label", "no") == []


def test_list_tree_puts_conversations_below_their_system_prompt(
    ids: dict[str, str], run: Run
) -> None:
    lines = run("list", "--tree").out.splitlines()
    tree = run("list", "--tree", "--json").json

    place = {name: next(i for i, x in enumerate(lines) if ids[name][:6] in x) for name in ids}
    assert place["system"] < place["question"] < place["reply"]
    column = {name: lines[place[name]].index(ids[name][:6]) for name in ids}
    assert column["system"] < column["question"] == column["reply"] == column["other"]
    (system,) = [one for one in tree if one["id"] == ids["system"]]
    assert {one["id"] for one in system["children"]} == {ids["question"], ids["other"]}


def test_limited_tree_begins_at_the_system_prompts(ids: dict[str, str], run: Run) -> None:
    (root,) = run("list", "--tree", "--json", "--limit", "3", "--sort", "tokens").json

    assert root["id"] == ids["system"]
    (question,) = root["children"]
    assert question["id"] == ids["question"]
    assert [one["id"] for one in question["children"]] == [ids["reply"]]


def test_list_tree_hangs_entries_on_the_nearest_one_shown(ids: dict[str, str], run: Run) -> None:
    tree = run("list", "--tree", "--json", "--tier", "assistant").json

    assert [one["id"] for one in tree] == [ids["reply"]]


def test_a_long_conversation_is_not_indented(root: Path, run: Run) -> None:
    tokens: list[int] = []
    with Store.open(root, min_free_bytes=0) as store:
        for turn in range(40):
            tokens += range(turn * 10, turn * 10 + 4)
            store.put(fingerprint(), list(tokens), FakeSource(list(tokens)), tier="user")

    lines = run("list", "--tree").out.splitlines()

    assert len({line.index(" user") for line in lines if " user" in line}) == 1


def test_short_ids_are_unique_and_accepted(root: Path, run: Run) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        fill_bulk(store, conversations(fingerprint(), 300))
        numbers = {entry.id for entry in store.entries()}

    short = {one["id"]: one["short_id"] for one in run("list", "--json").json}

    assert set(short) == numbers
    assert len(set(short.values())) == 300
    assert all(len(one) >= 6 and full.startswith(one) for full, one in short.items())
    assert run("show", next(iter(short.values())), "-q").status == 0


# ---- show ------------------------------------------------------------------------------------


def test_show_tells_everything_about_an_entry(ids: dict[str, str], run: Run) -> None:
    done = run("show", ids["question"][:6], "--json")

    said = done.json
    assert said["num_tokens"] == len(QUESTION)
    assert said["parent"] == ids["system"]
    assert said["children"] == [ids["reply"]]
    assert [(run["start"], run["num_tokens"]) for run in said["runs"]] == [(0, 20), (20, 10)]
    assert [run["entries"] for run in said["runs"]] == [4, 2]
    assert all(Path(run["path"]).is_file() for run in said["runs"])
    assert said["identity"]["fields"]["weights"] == "w0"
    assert said["layout"][0]["class"] == "KVCache"
    assert said["checkpoint"] is None


def test_show_lists_numbers_blobs_and_fields(ids: dict[str, str], run: Run) -> None:
    out = run("show", ids["system"][:6].upper()).out

    for text in (ids["system"], "the agent", "org/model-w0", "/gone/w0", "1 blob", "weights"):
        assert text in out


def test_digests_that_show_prints_fit_on_a_terminal_and_paths_stay_whole() -> None:
    from persist_cache_cli.commands import show

    path = "/" + "far/" * 30
    lines = show._fields({"chat_template": "f" * 64, "path": path}, 80)

    assert len(lines[0]) == 80
    assert lines[1].endswith(path)


def test_show_names_a_checkpoint(root: Path, run: Run) -> None:
    with Store.open(root, min_free_bytes=0) as store:
        source = FakeSource(SYSTEM, complete=False, has_state=True)
        entry = store.put(fingerprint(), SYSTEM, source).entry

    checkpoint = run("show", entry, "--json").json["checkpoint"]

    assert checkpoint["start"] == len(SYSTEM)
    assert Path(checkpoint["path"]).is_file()


def test_show_says_why_an_entry_has_gone(ids: dict[str, str], run: Run) -> None:
    assert run("evict", ids["reply"], "--yes").status == 0

    done = run("show", ids["reply"])

    assert done.status == 3
    assert "evicted by request" in done.sentence


# ---- evict -----------------------------------------------------------------------------------


def test_evict_frees_what_it_said_and_keeps_what_is_shared(
    root: Path, ids: dict[str, str], run: Run
) -> None:
    planned = run("evict", ids["question"], ids["reply"], "--dry-run", "--json").json
    assert len(run("list", "-q").out.split()) == 5

    done = run("evict", ids["question"], ids["reply"], "--yes", "--json").json

    assert done["dry_run"] is False
    assert planned["dry_run"] is True
    assert done["freed_bytes"] == planned["freed_bytes"] > 0
    assert {one["id"] for one in done["entries"]} == {ids["question"], ids["reply"]}
    assert done["kept_for"] == 2
    assert done["kept_bytes"] > 0
    with Store.open(root) as store:
        assert {entry.id for entry in store.entries()} == {
            ids["system"],
            ids["other"],
            ids["foreign"],
        }
        assert fetched(store, OTHER) == len(OTHER)
        assert fetched(store, REPLY) == len(SYSTEM)
        assert store.check() == []


def test_evict_says_what_stays(ids: dict[str, str], run: Run) -> None:
    out = run("evict", "--tier", "system", "--model", "w0", "--dry-run").out

    assert "1 entry would go, 0 B to free." in out
    assert "3 other entries need them, too." in out


def test_evict_tells_pins_and_what_the_entries_free_together(ids: dict[str, str], run: Run) -> None:
    run("pin", ids["other"])

    heading, *rows = run("evict", "--all", "--dry-run").out.split("\n\n")[0].splitlines()

    assert {"own", "shared", "frees", "kept"} <= set(heading.split())
    assert ["pinned" in row for row in rows].count(True) == 1
    at = heading.index("frees") + len("frees")
    frees = [row[:at].split()[-2:] for row in rows]
    total = run("evict", "--all", "--dry-run", "--json").json["freed_bytes"]
    assert frees[-1] == format_bytes(total).split()
    assert frees == sorted(frees, key=lambda one: float(one[0]))


def test_label_stays_at_80_columns(
    ids: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from persist_cache_cli.commands import evict, list

    for module in (list, evict):
        monkeypatch.setattr(module, "terminal_width", lambda: 80)
    run("label", ids["reply"], "the answer of the support agent")
    run("pin", ids["reply"])
    run("ttl", ids["reply"], "1d")

    for words in (["list"], ["list", "--tree"], ["evict", "--all", "--dry-run"]):
        lines = run(*words).out.splitlines()

        assert "label" in lines[0]
        assert any("the answer" in line for line in lines)
        assert max(map(len, lines[: 1 + len(ids)])) <= 80


def test_list_without_a_match_says_so_and_ends_with_3(ids: dict[str, str], run: Run) -> None:
    done = run("list", "--label", "nobody*")

    assert done.status == 3
    assert "Nothing matches" in done.sentence
    assert run("list", "--label", "nobody*", "--json").json == []
    assert run("list", "--label", "nobody*", "--quiet").status == 3


def test_evict_filters_must_all_be_true(ids: dict[str, str], run: Run) -> None:
    def chosen(*arguments: object) -> set[str]:
        done = run("evict", *arguments, "--dry-run", "--json")
        assert done.status == (0 if done.json["entries"] else 3)
        return {one["id"] for one in done.json["entries"]}

    assert chosen("--tier", "user") == {ids["question"], ids["other"]}
    assert chosen("--tier", "system", "--model", "w1") == {ids["foreign"]}
    assert chosen("--tier", "assistant", "--tier", "user") == {
        ids["reply"],
        ids["question"],
        ids["other"],
    }
    assert chosen("--tier", "system", "--model", "w0", "--model", "W1") == {
        ids["system"],
        ids["foreign"],
    }
    assert chosen(ids["system"], "--tier", "user") == set()
    assert chosen("--older-than", "1h") == set()
    assert chosen("--larger-than", "1B", "--tier", "user") == {ids["other"]}
    assert chosen("--label", "the agent") == {ids["system"]}


@pytest.mark.parametrize("option", ["--model", "--match"])
def test_evict_takes_nothing_for_everything(ids: dict[str, str], run: Run, option: str) -> None:
    """`--model "$MODEL"`, and the variable is not set."""
    done = run("evict", option, "", "--yes")

    assert done.status == 2
    assert "--all" in done.err
    assert len(run("list", "--json").json) == len(ids)


def test_evict_leaves_pinned_entries_unless_they_are_named(ids: dict[str, str], run: Run) -> None:
    assert run("pin", ids["other"], ids["question"]).status == 0

    filtered = run("evict", "--tier", "user", "--yes")
    named = run("evict", ids["other"], "--yes")

    assert filtered.status == 3
    assert "All 2 entries that match are pinned" in filtered.sentence
    assert named.status == 0
    assert ids["other"] not in run("list", "-q").out


def test_evict_to_a_size_goes_in_the_order_of_eviction(
    root: Path, ids: dict[str, str], run: Run
) -> None:
    total = run("stats", "--json").json["bytes"]["total"]

    planned = run("evict", "--to", total - 1, "--dry-run", "--json").json
    before = run("list", "-q").out.split()
    done = run("evict", "--to", total - 1, "--yes", "--json").json

    assert [one["id"] for one in planned["entries"]] == [ids["reply"]]
    assert len(before) == 5
    assert [one["id"] for one in done["entries"]] == [ids["reply"]]
    assert run("evict", "--to", "1TB", "--yes").status == 3


def test_evict_all_leaves_no_blob_behind(root: Path, ids: dict[str, str], run: Run) -> None:
    run("pin", ids["system"])
    damage(next(iter((root / "blobs").glob("*/*"))))
    run("check", "--read-data", "--repair")

    done = run("evict", "--all", "--yes")

    assert done.status == 0
    assert list(root.rglob("*.safetensors")) == []
    assert run("list", "--json").json == []
    assert run("evict", "--all", "--yes").status == 0


def test_evict_all_takes_what_is_in_quarantine(root: Path, ids: dict[str, str], run: Run) -> None:
    """Damaged files hold prompts, too."""
    damage(next(iter((root / "blobs").glob("*/*"))))
    run("check", "--read-data", "--repair")
    (aside,) = (root / "quarantine").iterdir()
    aside_bytes = aside.stat().st_size
    planned = run("evict", "--all", "--dry-run")
    counted = run("evict", "--all", "--dry-run", "--json").json
    assert aside.exists()

    done = run("evict", "--all", "--yes", "--json").json

    assert "1 damaged blob in quarantine goes, too." in planned.out
    assert done["freed_bytes"] == counted["freed_bytes"] >= aside_bytes
    assert list((root / "quarantine").iterdir()) == []
    assert run("stats", "--json").json["bytes"]["quarantine"] == 0
    assert run("evict", "--all", "--yes").out == "The store was empty.\n"


def test_evict_stale_names_what_is_gone(tmp_path: Path, root: Path, run: Run) -> None:
    def put(weights: str, mlx_lm: str, path: Path) -> str:
        fields = {"weights": weights, "mlx_lm": mlx_lm}
        model = Fingerprint.from_fields(fields, {"name": "m", "path": str(path)})
        return put_as(model)

    def put_as(model: Fingerprint | None) -> str:
        assert model is not None
        entry = store.put(model, SYSTEM, FakeSource(SYSTEM)).entry
        assert entry is not None
        return entry

    here = importlib.metadata.version("mlx-lm")
    same, changed = fake_model(tmp_path / "same"), fake_model(tmp_path / "changed")
    with Store.open(root, min_free_bytes=0) as store:
        old = put("w0", "0.30.0", tmp_path)
        gone = put("w1", here, tmp_path / "gone")
        unknown = put("w2", here, tmp_path)
        quantized = put_as(identify(same, kv_bits=8))
        trained = put_as(identify(changed))
    (changed / "model.safetensors").write_bytes(b"other weights")

    done = run("evict", "--stale", "--dry-run", "--json").json

    reasons = {one["id"]: one["reason"] for one in done["entries"]}
    assert set(reasons) == {old, gone, trained}
    assert "0.30.0" in reasons[old]
    assert "is gone" in reasons[gone]
    assert "have changed (weights)" in reasons[trained]
    assert {unknown, quantized}.isdisjoint(reasons)


@pytest.fixture
def upgraded(root: Path) -> dict[str, int]:
    """A store from before an upgrade of mlx-lm; bytes by entry, and what can still be used."""
    here = importlib.metadata.version("mlx-lm")
    layouts = {"old": ("0.30.0", 1), "older": ("0.30.0", 1), "newer": (here, 99), "now": (here, 1)}
    with Store.open(root, min_free_bytes=0) as store:
        for number, (name, (mlx_lm, layout)) in enumerate(layouts.items()):
            model = Fingerprint.from_fields(
                {"weights": name, "mlx_lm": mlx_lm, "layout": layout}, {"name": name}
            )
            tokens = [*SYSTEM, *range(number * 10)]
            store.put(model, tokens, FakeSource(tokens), pinned=name == "older")
        models = {one.fingerprint: one.name for one in Survey(store).models.values()}
        return {models[one.fingerprint]: one.own_bytes for one in store.entries()}


def test_stats_count_what_an_upgrade_left_behind(upgraded: dict[str, int], run: Run) -> None:
    found = run("stats", "--json").json["left_behind"]
    said = run("stats").out

    assert [(one["entries"], one["pinned"]) for one in found] == [(2, 1), (1, 0)]
    assert [one["bytes"] for one in found] == [
        upgraded["old"] + upgraded["older"],
        upgraded["newer"],
    ]
    assert "0.30.0" in found[0]["reason"]
    assert "layout 99" in found[1]["reason"]
    assert all(one["reason"] in " ".join(said.split()) for one in found)


def test_doctor_counts_what_an_upgrade_left_behind(upgraded: dict[str, int], run: Run) -> None:
    notes = [one["message"] for one in run("doctor", "--json").json["findings"]]

    assert sum("2 entries" in one and "0.30.0" in one for one in notes) == 1
    assert sum("1 entry" in one and "layout 99" in one for one in notes) == 1


def test_command_that_is_named_removes_what_an_upgrade_left_behind(
    upgraded: dict[str, int], root: Path, run: Run
) -> None:
    command = re.search(r"`(persist-cache [^`]* evict --stale)`", run("stats").out)
    assert command is not None
    arguments = shlex.split(command[1])[1:]
    assert arguments[:2] == ["--store", str(root)]

    run(*arguments[2:], "--yes")

    left = run("stats", "--json").json["left_behind"]
    assert [(one["entries"], one["pinned"]) for one in left] == [(1, 1)], "the pinned one stays"
    assert run("stats", "--json").json["entries"] == 2


def test_stats_of_a_store_without_an_upgrade_name_nothing(ids: dict[str, str], run: Run) -> None:
    assert run("stats", "--json").json["left_behind"] == []
    assert "left behind" not in run("stats").out


def fake_model(folder: Path) -> Path:
    """As much of a model as its identity is made from."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    return folder


def test_evict_asks_nobody_without_a_terminal(root: Path, ids: dict[str, str]) -> None:
    before = contents(root)

    done = script(root, "evict", "--tier", "user", input="y\n")

    assert done.status == 2
    assert "--yes" in done.sentence
    assert contents(root) == before


def test_evict_on_a_terminal_asks(root: Path, ids: dict[str, str]) -> None:
    import pty

    def answer(text: str) -> tuple[int, str]:
        pid, terminal = pty.fork()
        if pid == 0:
            program = [sys.executable, "-m", "persist_cache_cli", "--store", str(root)]
            os.execv(sys.executable, [*program, "evict", ids["reply"]])
        os.write(terminal, text.encode())
        said = b""
        while True:
            try:
                part = os.read(terminal, 4096)
            except OSError:
                break
            if not part:
                break
            said += part
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()

    refused = answer("n\n")
    agreed = answer("y\n")

    assert refused[0] == 1
    assert "Evict 1 entry" in refused[1]
    assert refused[1].rstrip().endswith("Nothing was evicted.")
    assert "Error" not in refused[1]
    assert agreed[0] == 0
    assert "1 entry gone" in agreed[1]


# ---- marks -----------------------------------------------------------------------------------


def test_marks_are_kept(root: Path, ids: dict[str, str], run: Run) -> None:
    started = time.time()

    pinned = run("pin", ids["reply"][:6], ids["other"][:6], "--json").json
    expiring = run("ttl", ids["reply"], "1h30m", "--json").json
    run("label", ids["reply"], "zwölf Boxkämpfer")

    assert [one["pinned"] for one in pinned] == [True, True]
    with Store.open(root) as store:
        reply = store.get(ids["reply"])
        assert reply.pinned
        assert store.get(ids["other"]).pinned
        assert reply.label == "zwölf Boxkämpfer"
        assert reply.expires == expiring[0]["expires"]
        assert 0 <= (reply.expires or 0) - started - 5400 < 60

    run("unpin", ids["reply"])
    run("ttl", ids["reply"], "none")
    run("label", ids["reply"], "")
    with Store.open(root) as store:
        reply = store.get(ids["reply"])
        assert (reply.pinned, reply.expires, reply.label) == (False, None, "")


def test_nothing_is_marked_when_one_id_is_unknown(
    root: Path, ids: dict[str, str], run: Run
) -> None:
    done = run("pin", ids["reply"], "0123456789abcdef")

    assert done.status == 3
    assert not any(one["pinned"] for one in run("list", "--json").json)


def test_what_expired_goes_with_gc(root: Path, ids: dict[str, str], run: Run) -> None:
    run("ttl", ids["reply"], "0s")

    done = run("gc", "--json").json

    assert done["evicted"] == 1
    assert done["freed_bytes"] > 0
    assert done["entries"] == 4
    assert ids["reply"] not in run("list", "-q").out


def mostly_dead(root: Path) -> None:
    """One file with ten living rows and 390 dead ones."""
    with Store.open(root, min_free_bytes=0) as store:
        long = put(store, [7, *range(400)])
        put(store, [7, *range(9)])
        store.evict([long])


def test_gc_says_what_it_wrote_anew(root: Path, run: Run) -> None:
    mostly_dead(root)

    done = run("gc")

    assert done.out.splitlines()[1:] == ["1 blob of mostly dead rows written anew."]
    assert run("gc", "--json").json["compacted_blobs"] == 0


def test_gc_says_what_it_had_no_room_for(root: Path, run: Run) -> None:
    mostly_dead(root)
    with Store.open(root) as store:
        usage = store.stats().usage
    # So small a budget has a small ballast.
    Store.open(root, max_bytes=usage.total - usage.ballast + mmap.PAGESIZE).close()

    done = run("gc")

    assert "1 blob of mostly dead rows stays: the budget has no room for a copy." in done.out
    report = run("gc", "--json").json
    assert (report["compacted_blobs"], report["skipped_blobs"]) == (0, 1)


# ---- stats, check ----------------------------------------------------------------------------


def test_stats_adds_up(root: Path, ids: dict[str, str], run: Run) -> None:
    with Store.open(root) as store:
        store.count("hits_disk", 2)
        store.count("misses", 1)
        store.count("misses:no stored prompt begins with the first token", 1)
        store.count("tokens_saved", 40)

    said = run("stats", "--json").json
    text = run("stats").out

    assert (said["entries"], said["blobs"]) == (5, 5)
    assert said["hits"] == {"memory": 0, "disk": 2, "remote": 0}
    assert said["miss_reasons"] == {"no stored prompt begins with the first token": 1}
    assert sum(tier["entries"] for tier in said["tiers"]) == 5
    assert sum(tier["bytes"] for tier in said["tiers"]) == said["bytes"]["blobs"]
    assert sum(model["bytes"] for model in said["models"]) == said["bytes"]["blobs"]
    assert said["tiers"][0]["tier"] == "system"
    assert "2 of 3 requests" in text
    assert "no stored prompt begins" in text


def test_stats_watch_goes_on_until_it_is_interrupted(root: Path, ids: dict[str, str]) -> None:
    program = [sys.executable, "-m", "persist_cache_cli", "--store", str(root)]
    with subprocess.Popen(
        [*program, "stats", "--watch", "--interval", "0.1s", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as watching:
        assert watching.stdout is not None
        seen = 0
        for line in watching.stdout:
            seen += line == "}\n"
            if seen == 2:
                break
        watching.send_signal(2)
        watching.communicate(timeout=30)

    assert seen == 2
    assert watching.returncode == 130


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_check_finds_and_mends(root: Path, ids: dict[str, str], run: Run) -> None:
    assert run("check", "--read-data").status == 0
    damage(next(iter((root / "blobs").glob("*/*"))))
    before = contents(root)

    quick = run("check")
    found = run("check", "--read-data", "--json")
    assert contents(root) == before
    mended = run("check", "--read-data", "--repair", "--json")

    assert quick.status == 0
    assert found.status == 1
    assert [one["kind"] for one in found.json["problems"]] == ["damaged"]
    assert found.json["repaired"] is False
    assert mended.status == 0
    assert mended.json["repaired"] is True
    assert len(mended.json["quarantine"]) == 1
    assert run("check", "--read-data").status == 0


def test_check_rebuilds_a_lost_index(root: Path, ids: dict[str, str], run: Run) -> None:
    (root / "data.mdb").unlink()
    (root / "lock.mdb").unlink()

    lost = run("list")
    done = run("check", "--rebuild-index", "--json")

    assert lost.status == 1
    assert "--rebuild-index" in lost.sentence
    assert done.status == 0
    assert done.json["rebuilt_blobs"] == 5
    assert set(run("list", "-q").out.split()) == set(ids.values())


def test_check_rebuilds_a_sound_index_and_keeps_marks(
    root: Path, ids: dict[str, str], run: Run
) -> None:
    run("pin", ids["reply"])
    before = run("list", "--json", "--sort", "tokens").json

    assert run("check", "--rebuild-index").status == 0

    assert run("list", "--json", "--sort", "tokens").json == before


# ---- no store, an empty one, one that is in use ----------------------------------------------


@pytest.mark.parametrize("empty", ["absent", "empty"])
def test_without_entries(root: Path, run: Run, empty: str) -> None:
    if empty == "empty":
        Store.open(root).close()

    statuses = {
        "list": 0,
        "stats": 0,
        "check": 0,
        "gc": 0,
        "show ab": 3,
        "pin ab": 3,
        "unpin ab": 3,
        "ttl ab 1d": 3,
        "label ab x": 3,
        "evict ab --yes": 3,
        "evict --tier user --yes": 3,
        "list --tree": 0,
    }
    for command, status in statuses.items():
        done = run(*command.split())
        assert done.status == status, (command, done.err)
        assert "Traceback" not in done.err
    assert run("list", "--json").json == []
    assert run("list", "--tree", "--json").json == []
    assert run("check", "--json").json["problems"] == []
    assert run("stats", "--json").json["exists"] == (empty == "empty")
    assert root.exists() == (empty == "empty")


SERVER = """
import sys
from persist_cache import Store
with Store.open(sys.argv[1], min_free_bytes=0) as store:
    print("open", flush=True)
    sys.stdin.read()
    print(len(store.entries()))
"""


def test_commands_work_beside_a_process_that_has_the_store_open(
    root: Path, ids: dict[str, str], run: Run
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "open\n"
        for command in ("list", "stats", "check --read-data", "gc", "check --rebuild-index"):
            assert run(*command.split()).status == 0
        assert run("pin", ids["system"]).status == 0
        assert run("evict", ids["reply"], "--yes").status == 0
        out, _ = server.communicate("", timeout=30)

    assert out == "4\n"


# ---- through the installed script ------------------------------------------------------------


def test_the_installed_script_works(root: Path, ids: dict[str, str]) -> None:
    def run(*arguments: object) -> str:
        done = script(root, *arguments)
        assert (done.status, done.err) == (0, "")
        return done.out

    assert len(json.loads(run("list", "--json"))) == 5
    assert len(run("list", "--tree").splitlines()) == 10
    assert json.loads(run("show", ids["system"], "--json"))["id"] == ids["system"]
    assert run("pin", ids["system"], "-q") == ""
    assert ids["system"][:6] in run("unpin", ids["system"])
    assert "expire in 7 d" in run("ttl", ids["system"], "7d")
    assert "labelled" in run("label", ids["system"], "x")
    assert json.loads(run("stats", "--json"))["entries"] == 5
    assert "no problems" in run("check", "--read-data")
    assert "0 entries gone" in run("gc")
    assert "1 entry gone" in run("evict", ids["reply"], "--yes")


def test_a_reader_may_leave_early(root: Path, ids: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "persist_cache_cli", "--store", str(root), "list", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as listing:
        assert listing.stdout is not None
        listing.stdout.close()
        assert listing.stderr is not None
        assert listing.stderr.read() == ""


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_a_folder_whose_name_is_no_text_holds_a_store_too(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"\xff\xfe") / "store"
    root.parent.mkdir()
    (first, *_) = sorted(fill(root).values())

    for words in (["list"], ["show", first], ["stats"], ["stats", "--json"], ["check"], ["gc"]):
        done = script(root, *words, errors="replace")
        assert (done.status, done.err) == (0, ""), words
    file = root.with_name(os.fsdecode(b"\xfd.tar"))
    done = script(root, "export", first, file, "--json")
    assert (done.status, done.err) == (0, "")
    assert Path(done.json["file"]) == file
    assert file.exists()


def test_completion_names_commands_and_ids(root: Path, ids: dict[str, str]) -> None:
    def complete(words: str) -> list[str]:
        env = {
            "_PERSIST_CACHE_COMPLETE": "bash_complete",
            "COMP_WORDS": f"persist-cache --store {root} {words}",
            "COMP_CWORD": str(2 + len(words.split())),
        }
        out = script(root, env=env).out
        return [line.partition(",")[2] for line in out.splitlines()]

    with Store.open(root) as store:
        store.set_label(ids["other"], "the other")
    assert complete("unp") == ["unpin"]
    assert complete(f"show {ids['reply'][:8]}") == [ids["reply"]]
    assert complete("show the") == ["the agent", "the other"]


LIGHT = """
import sys
from persist_cache_cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    heavy = {name.partition(".")[0] for name in sys.modules}
    print(ended.code, sorted(heavy & {"mlx", "mlx_lm", "transformers", "numpy", "rich"}))
"""


@pytest.mark.parametrize(
    "command", ["list", "list --tree", "show", "evict --yes", "pin", "stats", "check", "gc"]
)
def test_commands_import_neither_mlx_nor_transformers_nor_rich(
    root: Path, ids: dict[str, str], command: str
) -> None:
    arguments = command.split()
    if command in ("show", "evict --yes", "pin"):
        arguments.append(ids["reply"])
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, "--store", str(root), *arguments],
        capture_output=True,
        text=True,
    )

    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
