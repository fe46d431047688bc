"""A headless Chromium that reads one page at a time and says what it loaded and complained of."""

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

DRIVER, PROGRAM = Path("/usr/bin/chromedriver"), Path("/usr/bin/chromium")
SWITCHES = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)
LOCAL = ("file:", "data:", "blob:")


class Browser:
    """One window."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver, self.address = driver, ""

    def open(self, page: Path, width: int = 1280) -> "Browser":
        """Open a page and wait until its charts are drawn."""
        self._logs()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.address = page.resolve().as_uri()
        self.driver.get(self.address)
        self.wait_for(self.drawn)
        return self

    def drawn(self) -> bool:
        """Whether all charts are drawn."""
        return self.run("return document.body.dataset.drawn") == "yes"

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Wait until something is so; a minute at most."""
        end = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < end, self.complaints()
            time.sleep(0.02)

    def _logs(self) -> tuple[list[str], list[str]]:
        """Messages of the console, and what the page requested, since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        own = [request["request"]["url"] for request in asked if request["documentURL"] == self.address]
        return [entry["message"] for entry in self.driver.get_log("browser")], own

    def complaints(self) -> list[str]:
        """What the console says, and requests that leave the machine, since the page was opened."""
        messages, asked = self._logs()
        assert self.address in asked  # the log is on
        return messages + [address for address in asked if not address.startswith(LOCAL)]

    def run(self, script: str, *arguments: object) -> Any:
        """The value that a script returns."""
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        """What elements say."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent.trim())", selector)

    def curves(self, chart: str, run: int = 0) -> dict[str, tuple[list[float], list[float]]]:
        """The points of a drawn chart by name of the line."""
        place = f'.chart[data-chart="{chart}"][data-run="{run}"]'
        lines = self.run(
            "return document.querySelector(arguments[0]).data.map(d => [d.name ?? '', [...d.x], [...(d.y ?? [])]])",
            place,
        )
        return {name: (x, y) for name, x, y in lines}

    def pixels(self, selector: str) -> list[np.ndarray]:
        """The images that are shown, decoded."""
        sources = self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.src)", selector)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))) for uri in sources]


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile."""
    options = Options()
    options.binary_location = str(PROGRAM)
    for switch in (*SWITCHES, f"user-data-dir={profile}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(str(DRIVER)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
