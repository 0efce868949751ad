"""A real browser for the tests: headless Chromium, driven by its DevTools protocol over two pipes.

    with Browser() as browser:
        browser.open(page)
        assert browser.value("document.title") == "..."
        assert browser.complaints == []

No driver and no package is needed: commands are JSON objects that end in NUL, written to Chromium's descriptor 3, and
answers and events come from its descriptor 4.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--remote-debugging-pipe", "--window-size=1280,1000"),
]
PATIENCE = 60.0  # seconds until a browser that does not answer fails the test


class Browser:
    """One tab. `complaints`: console messages, exceptions and dialogs; `requests`: the addresses that it asked for."""

    def __enter__(self) -> Browser:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._events: list[dict[str, Any]] = []
        self._buffer, self._number, self._session = b"", 0, None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # A shell makes them descriptors 3 and 4; first out of the way, so that none of the two is overwritten.
        high_in, high_out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in (theirs_in, theirs_out))
        script = f'exec "$0" "$@" 3<&{high_in} 4>&{high_out}'
        assert CHROMIUM is not None
        command = ["bash", "-c", script, CHROMIUM, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        quiet: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, pass_fds=(high_in, high_out), **quiet)
        for descriptor in (theirs_in, theirs_out, high_in, high_out):
            os.close(descriptor)
        pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        target = pages[0] if pages else self.call("Target.createTarget", url="about:blank")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises AssertionError with Chromium's error."""
        number = self._send(method, **params)
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def open(self, page: Path, colour_scheme: str = "light") -> None:
        """Load a file and wait until it is there, its scripts run."""
        features = [{"name": "prefers-color-scheme", "value": colour_scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self._events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, as JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def _send(self, method: str, **params: Any) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._number

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            assert left > 0, "chromium does not answer"
            assert select.select([self._in], [], [], left)[0], "chromium does not answer"
            read = os.read(self._in, 1 << 20)
            assert read, "chromium ended"
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self._notice(message)
        return message

    def _notice(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        method, params = event["method"], event["params"]
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(params))
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {params['message']}")
            self._send("Page.handleJavaScriptDialog", accept=True)  # the page waits for it
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
