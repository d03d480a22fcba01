"""A headless Chromium for tests of report pages: opens files at any width, in light or dark, and knows what they asked for."""

import base64
import json
import os
import pathlib
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service


class Browser:
    """Chromium under its driver; `driver` is selenium's."""

    def __init__(self):
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if not (chromium and driver):
            pytest.fail("no Chromium: install it and its driver, on Debian by `apt-get install chromium chromium-driver`")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(flag)  # without the sandbox because CI runs as root
        self.driver = webdriver.Chrome(options=options, service=Service(driver))

    def look(self, width: int, colours: str) -> None:
        """Takes on a window's width and light or dark colours."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": colours}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def open(self, page: pathlib.Path, width: int = 1280, colours: str = "light") -> None:
        self.look(width, colours)
        self.driver.get(page.as_uri())

    def complaints(self) -> list[str]:
        """What the console has said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent.trim()", selector)

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(one => one.textContent.trim())", selector)

    def screenshot(self, path: pathlib.Path) -> None:
        """Keeps the whole page as a PNG, and a copy in the folder that MPTRAIN_SCREENSHOTS names."""
        width, height = self.run(
            "const {clientWidth, scrollHeight} = document.documentElement; return [clientWidth, scrollHeight]"
        )
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 8000), "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(shot["data"]))
        if kept := os.environ.get("MPTRAIN_SCREENSHOTS"):
            pathlib.Path(kept).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept)
