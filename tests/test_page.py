"""The page at `/cache`, in headless Chromium: what it shows, its buttons, its keys, its manners."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.server.admin import Admin
from persist_cache.server.http import Front
from persist_cache.server.listening import NamelessServer
from persist_cache.server.validation import RefusedError
from persist_cache.store.store import Store
from tests import waiting
from tests.bulk_store import Prompt, conversations, fill
from tests.fakes import FakeSource
from tests.server_process import ServerProcess, running
from tests.tiny_models import build_model_dir

selenium = pytest.importorskip("selenium", reason="the page's tests need selenium")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="CHROMIUM IS MISSING: the page was not tested (apt install chromium chromium-driver)",
)

HOSTILE = '<img src=x onerror="document.title=1"><b>&amp;'
TOKEN = "t0ken-of_this-test"
MODEL = Fingerprint.from_fields({"weights": "w0"}, {"name": "org/A-Model-4bit"})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    size(driver, 1280, 900)
    yield driver
    driver.quit()


def size(driver: Any, width: int, height: int) -> None:
    """Give the page a viewport; windows themselves have a least width."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


class Nothing(BaseHTTPRequestHandler):
    """Stands for upstream's handler, and has none of its answers."""

    def do_GET(self) -> None:
        raise RefusedError(404, "There is nothing here.")

    def do_OPTIONS(self) -> None:
        raise RefusedError(404, "There is nothing here.")


class Pages(Front, Nothing):
    """The front alone, without mlx_lm.server behind it, so that it starts at once."""

    def __init__(self, generator: Any, *args: Any) -> None:
        self.response_generator = generator
        super().__init__(*args)


class PageServer:
    """A page over a store in this process.

    Attributes:
        url: Where it answers.
        store: What it shows, if there is one.
    """

    def __init__(self, store: Store | None, token: str = TOKEN) -> None:
        self.store: Any = store
        cache = PromptCache(store=store)
        generator = SimpleNamespace(admin=Admin(cache, token=token))
        self._http = NamelessServer(("127.0.0.1", 0), partial(Pages, generator))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextlib.contextmanager
def serving(folder: Path, prompts: list[Prompt], token: str = TOKEN) -> Iterator[PageServer]:
    """A page over a store with `prompts`."""
    with Store.open(folder / "store", max_bytes=1 << 30, min_free_bytes=0) as store:
        fill(store, iter(prompts))
        server = PageServer(store, token)
        yield server
        server.stop()


def relabelled(prompts: list[Prompt], label: str) -> list[Prompt]:
    """The same prompts, the first of them with a label."""
    made: dict[int, Prompt] = {}
    for place, prompt in enumerate(prompts):
        before = None if prompt.before is None else made[id(prompt.before)]
        made[id(prompt)] = replace(prompt, before=before, label=label if place == 0 else "")
    return list(made.values())


