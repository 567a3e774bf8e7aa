"""A page opened in headless Chromium, driven through its debugging pipe: what it asks for, what scripts see, how it looks."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run --disable-background-networking --disable-extensions "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
).split()


def need_chromium() -> None:
    """Skips without the browser, and fails where VITSCALE_REQUIRE_CHROMIUM says that there must be one."""
    if CHROMIUM is None:
        if os.environ.get("VITSCALE_REQUIRE_CHROMIUM") == "1":
            pytest.fail("VITSCALE_REQUIRE_CHROMIUM=1 and there is no chromium; install Debian's package chromium")
        pytest.skip("no chromium on this machine (Debian's package chromium); VITSCALE_REQUIRE_CHROMIUM=1 makes this a failure")


class Browser:
    """One tab."""

    def __init__(self, to: int, come: int) -> None:
        self._to, self._from = to, os.fdopen(come, "rb")
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Does one thing; what happens meanwhile is kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]  # type: ignore[no-any-return]

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Loads a file in a window of that width and colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, script: str) -> Any:
        """What an expression is in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def requests(self) -> list[str]:
        """Every address that the page asked for."""
        return [event["params"]["request"]["url"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "chromium has ended"
            data += byte
        return json.loads(data)  # type: ignore[no-any-return]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with nothing in it."""
    assert CHROMIUM is not None
    commands, answers = os.pipe(), os.pipe()
    # Chromium reads commands from descriptor 3 and writes to 4, where the shell puts the pipes; so they must not be 3 or 4 themselves.
    reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands[0], answers[1]))
    line = [
        "bash",
        "-c",
        f'exec "$@" 3<&{reads} 4>&{writes} {reads}<&- {writes}>&-',
        "bash",
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={profile}",
    ]
    process = subprocess.Popen(
        line, pass_fds=(reads, writes), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for end in (commands[0], answers[1], reads, writes):
        os.close(end)
    try:
        tab = Browser(commands[1], answers[0])
        yield tab
        tab._session = None
        tab.call("Browser.close")
    finally:
        os.close(commands[1])
        try:
            process.wait(timeout=30)  # it ends when its pipe does
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
