"""Headless Chromium over its debugging pipe (Chrome DevTools Protocol): pages opened, listened to, drawn."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# Which images did not load, which plots have no size, and every number that is bound to a place in report.json.
ASK = """JSON.stringify({
  images: [...document.images].map(i => [i.alt, i.complete && i.naturalWidth > 0]),
  plots: [...document.querySelectorAll('svg')].map(s => {
    const b = s.getBoundingClientRect();
    return [s.getAttribute('aria-label'), b.width > 50 && b.height > 20 && s.children.length > 3];
  }),
  drawn: [...document.querySelectorAll('svg')].map(s => {
    const b = s.getBoundingClientRect();
    return b.width > 50 && b.height > 20 && s.querySelectorAll('path').length > 3;
  }),
  numbers: [...document.querySelectorAll('data')].map(d => [d.dataset.path, d.value]),
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  focus: document.querySelectorAll('a[href],summary,input,[tabindex]').length,
})"""


@dataclass
class Seen:
    """What a page did: console errors, requests that were no data: and not the page, and the answer to ASK."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)


class Browser:
    """One tab. Messages are JSON with a zero byte between, over file descriptors 3 and 4 of the browser."""

    def __init__(self, told: int, heard: int) -> None:
        self._told, self._heard, self._rest, self._number = told, heard, b"", 0
        self.events: list[dict[str, Any]] = []
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._told, json.dumps(message).encode() + b"\0")
        return self._until(lambda told: told.get("id") == self._number, method)["result"]

    def _until(self, wanted: Any, what: str, seconds: float = 60.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while b"\0" in self._rest:
                line, _, self._rest = self._rest.partition(b"\0")
                told = json.loads(line)
                self.events.append(told)
                if wanted(told):
                    assert "error" not in told, told["error"]
                    return told
            if select.select([self._heard], [], [], 0.5)[0]:
                self._rest += os.read(self._heard, 1 << 20)
        raise TimeoutError(what)

    def open(self, file: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> Seen:
        """Load a page and say what it did."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        if not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self._until(lambda event: event.get("method") == "Page.loadEventFired", "load")
        answer = json.loads(self.call("Runtime.evaluate", expression=ASK)["result"]["value"])
        seen = Seen(answer=answer)
        for event in self.events:
            told = event.get("params", {})
            if event.get("method") == "Network.requestWillBeSent":
                url = told["request"]["url"]
                seen.requests += [url] if not url.startswith("data:") and url != file.as_uri() else []
            if event.get("method") == "Log.entryAdded":
                seen.errors.append(told["entry"]["text"])
            if event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                seen.errors.append(json.dumps(told)[:300])
        return seen

    def shot(self, out: Path, *, whole: bool = True) -> None:
        """The page as a PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        out.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A headless Chromium that writes to `folder`; skips where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium (.ci/setup installs it)")
    to_read, told = os.pipe()
    heard, to_write = os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
             f"--user-data-dir={folder / 'chromium'}"]  # fmt: skip
    # the shell puts the two ends where Chromium looks for them
    script = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
    process = subprocess.Popen(
        ["bash", "-c", script, program, *flags], pass_fds=(to_read, to_write),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_read), os.close(to_write)
    try:
        yield Browser(told, heard)
    finally:
        process.terminate()
        process.wait(20)
        os.close(told), os.close(heard)