def until(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    def found() -> Any:
        with contextlib.suppress(selenium.common.exceptions.WebDriverException):
            return condition()
        return None

    return waiting.until(found, "the page did not get there", timeout_s)


def open_page(driver: Any, server: PageServer) -> None:
    # The page before may have lost its server, and said so.
    driver.get("about:blank")
    complaints(driver)
    driver.get(f"{server.url}/cache#token={TOKEN}")
    until(lambda: "updated" in driver.find_element(By.ID, "state").text)


def labelled(driver: Any, label: str) -> Any:
    """The first button whose accessible name begins so."""
    return driver.find_element(By.CSS_SELECTOR, f'button[aria-label^="{label}"]')


def rows(driver: Any) -> int:
    return len(driver.find_elements(By.CSS_SELECTOR, "ul.tree .row"))


def says(driver: Any, text: str) -> bool:
    """Whether the dialog has this text."""
    return text in driver.find_element(By.ID, "dialog").text


def complaints(driver: Any) -> list[str]:
    """What the browser logged: errors of the script, and what the policy forbade."""
    return [one["message"] for one in driver.get_log("browser") if "favicon" not in one["message"]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    """Two system prompts with nine conversations of two entries each."""
    prompts = list(conversations(MODEL, 20, systems=2, turns=1))
    with serving(tmp_path_factory.mktemp("small"), relabelled(prompts, HOSTILE)) as server:
        yield server


def test_empty_store_says_so(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path, []) as server:
        open_page(browser, server)

        assert "The store is empty" in browser.find_element(By.ID, "entries").text
        assert "is on" in browser.find_element(By.ID, "h-disk").text
        assert complaints(browser) == []


def test_disk_that_is_off_says_why(browser: Any) -> None:
    server = PageServer(None)
    open_page(browser, server)

    assert "is off" in browser.find_element(By.ID, "h-disk").text
    assert "Nothing is kept on disk" in browser.find_element(By.ID, "entries").text
    assert complaints(browser) == []
    server.stop()


def test_what_an_upgrade_left_behind_is_shown_with_what_removes_it(
    browser: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "it's <b>here"
    folder.mkdir()
    with serving(folder, []) as server:
        for number, (mlx_lm, layout) in enumerate((("0.30.0", 1), ("0.30.0", 1), ("", 99))):
            model = Fingerprint.from_fields({"mlx_lm": mlx_lm, "layout": layout, "n": number}, {})
            server.store.put(model, [1, 2], FakeSource([1, 2]), pinned=number == 0)
        open_page(browser, server)
        left = until(lambda: browser.find_element(By.ID, "left").text)
        size(browser, 360, 700)
        width = browser.execute_script("return document.documentElement.scrollWidth")
        size(browser, 1280, 900)
        found = {one["reason"] for one in server_left_behind(server)}
        lines = left.splitlines()

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
        assert complaints(browser) == []

        for entry in server.store.entries():
            server.store.evict([entry.id])
        until(lambda: not browser.find_element(By.ID, "left").text)


def server_left_behind(server: PageServer) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    said = requests.get(f"{server.url}/v1/cache/stats", headers=headers, timeout=10).json()
    found: list[dict[str, Any]] = said["store"]["left_behind"]
    return found


def test_labels_are_texts_and_nothing_else(browser: Any, small: PageServer) -> None:
    open_page(browser, small)

    names = [one.text for one in browser.find_elements(By.CSS_SELECTOR, "ul.tree .name .cut")]

    assert HOSTILE in names
    assert browser.title == "Prompt cache"
    assert browser.find_elements(By.CSS_SELECTOR, "#entries img, #entries b") == []
    assert complaints(browser) == []


def test_tree_opens_by_click_and_by_arrow_keys(browser: Any, small: PageServer) -> None:
    open_page(browser, small)
    assert rows(browser) == 2

    labelled(browser, "Open").click()
    opened = until(lambda: rows(browser) if rows(browser) > 2 else 0)
    focused = browser.switch_to.active_element
    assert focused.get_attribute("aria-expanded") == "true"
    focused.send_keys(Keys.ARROW_DOWN)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    until(lambda: rows(browser) == opened + 2)
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    until(lambda: rows(browser) == opened)
    browser.switch_to.active_element.send_keys(Keys.ARROW_UP)
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)

    until(lambda: rows(browser) == 2)
    assert complaints(browser) == []


def test_focus_is_visible(browser: Any, small: PageServer) -> None:
    open_page(browser, small)

    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)

    style = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.switch_to.active_element.get_attribute("id") == "pause"
    assert browser.execute_script(style) == "solid"


def test_details_are_shown_and_closed_with_escape(browser: Any, small: PageServer) -> None:
    open_page(browser, small)

    labelled(browser, "Details of").click()
    dialog = browser.find_element(By.ID, "dialog")
    until(dialog.is_displayed)

    assert "org/A-Model-4bit" in dialog.text
    assert "Show text" in dialog.text
    dialog.send_keys(Keys.ESCAPE)
    until(lambda: not dialog.is_displayed())


def test_pin_and_unpin_by_click(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path, list(conversations(MODEL, 1))) as server:
        open_page(browser, server)

        labelled(browser, "Pin").click()
        unpin = until(lambda: labelled(browser, "Unpin"))
        assert server.store.entries()[0].pinned
        unpin.click()
        until(lambda: labelled(browser, "Pin"))

        assert not server.store.entries()[0].pinned
        assert complaints(browser) == []


def test_evict_asks_first_and_then_evicts(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path, list(conversations(MODEL, 7, turns=3))) as server:
        open_page(browser, server)
        dialog = browser.find_element(By.ID, "dialog")

        labelled(browser, "Evict").click()
        until(dialog.is_displayed)
        assert "Evict 7 entries?" in dialog.text
        assert browser.switch_to.active_element.text == "Cancel"
        browser.switch_to.active_element.send_keys(Keys.ENTER)
        until(lambda: not dialog.is_displayed())
        assert len(server.store.entries()) == 7

        labelled(browser, "Evict").click()
        until(dialog.is_displayed)
        browser.find_element(By.ID, "really").click()
        until(lambda: "The store is empty" in browser.find_element(By.ID, "entries").text)

        assert server.store.entries() == []
        assert complaints(browser) == []


def test_five_thousand_entries_are_paged_and_quick(browser: Any, tmp_path: Path) -> None:
    prompts = list(conversations(MODEL, 5000, systems=150, turns=2))
    with serving(tmp_path, relabelled(prompts, "the one")) as server:
        started = time.monotonic()
        open_page(browser, server)
        loaded_s = time.monotonic() - started

        assert rows(browser) == 100
        browser.find_element(By.CSS_SELECTOR, ".more button").click()
        until(lambda: rows(browser) == 150)
        browser.find_element(By.ID, "as-list").click()
        pager = until(lambda: browser.find_element(By.CSS_SELECTOR, ".pager"))
        assert "1–100 of 5,000" in pager.text
        browser.find_element(By.CSS_SELECTOR, '[data-key="next"]').click()
        until(lambda: "101–200" in browser.find_element(By.CSS_SELECTOR, ".pager").text)
        browser.find_element(By.ID, "f-label").send_keys("the o")
        until(lambda: "1–1 of 1" in browser.find_element(By.CSS_SELECTOR, ".pager").text)

        assert loaded_s < 8
        assert complaints(browser) == []


def test_narrow_screens_do_not_scroll_sideways(browser: Any, small: PageServer) -> None:
    size(browser, 390, 844)
    try:
        open_page(browser, small)
        labelled(browser, "Open").click()
        until(lambda: rows(browser) > 2)
        tree = browser.execute_script("return document.documentElement.scrollWidth")
        browser.find_element(By.ID, "as-list").click()
        until(lambda: browser.find_element(By.CSS_SELECTOR, ".pager"))
        listed = browser.execute_script("return document.documentElement.scrollWidth")
    finally:
        size(browser, 1280, 900)

    assert tree == listed == 390


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_colours_follow_the_system_and_are_legible(
    browser: Any, small: PageServer, scheme: str, dark: bool
) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    open_page(browser, small)
    colours = """
        const style = getComputedStyle(document.documentElement);
        return ["--panel", "--ink", "--soft", "--link", "--good", "--bad"]
            .map(name => style.getPropertyValue(name).trim());
    """

    panel, *inks = map(luminance, browser.execute_script(colours))

    assert (panel < 0.2) is dark
    for ink in inks:
        lighter, darker = max(panel, ink), min(panel, ink)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG has it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_polling_sees_changes_and_rests_when_paused_or_hidden(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path, list(conversations(MODEL, 1))) as server:
        open_page(browser, server)
        (entry,) = server.store.entries()

        server.store.pin(entry.id)
        until(lambda: labelled(browser, "Unpin"))
        browser.find_element(By.ID, "pause").click()
        server.store.pin(entry.id, False)
        browser.execute_async_script("tick().then(arguments[0])")
        assert labelled(browser, "Unpin")
        browser.find_element(By.ID, "pause").click()
        until(lambda: labelled(browser, "Pin"))

        hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
        changed = "document.dispatchEvent(new Event('visibilitychange'));"
        browser.execute_script(hide % "true" + changed)
        server.store.pin(entry.id)
        browser.execute_async_script("tick().then(arguments[0])")
        assert labelled(browser, "Pin")
        browser.execute_script(hide % "false" + changed)
        until(lambda: labelled(browser, "Unpin"))

        server.stop()
        browser.execute_async_script("tick(true).then(arguments[0])")
        assert "cannot be reached" in browser.find_element(By.ID, "alert").text


def test_token_is_asked_for_and_kept_for_the_tab(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path, list(conversations(MODEL, 1)), token="s3cret") as server:
        browser.get(f"{server.url}/cache")
        for given, said in (("wrong", "needs the server's"), ("s3cret", "not right")):
            until(partial(says, browser, said))
            browser.find_element(By.ID, "token").send_keys(given, Keys.ENTER)
        until(lambda: labelled(browser, "Pin"))

        browser.get("about:blank")
        browser.get(f"{server.url}/cache")
        until(lambda: labelled(browser, "Pin"))

        assert rows(browser) == 1
        assert not browser.find_element(By.ID, "dialog").is_displayed()


def test_nothing_is_asked_of_another_host(browser: Any, small: PageServer) -> None:
    open_page(browser, small)

    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map(one => one.name)"
    )

    assert asked
    assert all(one.startswith(small.url + "/") for one in asked)


