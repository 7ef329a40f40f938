"""The page of a real server: its link, its texts, what it has computed; pages of other sites."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from persist_cache.server.listening import NamelessServer
from tests import browser
from tests.browser import complaints, needs_chromium, until
from tests.page_traffic import QUESTIONS, drive
from tests.server_process import ServerProcess, running
from tests.tiny_models import build_model_dir

selenium = pytest.importorskip("selenium", reason="the page's tests need selenium")

from selenium.webdriver.common.by import By  # noqa: E402

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.started() as driver:
        yield driver


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("real")
    model = build_model_dir(folder / "model")
    with running(model, folder / "store", folder, min_free_bytes=0) as started:
        drive(started, number=6)
        assert started.request("POST", "/v1/cache/flush").status_code == 200
        yield started


def labelled(driver: Any, label: str) -> Any:
    """The first button whose accessible name begins so."""
    return driver.find_element(By.CSS_SELECTOR, f'#entries button[aria-label^="{label}"]')


def says(driver: Any, text: str) -> bool:
    """Whether the dialog has this text."""
    return text in driver.find_element(By.ID, "dialog").text


def test_the_printed_link_is_all_it_takes(chromium: Any, real: ServerProcess) -> None:
    link = re.search(r"^Page: (\S+)$", real.log.read_text(), re.MULTILINE)
    assert link is not None
    chromium.get("about:blank")
    complaints(chromium)

    chromium.get(link[1])
    until(lambda: labelled(chromium, "Pin"))
    labelled(chromium, "Pin").click()
    until(lambda: labelled(chromium, "Unpin"))

    assert any(entry["pinned"] for entry in real.get("/v1/cache/entries")["entries"])
    assert chromium.current_url == f"{real.url}/cache"
    assert real.token not in chromium.page_source
    assert chromium.execute_script("return JSON.stringify(Object.entries(localStorage))") == "[]"
    chromium.refresh()
    until(lambda: labelled(chromium, "Unpin"))
    assert complaints(chromium) == []
    # Another tab knows nothing of it.
    chromium.switch_to.new_window("tab")
    chromium.get(f"{real.url}/cache")
    until(partial(says, chromium, "needs the server's token"))
    # … until the link is pasted there.
    chromium.get(link[1])
    until(lambda: labelled(chromium, "Unpin"))
    assert chromium.current_url == f"{real.url}/cache"
    chromium.close()
    chromium.switch_to.window(chromium.window_handles[0])


def test_prompts_are_told_apart_by_their_texts(chromium: Any, real: ServerProcess) -> None:
    chromium.get(f"{real.url}/cache#token={real.token}")
    until(lambda: labelled(chromium, "Open You review code."))

    labelled(chromium, "Open You are a careful assistant.").click()
    opened = until(
        lambda: [
            one.text
            for one in chromium.find_elements(By.CSS_SELECTOR, "#entries .title")
            if any(one.text == question for question in QUESTIONS)
        ]
    )

    assert opened
    clients = {one.text for one in chromium.find_elements(By.CSS_SELECTOR, "#entries .client")}
    assert clients & {"claude-cli/2.1 (external)", "codex_cli/0.40", "opencode/0.9.1"}


def test_a_recent_request_is_kept_ready(chromium: Any, real: ServerProcess) -> None:
    chromium.get(f"{real.url}/cache#token={real.token}")
    until(lambda: labelled(chromium, "Open You review code."))

    chromium.execute_async_script("requestDetails(state.requests[0].id).then(arguments[0])")
    chromium.find_element(By.CSS_SELECTOR, '#dialog [data-key="warm"]').click()
    until(lambda: chromium.find_element(By.ID, "warm-label")).send_keys("kept")
    chromium.find_element(By.ID, "part").send_keys("its system part")
    chromium.find_element(By.CSS_SELECTOR, "#dialog [type=submit]").click()
    until(lambda: "Ready: " in chromium.find_element(By.ID, "done").text)

    (kept,) = real.get("/v1/cache/entries?label=kept")["entries"]
    assert kept["tier"] == "system"
    until(lambda: labelled(chromium, "system: kept"))


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
    chromium: Any, real: ServerProcess
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
    chromium.get(f"http://evil.localhost:{elsewhere.server_port}/")
    assert chromium.title == "elsewhere"

    answers = chromium.execute_async_script(ATTACKS, real.url, entry)
    elsewhere.shutdown()
    elsewhere.server_close()

    assert len(answers) == 2 * (6 + 7 + 2) + 3
    for path, kind, status, text in answers:
        assert kind in ("failed", "opaque"), (path, kind)
        assert (status, text) == (0, ""), path
    assert state() == before
    complaints(chromium)
