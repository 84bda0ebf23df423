"""Chromium without a window, driven by its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_S = 120
ANSWER_S = 120


def find_browser() -> str | None:
    """The program, where the machine has one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab. `errors`: what the console and the page's exceptions said; `urls`: what it asked."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0
        self.errors: list[str] = []
        self.urls: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call and wait for the answer; events that come meanwhile are kept."""
        self._number += 1
        body = {"id": self._number, "method": method, "params": parameters}
        self._connection.send(json.dumps(body))
        while True:
            message = json.loads(self._connection.recv(timeout=ANSWER_S))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        name, given = message.get("method"), message.get("params", {})
        if name == "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            self.errors.append(json.dumps(details.get("exception", details)))
        elif name == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
            self.errors.append(json.dumps(given["args"]))
        elif name == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.errors.append(given["entry"]["text"])
        elif name == "Network.requestWillBeSent":
            self.urls.append(given["request"]["url"])

    def evaluate(self, expression: str) -> Any:
        """A JavaScript value, of a promise its result."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str) -> None:
        """Go there; returns when the new document, and not the last one, is there whole."""
        self.call("Page.navigate", url=url)
        there = f"location.href === {json.dumps(url)} && document.readyState === 'complete'"
        self.wait_until(there)

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """Take a size and a colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def wait_until(self, expression: str, timeout_s: float = 60) -> Any:
        """Wait for a true value and return it."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {expression}"
            time.sleep(0.05)
        return value

    def picture(self) -> bytes:
        """The whole page as PNG."""
        result = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(result["data"])


@contextlib.contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """A browser with one tab; it keeps its files in `folder`."""
    program = find_browser()
    assert program, "no Chromium"
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update"]
    command += [f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with connect(tab_address(folder, process), max_size=2**26) as connection:
            yield Page(connection)
    finally:
        process.terminate()
        process.wait(60)


def tab_address(folder: Path, process: subprocess.Popen) -> str:
    """Where the tab's protocol is spoken, once the browser says so."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "browser.log").read_text(errors="replace")
        with contextlib.suppress(OSError, IndexError, StopIteration):
            port = (folder / "DevToolsActivePort").read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
                tabs = json.load(answer)
            return next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page")
        time.sleep(0.05)
    raise AssertionError((folder / "browser.log").read_text(errors="replace"))