# ---- a real server -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("real")
    model = build_model_dir(folder / "model")
    with running(model, folder / "store", folder, min_free_bytes=0) as started:
        assert started.chat(("system", "You answer. " * 20), ("user", "Hi")).status_code == 200
        # The conversation with its reply is handed over after the client has read the answer.
        until(lambda: len(started.get("/v1/cache/entries")["entries"]) == 3)
        yield started


def test_the_printed_link_is_all_it_takes(browser: Any, real: ServerProcess) -> None:
    link = re.search(r"^Page: (\S+)$", real.log.read_text(), re.MULTILINE)
    assert link is not None
    browser.get("about:blank")
    complaints(browser)

    browser.get(link[1])
    until(lambda: labelled(browser, "Pin"))
    labelled(browser, "Pin").click()
    until(lambda: labelled(browser, "Unpin"))

    assert any(entry["pinned"] for entry in real.get("/v1/cache/entries")["entries"])
    assert browser.current_url == f"{real.url}/cache"
    assert real.token not in browser.page_source
    assert browser.execute_script("return JSON.stringify(Object.entries(localStorage))") == "[]"
    browser.refresh()
    until(lambda: labelled(browser, "Unpin"))
    assert complaints(browser) == []
    # Another tab knows nothing of it.
    browser.switch_to.new_window("tab")
    browser.get(f"{real.url}/cache")
    until(partial(says, browser, "needs the server's token"))
    # … until the link is pasted there.
    browser.get(link[1])
    until(lambda: labelled(browser, "Unpin"))
    assert browser.current_url == f"{real.url}/cache"
    browser.close()
    browser.switch_to.window(browser.window_handles[0])


