"""The page at `/cache`, in headless Chromium: what it shows, its buttons, its keys, its manners."""

from __future__ import annotations

import json
import re
import shlex
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests

from persist_cache.fingerprint.value import Fingerprint
from persist_cache.queries.ids import find_ids
from persist_cache.remote import RemoteStatus
from persist_cache.server.page import page_response
from tests import axe, browser
from tests.browser import complaints, needs_chromium, size, until
from tests.bulk_store import Prompt, conversations
from tests.fakes import FakeSource
from tests.page_server import MODEL, TOKEN, PageServer, many, relabelled, remember, serving
from tests.pairs import chat

selenium = pytest.importorskip("selenium", reason="the page's tests need selenium")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = needs_chromium
HOSTILE = '<img src=x onerror="document.title=1"><b>&amp;'


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.started() as driver:
        yield driver


def open_page(driver: Any, server: PageServer) -> None:
    # The page before may have lost its server, and said so.
    driver.get("about:blank")
    complaints(driver)
    driver.get(f"{server.url}/cache#token={TOKEN}")
    until(lambda: "updated" in driver.find_element(By.ID, "state").text)


def labelled(driver: Any, label: str) -> Any:
    """The first button whose accessible name begins so."""
    return driver.find_element(By.CSS_SELECTOR, f'#entries button[aria-label^="{label}"]')


def rows(driver: Any) -> int:
    """Rows that there would be, were all of them in sight."""
    first = driver.find_elements(By.CSS_SELECTOR, "#entries li")
    return int(first[0].get_attribute("aria-setsize")) if first else 0


def text_of(driver: Any, id: str) -> str:
    return str(driver.find_element(By.ID, id).text)


def says(driver: Any, text: str) -> bool:
    """Whether the dialog has this text."""
    return text in text_of(driver, "dialog")


def prompts_with_requests(server: PageServer, prompts: list[Prompt]) -> None:
    """Have the beginnings of some of these prompts asked for."""
    for place, prompt in enumerate(prompts[:8]):
        tokens = list(prompt.all_tokens())
        remember(server.ring, [*tokens, 7], len(tokens), client=f"client-{place}/1")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    """Two system prompts with nine conversations of two entries each; some requests."""
    prompts = relabelled(list(conversations(MODEL, 20, systems=2, turns=1)), HOSTILE)
    with serving(tmp_path_factory.mktemp("small"), prompts) as server:
        prompts_with_requests(server, prompts)
        first, second = (
            chat(f"You help. Today's date is 2026-03-0{day}. Be kind.") for day in "12"
        )
        for body in (first, second):
            said = json.dumps(body).encode()
            tokens = [ord(one) for one in body["messages"][0]["content"]]
            remember(server.ring, tokens, body=said, client="dated/1", first_s=2.5)
        many(server.ring, 20)
        yield server


# ---- states ------------------------------------------------------------------------------------


def test_empty_store_says_what_fills_it(chromium: Any, tmp_path: Path) -> None:
    with serving(tmp_path, []) as server:
        open_page(chromium, server)
        entries = text_of(chromium, "entries")

        assert "The store is empty" in entries
        assert f"curl {server.url}/v1/chat/completions" in entries
        ours = f"persist-cache --store {tmp_path / 'store'}"
        assert f"{ours} warm --model" in entries
        assert f"{ours} launch" in entries
        assert "is on" in text_of(chromium, "h-disk")
        assert "No request yet" in text_of(chromium, "card-last")
        assert axe.violations(chromium) == []
        assert complaints(chromium) == []


def test_warming_says_how_far_it_is(chromium: Any, tmp_path: Path) -> None:
    with serving(tmp_path, []) as server:
        told = {"state": "running", "done": 2, "total": 5, "failed": ["rules.txt is not there."]}
        server.health.update(weights="unloaded", warming=told)
        open_page(chromium, server)

        said = until(lambda: text_of(chromium, "model"))

        assert "unloaded; the next request loads it" in said
        assert "warming: 2 of 5 prompts done" in said
        assert "not warmed: rules.txt is not there." in said
        assert axe.violations(chromium) == []


