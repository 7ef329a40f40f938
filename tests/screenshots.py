"""Pictures of the page in each of its states, in both themes and three widths.

Run as `scripts/screenshots FOLDER [STATE]...`, to be looked at.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests import browser as browsers
from tests.bulk_store import conversations
from tests.page_server import MODEL, TOKEN, PageServer, many, serving
from tests.page_traffic import drive
from tests.server_process import running
from tests.tiny_models import build_model_dir

SIZES = {"phone": (360, 780), "laptop": (1280, 900), "wall": (3840, 2160)}
READY = (
    "return document.querySelector('#dialog').open || state.history !== null "
    "&& (state.seen !== null || state.stats.store === null)"
)
STORY = (
    "requestDetails(state.requests.find(one => one.parted && one.parted.cause "
    "&& !one.parted.is_new).id).then(arguments[0])"
)
THEMES = ("light", "dark")


@contextlib.contextmanager
def traffic(folder: Path) -> Iterator[str]:
    """A real server that has answered some requests."""
    model = build_model_dir(folder / "Tiny-Llama-Random")
    options = {"min_free_bytes": 0, "disk_bytes": 16 << 20, "daily_write_bytes": 8 << 20}
    with running(model, folder / "store", folder, **options) as server:
        drive(server, number=8, dates=("2026-03-01", "2026-03-01"))
    with running(model, folder / "store", folder, **options) as server:
        drive(server, number=32)
        server.request("POST", "/v1/cache/flush")
        yield f"{server.url}/cache#token={server.token}"


@contextlib.contextmanager
def empty(folder: Path) -> Iterator[str]:
    with serving(folder, []) as server:
        yield f"{server.url}/cache#token={TOKEN}"


@contextlib.contextmanager
def off(folder: Path) -> Iterator[str]:
    server = PageServer(None, disk_off="The disk is full: 12 KiB are free of the 2 GiB to be left.")
    many(server.ring, 40)
    yield f"{server.url}/cache#token={TOKEN}"
    server.stop()


@contextlib.contextmanager
def token(folder: Path) -> Iterator[str]:
    with serving(folder, []) as server:
        yield f"{server.url}/cache"


@contextlib.contextmanager
def large(folder: Path) -> Iterator[str]:
    """5,000 entries and 2,000 requests."""
    prompts = list(conversations(MODEL, 5000, systems=150, turns=2))
    with serving(folder, prompts) as server:
        many(server.ring, 2000)
        yield f"{server.url}/cache#token={TOKEN}"


STATES = {"traffic": traffic, "empty": empty, "off": off, "token": token, "large": large}


def take(driver: Any, folder: Path, state: str) -> None:
    """All pictures of a state, and of what its dialogs say."""
    with tempfile.TemporaryDirectory() as scratch, STATES[state](Path(scratch)) as url:
        for name, (width, height) in SIZES.items():
            for scheme in THEMES:
                browsers.size(driver, width, height)
                browsers.theme(driver, scheme)
                driver.get("about:blank")
                driver.get(url)
                browsers.until(partial(driver.execute_script, READY))
                driver.execute_async_script("setTimeout(arguments[0], 900)")
                if state == "traffic":
                    driver.save_screenshot(str(folder / f"page-{name}-{scheme}.png"))
                tall = driver.execute_script("return document.documentElement.scrollHeight")
                if state != "token":
                    browsers.size(driver, width, max(height, int(tall)))
                driver.execute_async_script("setTimeout(arguments[0], 400)")
                driver.save_screenshot(str(folder / f"{state}-{name}-{scheme}.png"))
                browsers.size(driver, width, height)
                if state == "traffic" and (name != "wall" or scheme == "light"):
                    dialogs(driver, folder, f"{name}-{scheme}")


def dialogs(driver: Any, folder: Path, name: str) -> None:
    """A request's story, an entry, and an eviction."""
    scripts = {
        "story": STORY,
        "entry": "details(state.roots.branches[0].last).then(arguments[0])",
        "evict": "evict(state.roots.branches[0].id, true).then(arguments[0])",
        "warm": "warmForm(state.requests[0]); arguments[0]()",
    }
    for what, script in scripts.items():
        driver.execute_async_script(script)
        driver.save_screenshot(str(folder / f"{what}-{name}.png"))
        driver.execute_script("document.querySelector('#dialog').close()")


def for_readme(driver: Any, folder: Path) -> None:
    """The two pictures of docs/img."""
    browsers.size(driver, 1100, 760)
    browsers.theme(driver, "light")
    with tempfile.TemporaryDirectory() as scratch, traffic(Path(scratch)) as url:
        driver.get(url)
        browsers.until(partial(driver.execute_script, READY))
        driver.execute_async_script("setTimeout(arguments[0], 2000)")
        driver.save_screenshot(str(folder / "cache-page.png"))
        driver.execute_async_script(STORY)
        driver.save_screenshot(str(folder / "cache-request.png"))


def main() -> None:
    if (
        len(sys.argv) < 2
        or sys.argv[1].startswith("-")
        or not set(sys.argv[2:]) <= {*STATES, "readme"}
    ):
        sys.exit(f"usage: scripts/screenshots FOLDER [{'|'.join(STATES)}|readme]...")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if browsers.CHROMIUM is None or browsers.DRIVER is None:
        sys.exit(browsers.MISSING)
    with browsers.started() as driver:
        driver.set_script_timeout(120)
        if sys.argv[2:] == ["readme"]:
            for_readme(driver, folder)
            return
        for state in sys.argv[2:] or STATES:
            take(driver, folder, state)
            print(f"{state}: {len(list(folder.glob(f'{state}-*.png')))} pictures")


if __name__ == "__main__":
    main()
