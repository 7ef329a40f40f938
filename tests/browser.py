"""Headless Chromium for the page's tests, and what is asked of it again and again.

Without it the tests that need it are skipped by name; `.ci/run` installs it where it may.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import waiting

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
MISSING = "CHROMIUM IS MISSING: the page was not tested (apt install chromium chromium-driver)"
needs_chromium = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason=MISSING)
HINT = "the page did not get there"


@contextlib.contextmanager
def started(width: int = 1280, height: int = 900, *, traced: bool = False) -> Iterator[Any]:
    """A browser with a viewport of that size; `traced` for `tasks`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    wanted = {"browser": "ALL", **({"performance": "ALL"} if traced else {})}
    options.set_capability("goog:loggingPrefs", wanted)
    if traced:
        categories = {"traceCategories": "disabled-by-default-devtools.timeline,toplevel"}
        options.add_experimental_option("perfLoggingPrefs", categories)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        size(driver, width, height)
        yield driver
    finally:
        driver.quit()


def size(driver: Any, width: int, height: int) -> None:
    """Give the page a viewport; windows themselves have a least width."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def theme(driver: Any, scheme: str) -> None:
    """Have the system prefer `light` or `dark`."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def until(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    """Wait for what a condition finds; the page may change under it."""
    from selenium.common.exceptions import WebDriverException

    def found() -> Any:
        with contextlib.suppress(WebDriverException):
            return condition()
        return None

    return waiting.until(found, HINT, timeout_s)


def complaints(driver: Any) -> list[str]:
    """What the browser logged: errors of the script, and what the policy forbade."""
    return [one["message"] for one in driver.get_log("browser") if "favicon" not in one["message"]]


def tasks(driver: Any) -> list[float]:
    """Milliseconds that each task of the page's main thread took of a processor, since last asked.

    Not by the clock on the wall, which other processes have their part of.
    """
    found: dict[tuple[int, int], list[float]] = {}
    main: set[tuple[int, int]] = set()
    for one in driver.get_log("performance"):
        said = json.loads(one["message"])["message"]
        if said["method"] != "Tracing.dataCollected":
            continue
        event = said["params"]
        thread = event.get("pid", 0), event.get("tid", 0)
        if event.get("name") == "thread_name" and event["args"]["name"] == "CrRendererMain":
            main.add(thread)
        if event.get("name") in ("RunTask", "ThreadControllerImpl::RunTask"):
            found.setdefault(thread, []).append(event.get("tdur", 0) / 1000)
    return [one for thread in main for one in found.get(thread, ())]