def test_disk_that_is_off_says_why(chromium: Any) -> None:
    server = PageServer(None, disk_off="the folder is another user's")
    open_page(chromium, server)

    assert "is off: the folder is another user's" in text_of(chromium, "h-disk")
    assert "Off" in text_of(chromium, "card-disk")
    assert "the folder is another user's" in text_of(chromium, "card-disk")
    assert "Nothing is kept on disk: the folder is another user's." in text_of(chromium, "entries")
    assert axe.violations(chromium) == []
    assert complaints(chromium) == []
    server.stop()


def test_quota_that_is_nearly_used_up_is_told(chromium: Any, tmp_path: Path) -> None:
    with serving(tmp_path, list(conversations(MODEL, 3))) as server:
        server.store.set_rules(quotas={"model": 1 << 30})
        (quota,) = server.store.stats().quotas
        server.store.set_rules(quotas={"model": quota.nbytes + 1})
        open_page(chromium, server)

        said = until(lambda: text_of(chromium, "card-disk"))
        assert "Look here" in said
        assert "the quota of org/A-Model-4bit is nearly used up" in said


def test_token_is_asked_for_and_kept_for_the_tab(chromium: Any, tmp_path: Path) -> None:
    with serving(tmp_path, list(conversations(MODEL, 1)), token="s3cret") as server:
        chromium.get(f"{server.url}/cache")
        for given, said in (("wrong", "needs the server's"), ("s3cret", "not right")):
            until(partial(says, chromium, said))
            assert axe.violations(chromium) == []
            chromium.find_element(By.ID, "token").send_keys(given, Keys.ENTER)
        until(lambda: labelled(chromium, "Pin"))

        chromium.get("about:blank")
        chromium.get(f"{server.url}/cache")
        until(lambda: labelled(chromium, "Pin"))

        assert rows(chromium) == 1
        assert not chromium.find_element(By.ID, "dialog").is_displayed()


