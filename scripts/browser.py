"""A Chromium that is driven over a pipe: emulated screens, colour schemes, pictures, the console.

python scripts/browser.py PAGE.html PICTURE.png [--width 360] [--height 800] [--dark] [--full]
                          [--at SELECTOR]

Nothing but the standard library is needed, and no port is opened.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

PATIENCE = 120  # seconds
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def chromium() -> str | None:
    """Returns the path of an installed Chromium."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab of a Chromium with an empty profile; a context manager.

    Attributes:
        messages: what pages wrote to the console or did wrong, since the last :meth:`open`.
        requests: addresses that were asked for since then.
    """

    def __init__(self, path: str) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        self._count = 0
        self._rest = b""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        reads, self._write = os.pipe()
        self._read, writes = os.pipe()
        # the browser has them as descriptors 3 and 4; until then they must be others
        theirs, ours = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (reads, writes))
        swap = f'exec 3<&{theirs} 4>&{ours} {theirs}<&- {ours}>&-; exec "$@"'
        command = ["bash", "-c", swap, "bash", path, *_OPTIONS]
        command += [f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs, ours), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (reads, writes, theirs, ours):
            os.close(end)
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def open(self, page: Path, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Loads a file on a screen of that size, phone-like below 600 pixels."""
        self.messages.clear()
        self.requests.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._event()["method"] != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def picture(self, full: bool = False) -> bytes:
        """Returns a PNG of what is on the screen, or of the whole page."""
        found = self.call(
            "Page.captureScreenshot",
            captureBeyondViewport=full,
            **({"clip": {"x": 0, "y": 0, "scale": 1, **self._size()}} if full else {}),
        )
        return base64.b64decode(found["data"])

    def _size(self) -> dict[str, float]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"width": size["width"], "height": size["height"]}

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Calls a method of the DevTools protocol and returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return dict(answer["result"])

    def _event(self) -> dict[str, Any]:
        event = self._next()
        self._note(event)
        return {"method": "", **event}

    def _note(self, event: dict[str, Any]) -> None:
        method, found = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif method == "Log.entryAdded":
            self.messages.append(found["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(json.dumps(found["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(found["exceptionDetails"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], PATIENCE)[0]:
                raise RuntimeError(f"the browser did not answer for {PATIENCE} s")
            content = os.read(self._read, 1 << 20)
            if not content:
                raise RuntimeError("the browser ended")
            self._rest += content
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--full", action="store_true", help="the whole page, not one screen")
    parser.add_argument("--at", help="scroll to this element first")
    options = parser.parse_args()
    path = chromium()
    if path is None:
        parser.error(f"no Chromium is installed (looked for {', '.join(NAMES)})")
    with Browser(path) as browser:
        browser.open(options.page, options.width, options.height, options.dark)
        if options.at:
            browser.evaluate(f"document.querySelector({options.at!r}).scrollIntoView()")
        options.picture.write_bytes(browser.picture(options.full))
        for message in browser.messages:
            print(message)


if __name__ == "__main__":
    main()