ATTACKS = """
const [url, entry, done] = arguments;
const chat = JSON.stringify({messages: [{role: "user", content: "Hi"}], max_tokens: 2});
const asked = [];
const ask = (path, options) => asked.push(fetch(url + path, options).then(
  async answer => [path, answer.type, answer.status, await answer.text()],
  error => [path, "failed", 0, ""]));
for (const mode of ["cors", "no-cors"]) {
  for (const type of ["application/json", "text/plain"])
    for (const path of ["/v1/chat/completions", "/chat/completions", "/v1/cache/explain"])
      ask(path, {method: "POST", mode, body: chat, headers: {"Content-Type": type}});
  for (const path of ["/v1/models", "/health", "/metrics", "/cache", "/v1/cache/stats",
                      "/v1/cache/entries", "/v1/cache/entries/" + entry])
    ask(path, {mode});
  ask("/v1/cache/flush", {method: "POST", mode});
  ask("/v1/chat/completions", {method: "POST", mode, body: '{"model": "no/such",' + chat.slice(1)});
}
ask("/v1/cache/entries/" + entry, {method: "DELETE"});
ask("/v1/cache/entries/" + entry + "/pin", {method: "PUT"});
const frame = document.createElement("iframe");
frame.name = "target";
document.body.append(frame);
const form = document.createElement("form");
form.method = "post"; form.enctype = "text/plain"; form.target = "target";
form.action = url + "/v1/chat/completions";
const field = document.createElement("input");
field.name = chat.slice(0, -1) + ',"x":"'; field.value = '"}';
form.append(field); document.body.append(form);
asked.push(new Promise(resolve => {
  frame.addEventListener("load", () => resolve(["form", "opaque", 0, ""]));
  form.submit();
}));
Promise.all(asked).then(done);
"""


def test_a_page_of_another_origin_can_neither_read_nor_change_nor_compute(
    browser: Any, real: ServerProcess
) -> None:
    class Foreign(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title><body>")

    def state() -> Any:
        stats = real.get("/v1/cache/stats")
        found = real.get("/v1/cache/entries")["entries"]
        return stats["recent"], stats["model"], [(one["id"], one["pinned"]) for one in found]

    before = state()
    entry = before[2][0][0]
    elsewhere = NamelessServer(("127.0.0.1", 0), Foreign)
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    # Chromium takes every name below `localhost` for this machine, but for another site.
    browser.get(f"http://evil.localhost:{elsewhere.server_port}/")
    assert browser.title == "elsewhere"

    answers = browser.execute_async_script(ATTACKS, real.url, entry)
    elsewhere.shutdown()
    elsewhere.server_close()

    assert len(answers) == 2 * (6 + 7 + 2) + 3
    for path, kind, status, text in answers:
        assert kind in ("failed", "opaque"), (path, kind)
        assert (status, text) == (0, ""), path
    assert state() == before
    complaints(browser)