def test_what_an_upgrade_left_behind_is_shown_with_what_removes_it(
    chromium: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "it's <b>here"
    folder.mkdir()
    with serving(folder, []) as server:
        for number, (mlx_lm, layout) in enumerate((("0.30.0", 1), ("0.30.0", 1), ("", 99))):
            model = Fingerprint.from_fields({"mlx_lm": mlx_lm, "layout": layout, "n": number}, {})
            server.store.put(model, [1, 2], FakeSource([1, 2]), pinned=number == 0)
        open_page(chromium, server)
        stale = "#left li.stale"
        until(lambda: chromium.find_elements(By.CSS_SELECTOR, stale))
        lines = [one.text for one in chromium.find_elements(By.CSS_SELECTOR, stale)]
        size(chromium, 360, 700)
        width = chromium.execute_script("return document.documentElement.scrollWidth")
        size(chromium, 1280, 900)
        found = {one["reason"] for one in server_left_behind(server)}

        assert len(lines) == len(found) == 2
        for reason in found:
            (line,) = (one for one in lines if reason in one)
            assert line.endswith(("removes it.", "removes them."))
        (pinned,) = (one for one in lines if "0.30.0" in one)
        assert pinned.startswith("2 entries, ")
        assert "1 of them pinned" in pinned
        command = re.findall(r"persist-cache .* evict --stale", pinned)[-1].split("first. ")[-1]
        assert shlex.split(command) == [
            "persist-cache", "--store", str(folder / "store"), "evict", "--stale"
        ]  # fmt: skip
        assert width <= 360
        assert complaints(chromium) == []

        for entry in server.store.entries():
            server.store.evict([entry.id])
        until(lambda: not chromium.find_elements(By.CSS_SELECTOR, stale))


def server_left_behind(server: PageServer) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    said = requests.get(f"{server.url}/v1/cache/stats", headers=headers, timeout=10).json()
    found: list[dict[str, Any]] = said["store"]["left_behind"]
    return found


def test_polling_sees_changes_and_rests_when_paused_or_hidden(
    chromium: Any, tmp_path: Path
) -> None:
    with serving(tmp_path, list(conversations(MODEL, 1))) as server:
        open_page(chromium, server)
        (entry,) = server.store.entries()

        server.store.pin(entry.id)
        until(lambda: labelled(chromium, "Unpin"))
        chromium.find_element(By.ID, "pause").click()
        server.store.pin(entry.id, False)
        chromium.execute_async_script("tick().then(arguments[0])")
        assert labelled(chromium, "Unpin")
        chromium.find_element(By.ID, "pause").click()
        until(lambda: labelled(chromium, "Pin"))

        hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
        changed = "document.dispatchEvent(new Event('visibilitychange'));"
        chromium.execute_script(hide % "true" + changed)
        server.store.pin(entry.id)
        chromium.execute_async_script("tick().then(arguments[0])")
        assert labelled(chromium, "Pin")
        chromium.execute_script(hide % "false" + changed)
        until(lambda: labelled(chromium, "Unpin"))

        server.stop()
        chromium.execute_async_script("tick(true).then(arguments[0])")
        assert "cannot be reached since" in text_of(chromium, "alert")
        assert labelled(chromium, "Unpin"), "what is known stays in sight"
        assert axe.violations(chromium) == []


def test_a_server_that_says_nothing_is_noticed_and_asked_again(
    chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, []) as server:
        open_page(chromium, server)
        goes_on = threading.Event()
        with monkeypatch.context() as patched:
            patched.setattr(server.ring, "settle", lambda *given: goes_on.wait(60))
            chromium.execute_script("state.patience = 300; tick(true)")
            until(lambda: "cannot be reached since" in text_of(chromium, "alert"))
            goes_on.set()

        chromium.execute_script("state.patience = 30000")
        until(lambda: "updated" in text_of(chromium, "state"), timeout_s=20)
        assert chromium.execute_script("return rest(3600e3)") <= 30_000


# ---- requests ----------------------------------------------------------------------------------


def test_a_request_tells_where_its_prompt_came_from_by_its_name(
    chromium: Any, small: PageServer
) -> None:
    open_page(chromium, small)

    names = [
        one.get_attribute("aria-label")
        for one in chromium.find_elements(By.CSS_SELECTOR, "#bars button")
    ]

    (dated,) = (one for one in names if "dated/1" in one and "date" in one.split("; ")[-1])
    assert re.match(r"\d\d:\d\d:\d\d; 46 tokens: 46 computed; first token after 2\.5 s", dated)
    assert any("64 from memory, 1 computed" in one for one in names)
    assert len(names) == 30


def test_requests_before_a_restart_are_not_taken_for_the_latest(
    chromium: Any, tmp_path: Path
) -> None:
    with serving(tmp_path, []) as server:
        many(server.ring, 4)
        open_page(chromium, server)
        tick = "tick(true).then(() => arguments[0](state.requests.map(one => one.id)))"
        known = "return state.requests.map(one => one.id)"

        def are_told(ids: list[str]) -> bool:
            return bool(chromium.execute_async_script(tick) == ids)

        for number in (1, 6):  # fewer, and more, than there were before
            server.start_again()
            ids = [remember(server.ring, [place] * 9) for place in range(number)]
            until(partial(are_told, ids))

        assert chromium.execute_script(known) == ids
        assert f"the latest {number}" in text_of(chromium, "requests-count")
        assert complaints(chromium) == []


def test_the_timeline_is_walked_and_opened_by_keys(chromium: Any, small: PageServer) -> None:
    open_page(chromium, small)
    chromium.execute_script("document.querySelector('#bars button[tabindex=\"0\"]').focus()")

    names = []
    for key in (Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.END):
        chromium.switch_to.active_element.send_keys(key)
        names.append(chromium.switch_to.active_element.get_attribute("data-request"))
    readout = text_of(chromium, "readout")
    name = chromium.switch_to.active_element.get_attribute("aria-label")
    chromium.switch_to.active_element.send_keys(Keys.ENTER)
    until(partial(says, chromium, "Request of"))
    chromium.switch_to.active_element.send_keys(Keys.ESCAPE)
    until(lambda: not chromium.find_element(By.ID, "dialog").is_displayed())

    assert names[1] == names[3]
    assert len(set(names)) == 4
    assert readout == name
    assert chromium.switch_to.active_element.get_attribute("data-request") == names[-1]


def test_a_request_is_explained_with_both_texts_and_what_mends_it(
    chromium: Any, small: PageServer
) -> None:
    open_page(chromium, small)

    find = "state.requests.find(one => one.parted && one.parted.cause === 'date').id"
    chromium.execute_async_script(f"requestDetails({find}).then(arguments[0])")
    marks = [one.text for one in chromium.find_elements(By.CSS_SELECTOR, "#dialog mark")]

    assert marks == ["1", "2"]
    assert says(chromium, "Today's date is 2026-03-0")
    assert says(chromium, "A date or time differs.")
    assert says(chromium, "--stabilize billing,date")
    assert says(chromium, "Lost: ")
    assert axe.violations(chromium) == []
    chromium.find_element(By.CSS_SELECTOR, "#dialog .command button").click()
    until(partial(says, chromium, "Copied"))
    chromium.find_element(By.CSS_SELECTOR, '#dialog [data-key="warm"]').click()
    until(partial(chromium.find_element, By.CSS_SELECTOR, "#dialog [type=submit]"))
    assert axe.violations(chromium) == []


def test_a_request_whose_client_left_does_not_say_that_all_was_computed(
    chromium: Any, tmp_path: Path
) -> None:
    with serving(tmp_path, []) as server:
        remember(server.ring, [1] * 90, first_s=None, state="left")
        open_page(chromium, server)
        until(lambda: "Its client left" in text_of(chromium, "card-last"))

        assert "90 of 90 tokens to compute" in text_of(chromium, "card-last")
        assert "90 to compute" in text_of(chromium, "readout")


def test_a_short_hit_says_why_it_was_no_more(chromium: Any, tmp_path: Path) -> None:
    with serving(tmp_path, []) as server:
        remember(server.ring, [1] * 90, 4, reason="what is stored goes on differently")
        open_page(chromium, server)
        until(lambda: "computed" in text_of(chromium, "card-last"))

        assert "What is stored goes on differently." in text_of(chromium, "card-last")
        assert "what is stored goes on differently" in text_of(chromium, "requests")


def test_cards_answer_what_is_asked_first(chromium: Any, small: PageServer) -> None:
    open_page(chromium, small)
    until(lambda: "tokens were reused" in text_of(chromium, "card-saved"))

    assert "to the first token" in text_of(chromium, "card-last")
    assert "computed" in text_of(chromium, "card-last")
    assert "Counted since" in text_of(chromium, "card-saved")
    assert "when the server was started" in text_of(chromium, "card-saved")
    assert "All right" in text_of(chromium, "card-disk")
    assert HOSTILE in text_of(chromium, "card-most")
    assert "that go on from it" in text_of(chromium, "card-most")


# ---- entries -----------------------------------------------------------------------------------


def test_labels_are_texts_and_nothing_else(chromium: Any, small: PageServer) -> None:
    open_page(chromium, small)

    names = [one.text for one in chromium.find_elements(By.CSS_SELECTOR, "#entries .title")]

    assert HOSTILE in names
    assert chromium.title == "Prompt cache"
    assert chromium.find_elements(By.CSS_SELECTOR, "main img") == []
    assert complaints(chromium) == []


def test_tree_opens_by_click_and_by_arrow_keys(chromium: Any, small: PageServer) -> None:
    open_page(chromium, small)
    assert rows(chromium) == 2

    labelled(chromium, "Open").click()
    opened = until(lambda: rows(chromium) if rows(chromium) > 2 else 0)
    focused = chromium.switch_to.active_element
    assert focused.get_attribute("aria-expanded") == "true"
    focused.send_keys(Keys.ARROW_DOWN)
    chromium.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    until(lambda: rows(chromium) == opened + 2)
    chromium.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    until(lambda: rows(chromium) == opened)
    chromium.switch_to.active_element.send_keys(Keys.ARROW_UP)
    chromium.switch_to.active_element.send_keys(Keys.ARROW_LEFT)

    until(lambda: rows(chromium) == 2)
    assert complaints(chromium) == []


def test_focus_is_visible(chromium: Any, small: PageServer) -> None:
    open_page(chromium, small)

    chromium.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)

    style = "return getComputedStyle(document.activeElement).outlineStyle"
    assert chromium.switch_to.active_element.get_attribute("id") == "pause"
    assert chromium.execute_script(style) == "solid"


def test_details_have_the_last_client_and_are_closed_with_escape(
    chromium: Any, small: PageServer
) -> None:
    open_page(chromium, small)

    labelled(chromium, "system: ").click()
    dialog = chromium.find_element(By.ID, "dialog")
    until(dialog.is_displayed)

    assert "org/A-Model-4bit" in dialog.text
    assert "Show text" in dialog.text
    assert "client-" in dialog.text
    assert axe.violations(chromium) == []
    dialog.send_keys(Keys.ESCAPE)
    until(lambda: not dialog.is_displayed())
    focused = chromium.switch_to.active_element
    assert focused.get_attribute("aria-label").startswith("system: ")


def test_pin_label_and_lifetime_are_set(chromium: Any, tmp_path: Path) -> None:
    with serving(tmp_path, list(conversations(MODEL, 1))) as server:
        open_page(chromium, server)

        labelled(chromium, "Pin").click()
        unpin = until(lambda: labelled(chromium, "Unpin"))
        assert server.store.entries()[0].pinned
        unpin.click()
        until(lambda: labelled(chromium, "Pin"))
        assert not server.store.entries()[0].pinned

        labelled(chromium, "system: ").click()
        for key, field, value in (("label", "label", "mine"), ("ttl", "ttl", "7 days")):
            choose = f'#dialog [data-key="{key}"]'
            until(partial(chromium.find_element, By.CSS_SELECTOR, choose)).click()
            element = until(partial(chromium.find_element, By.ID, field))
            assert axe.violations(chromium) == []
            element.send_keys(value, Keys.TAB)
            chromium.find_element(By.CSS_SELECTOR, "#dialog [type=submit]").click()
            until(lambda: chromium.find_element(By.CSS_SELECTOR, '#dialog [data-key="evict"]'))
        entry = server.store.entries()[0]

        assert entry.label == "mine"
        assert entry.expires is not None
        assert 6 * 86400 < entry.expires - server.store.clock() <= 7 * 86400
        assert complaints(chromium) == []


def test_evict_asks_first_and_takes_what_the_command_would(chromium: Any, tmp_path: Path) -> None:
    with serving(tmp_path, list(conversations(MODEL, 7, turns=3))) as server:
        root = next(one for one in server.store.entries() if one.parent is None)
        leaf = max(server.store.entries(), key=lambda one: one.num_tokens)
        server.store.pin(leaf.id)
        server.store.pin(root.id)
        open_page(chromium, server)
        dialog = chromium.find_element(By.ID, "dialog")

        labelled(chromium, "Evict").click()
        until(dialog.is_displayed)
        assert f"--store {tmp_path / 'store'} evict {root.id[:3]}" in dialog.text
        assert "This entry is pinned, and goes because it is named." in dialog.text
        assert "goes because it is named; 1 other pinned entry stays." in dialog.text
        assert axe.violations(chromium) == []
        assert chromium.switch_to.active_element.text == "Cancel"
        chromium.switch_to.active_element.send_keys(Keys.ENTER)
        until(lambda: not dialog.is_displayed())
        assert len(server.store.entries()) == 7

        labelled(chromium, "Evict").click()
        until(dialog.is_displayed)
        chromium.find_element(By.ID, "really").click()
        until(lambda: len(server.store.entries()) == 6)
        until(lambda: "evicted" in text_of(chromium, "done"))
        until(lambda: root.id not in {one.id for one in server.store.entries()})
        until(lambda: not dialog.is_displayed())
        until(lambda: "6 entries" in text_of(chromium, "count"))
        labelled(chromium, "Evict").click()
        until(dialog.is_displayed)
        chromium.find_element(By.ID, "really-below").click()
        until(lambda: len(server.store.entries()) == 1)

        assert [one.id for one in server.store.entries()] == [leaf.id]
        assert complaints(chromium) == []


def test_the_command_that_evicts_names_all_that_goes(chromium: Any, tmp_path: Path) -> None:
    with serving(tmp_path, list(conversations(MODEL, 20, systems=1, turns=1))) as server:
        root = next(one for one in server.store.entries() if one.parent is None)
        open_page(chromium, server)

        chromium.execute_async_script(f"evict('{root.id}', true).then(arguments[0])")
        commands = chromium.find_elements(By.CSS_SELECTOR, "#dialog .command code")

        named = [shlex.split(one.text) for one in commands][-1]
        assert named[:4] == ["persist-cache", "--store", str(tmp_path / "store"), "evict"]
        assert {one.id for one in server.store.entries()} == {
            id for short in named[4:] for id in find_ids(server.store, short)
        }


def test_an_entry_is_exported_as_a_bundle(chromium: Any, tmp_path: Path) -> None:
    with serving(tmp_path, []) as server:
        server.store.put(MODEL, [1, 2, 3], FakeSource([1, 2, 3]))
        folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
        chromium.execute_cdp_cmd("Browser.setDownloadBehavior", folder)
        open_page(chromium, server)

        labelled(chromium, "assistant: ").click()
        until(lambda: chromium.find_element(By.CSS_SELECTOR, '[data-key="export"]')).click()
        (bundle,) = until(lambda: list(tmp_path.glob("persist-cache-*.tar")))

        assert until(lambda: bundle.stat().st_size) > 1000
        assert complaints(chromium) == []


# ---- many --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    prompts = relabelled(list(conversations(MODEL, 5000, systems=150, turns=2)), "the one")
    with serving(tmp_path_factory.mktemp("large"), prompts) as server:
        yield server


def test_of_five_thousand_entries_only_those_in_sight_are_there(
    chromium: Any, large: PageServer
) -> None:
    open_page(chromium, large)

    assert axe.violations(chromium) == []
    assert len(chromium.find_elements(By.CSS_SELECTOR, "#entries li")) < 60
    chromium.execute_script("document.querySelector('#entries').scrollTop = 1e6")
    until(lambda: rows(chromium) == 150)
    chromium.find_element(By.ID, "as-list").click()
    until(lambda: rows(chromium) == 5000)
    chromium.execute_script("document.querySelector('#entries').scrollTop = 1e6")
    until(
        lambda: (
            "Pin" in chromium.find_element(By.CSS_SELECTOR, '#entries [aria-posinset="5000"]').text
        )
    )
    assert len(chromium.find_elements(By.CSS_SELECTOR, "#entries li")) < 60
    chromium.find_element(By.ID, "f-label").send_keys("the o")
    until(lambda: rows(chromium) == 1)

    assert complaints(chromium) == []


# ---- a remote ----------------------------------------------------------------------------------


def remote(breaker: str = "closed", **changes: Any) -> RemoteStatus:
    counters = {
        "hits": 3,
        "misses:not_found": 2,
        "misses:too_slow": 1,
        "saved_ms": 42_000,
        "received_bytes": 5 << 20,
        "sent_bytes": 3 << 20,
        "published": 2,
    }
    status = RemoteStatus(
        url="s3://team/prompts",
        breaker=breaker,
        retry_in_s=0.0,
        last_error="",
        bytes_per_s=1e8,
        publishes=True,
        queued=1,
        counters=counters,
    )
    return msgspec.structs.replace(status, **changes)


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    """A page of a server that has a remote."""
    with serving(tmp_path_factory.mktemp("shared"), list(conversations(MODEL, 3))) as server:
        yield server


def test_without_a_remote_nothing_is_said_of_one(chromium: Any, small: PageServer) -> None:
    open_page(chromium, small)

    assert not chromium.find_element(By.ID, "card-remote").is_displayed()


def test_the_remote_says_what_it_was_good_for(chromium: Any, sharing: PageServer) -> None:
    sharing.shares(remote())
    open_page(chromium, sharing)

    said = until(lambda: text_of(chromium, "card-remote"))

    assert "In use" in said
    assert "42 s saved" in said
    assert "s3://team/prompts" in said
    assert "3 hits, 3 misses (2 not found, 1 too slow)" in said
    assert "5.0 MiB received, 3.0 MiB sent" in said
    assert "2 prompts published, 1 waiting" in said
    assert complaints(chromium) == []


@pytest.mark.parametrize(
    ("state", "trouble", "words"),
    [
        (
            remote("open", retry_in_s=60.0, last_error=f"It timed out {HOSTILE}", publishes=False),
            "",
            ("Left alone, and tried again in 1.0 min", "It timed out <img", "Only read"),
        ),
        (remote("half-open", last_error="403"), "", ("Being tried", "Last error: 403")),
        (None, "There is no secret.", ("Not used", "Last error: There is no secret.")),
    ],
)
def test_a_remote_that_fails_says_so(
    chromium: Any,
    sharing: PageServer,
    state: RemoteStatus | None,
    trouble: str,
    words: tuple[str, ...],
) -> None:
    sharing.shares(state, trouble)
    open_page(chromium, sharing)

    said = until(lambda: text_of(chromium, "card-remote"))

    for one in words:
        assert one in said
    assert complaints(chromium) == []


@pytest.mark.parametrize(
    ("width", "scheme"), [(380, "light"), (768, "dark"), (1280, "dark"), (1900, "light")]
)
def test_the_remote_has_its_place_in_every_width_and_theme(
    chromium: Any, sharing: PageServer, width: int, scheme: str
) -> None:
    sharing.shares(remote("open", retry_in_s=60.0, last_error="It does not answer. " * 5))
    browser.theme(chromium, scheme)
    size(chromium, width, 900)
    try:
        open_page(chromium, sharing)
        until(lambda: text_of(chromium, "card-remote"))
        wide = chromium.execute_script("return document.documentElement.scrollWidth")
        apart = chromium.execute_script(
            "return [...document.querySelectorAll('.cards > .card')]"
            ".map(one => one.getBoundingClientRect()).every((one, place, all) => all.every("
            "(other, at) => at === place || one.right <= other.left || other.right <= one.left"
            " || one.bottom <= other.top || other.bottom <= one.top))"
        )
        violations = axe.violations(chromium)
    finally:
        size(chromium, 1280, 900)
        browser.theme(chromium, "light")

    assert wide <= width
    assert apart
    assert violations == []


# ---- manners -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [360, 380, 768, 1280, 3840])
def test_nothing_is_wider_than_the_screen_and_nothing_lies_on_a_button(
    chromium: Any, small: PageServer, width: int
) -> None:
    size(chromium, width, 900)
    try:
        open_page(chromium, small)
        labelled(chromium, "Open").click()
        until(lambda: rows(chromium) > 2)
        wide = chromium.execute_script("return document.documentElement.scrollWidth")
        covered = chromium.execute_script(COVERED)
    finally:
        size(chromium, 1280, 900)

    assert wide <= width
    assert covered == []


COVERED = """
document.querySelector('#entries').scrollIntoView();
const buttons = document.querySelectorAll('#entries button, header button, .tools button');
return [...buttons].filter(one => {
  const box = one.getBoundingClientRect(), frame = one.closest('.rows')?.getBoundingClientRect();
  const x = box.x + box.width / 2, y = box.y + box.height / 2;
  if (getComputedStyle(one).visibility === 'hidden' || y < 0 || y > innerHeight) return false;
  if (frame && (y < frame.top || y > frame.bottom)) return false;
  const there = document.elementFromPoint(x, y);
  return !(there && (one === there || one.contains(there)));
}).map(one => one.getAttribute('aria-label') || one.textContent);
"""


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_colours_follow_the_system_and_are_legible(
    chromium: Any, small: PageServer, scheme: str, dark: bool
) -> None:
    browser.theme(chromium, scheme)
    open_page(chromium, small)
    colours = """
        const style = getComputedStyle(document.documentElement);
        return ["--panel", "--ink", "--soft", "--link", "--good", "--bad"]
            .map(name => style.getPropertyValue(name).trim());
    """

    panel, *inks = map(luminance, chromium.execute_script(colours))

    assert (panel < 0.2) is dark
    for ink in inks:
        lighter, darker = max(panel, ink), min(panel, ink)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5
    assert axe.violations(chromium) == []


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG has it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_nothing_is_asked_of_another_host(chromium: Any, small: PageServer) -> None:
    open_page(chromium, small)

    asked = chromium.execute_script(
        "return performance.getEntriesByType('resource').map(one => one.name)"
    )

    assert asked
    assert all(one.startswith(small.url + "/") for one in asked)


def test_an_update_moves_nothing(chromium: Any, small: PageServer) -> None:
    open_page(chromium, small)
    watch = """
        window.moved = [];
        const told = one => one.sources.map(at => at.node && at.node.outerHTML.slice(0, 80));
        const seen = list => window.moved.push(...list.getEntries().map(told));
        new PerformanceObserver(seen).observe({type: 'layout-shift'});
    """
    chromium.execute_script(watch)

    many(small.ring, 3, seed=1)
    chromium.execute_async_script(
        "tick(true).then(() => requestAnimationFrame(() => requestAnimationFrame(arguments[0])))"
    )

    assert chromium.execute_script("return state.requests.length") > 30
    assert chromium.execute_script("return window.moved") == []


def test_the_page_is_one_small_file_that_names_no_other() -> None:
    page = page_response().body.decode()

    assert len(page.encode()) < 200 << 10
    assert re.findall(r"(?:src|href)=|@import|url\(", page) == []
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}


# ---- hostile texts -----------------------------------------------------------------------------

NASTY = (
    HOSTILE,
    "\x1b[31m\x07 \u202egnirts\u202c \u200b zero",
    "שלום <script>document.title=2</script>",
    "javascript:alert(1)//" + "x" * 1_000_000,
)


def test_whatever_clients_models_groups_and_prompts_say_is_shown_as_text(
    chromium: Any, tmp_path: Path
) -> None:
    model = Fingerprint.from_fields({"weights": "w"}, {"name": HOSTILE})
    with serving(tmp_path, [], decode=lambda key, tokens: "".join(map(chr, tokens))) as server:
        for text in NASTY:
            tokens = [ord(one) for one in text[:500]]
            server.store.put(model, tokens, FakeSource(tokens), label=text[:100])
            for end in ("1", "2"):
                said = chat(f"{text} Today's date is 2026-03-0{end}. {text}", model=HOSTILE)
                spelled = [ord(one) for one in said["messages"][0]["content"][:3000]]
                body = json.dumps(said).encode()
                remember(server.ring, spelled, body=body, client=text[:200], reason=text[:99])
        open_page(chromium, server)
        for id in chromium.execute_script("return state.requests.map(one => one.id)"):
            chromium.execute_async_script(f"requestDetails('{id}').then(arguments[0])")
        for entry in server.store.entries():
            chromium.execute_async_script(f"details('{entry.id}').then(arguments[0])")
        assert says(chromium, HOSTILE)
        chromium.find_element(By.ID, "dialog").send_keys(Keys.ESCAPE)
        wide = chromium.execute_script("return document.documentElement.scrollWidth")

        assert chromium.title == "Prompt cache"
        assert chromium.find_elements(By.CSS_SELECTOR, "main img, dialog img, main script") == []
        assert wide <= 1280
        assert complaints(chromium) == []


def test_the_policy_lets_no_other_script_in_and_asks_nobody_else(
    chromium: Any, small: PageServer
) -> None:
    open_page(chromium, small)

    chromium.execute_script("""
        window.refused = [];
        addEventListener("securitypolicyviolation", one => refused.push(one.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "document.title = 3";
        const image = new Image();
        image.src = "http://127.0.0.1:9/a.png";
        const link = document.createElement("a");
        document.body.append(script, image);
        document.body.setAttribute("onclick", "document.title = 4");
        document.body.click();
        fetch("http://127.0.0.1:9/").catch(() => 0);
    """)
    refused = until(lambda: chromium.execute_script("return refused.length >= 4 && refused"))

    assert set(refused) == {"script-src-elem", "script-src-attr", "img-src", "connect-src"}
    assert chromium.title == "Prompt cache"
    complaints(chromium)


# ---- how long it is busy -----------------------------------------------------------------------


@pytest.mark.long  # 2,000 requests are remembered one after the other, which takes half a minute
def test_no_task_is_long_with_many_entries_and_requests(large: PageServer) -> None:
    many(large.ring, 2000)
    with browser.started(traced=True) as driver:
        open_page(driver, large)
        until(lambda: driver.execute_script("return state.requests.length") == 2000)
        for place in range(20):
            for id, step in (("strip", 1200), ("requests", 3000), ("entries", 400)):
                scroll = f"document.querySelector('#{id}').scroll({place * step}, {place * step})"
                driver.execute_script(scroll)
                driver.execute_async_script("requestAnimationFrame(arguments[0])")
        driver.find_element(By.ID, "as-list").click()
        until(lambda: rows(driver) == 5000)
        driver.execute_async_script("tick(true).then(arguments[0])")
        bars = len(driver.find_elements(By.CSS_SELECTOR, "#bars button"))
        spent = browser.tasks(driver)

    print(f"{len(spent)} tasks, the longest: {sorted(spent)[-5:]} ms")
    assert len(spent) > 100
    assert bars < 500
    assert max(spent) < 50
