"""A headless Chromium, driven over a pipe: clicks, keys, screenshots, and what it complains of."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
PATIENCE = 30.0  # seconds
CODES = {",": "Comma", ".": "Period", "Tab": "Tab"}


def program() -> str | None:
    """The browser's program, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One tab; use :func:`browser`.

    Args:
        requests, answers: the pipe's ends.
    """

    def __init__(self, requests: int, answers: int) -> None:
        self.requests, self.answers, self.number, self.rest = requests, answers, 0, b""
        self.complaints: list[str] = []  # errors and warnings of the page
        self.fetched: list[str] = []  # all that the page asked for
        self.session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """What a command of the DevTools protocol answers."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.requests, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def receive(self) -> dict[str, Any]:
        """The next message; those that tell of complaints and requests are noted."""
        while b"\0" not in self.rest:
            assert select.select([self.answers], [], [], PATIENCE)[0], "the browser does not answer"
            more = os.read(self.answers, 1 << 20)
            assert more, "the browser has ended"
            self.rest += more
        first, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        match message.get("method"):
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                self.complaints.append(json.dumps(message["params"]))
            case "Network.requestWillBeSent":
                self.fetched.append(message["params"]["request"]["url"])
        return message

    def open(self, page: Path) -> None:
        """Show a file, and wait until it is loaded."""
        self.send("Page.navigate", url=page.resolve().as_uri())
        while self.run("document.readyState") != "complete":
            pass

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window, and the colours that its user likes."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def click(self, selector: str) -> None:
        """Press and release the mouse on the first element that matches."""
        box = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'center'});"
            "const box = node.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key, as from a keyboard."""
        options = {"key": key, "code": CODES.get(key, key)} | ({"text": key} if len(key) == 1 else {})
        if key == "Tab":
            options["windowsVirtualKeyCode"] = 9
        self.send("Input.dispatchKeyEvent", type="keyDown", **options)
        self.send("Input.dispatchKeyEvent", type="keyUp", **options)

    def screenshot(self, path: Path, selector: str = "body") -> None:
        """The first element that matches, as a PNG."""
        box = self.run(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return {x: box.x, y: box.y + scrollY, width: box.width, height: box.height, scale: 1}; })()"
        )
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=box)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser whose profile is in ``folder``, which there must be a program for."""
    low = (*os.pipe(), *os.pipe())
    pipes = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low]  # none is 3 or 4
    for end in low:
        os.close(end)
    theirs, ours = (pipes[0], pipes[3]), (pipes[1], pipes[2])  # each reads one pipe, and writes to the other
    # A browser has its pipes as descriptors 3 and 4.
    become = f"import os, sys; os.dup2({theirs[0]}, 3); os.dup2({theirs[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-S", "-c", become, program() or "", *OPTIONS, f"--user-data-dir={folder}"]
    process = subprocess.Popen(command, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for end in theirs:
            os.close(end)
        yield Browser(*ours)
    finally:
        process.terminate()
        process.wait(20)
        for end in ours:
            os.close(end)


def main(page: str, element: str, picture: str) -> None:
    """``python tests/browser.py PAGE ELEMENT PICTURE``: a picture for the documents, as wide as they are read."""
    with TemporaryDirectory() as profile, browser(Path(profile)) as tab:
        tab.look(1000, 900)
        tab.open(Path(page))
        tab.screenshot(Path(picture), element)


if __name__ == "__main__":
    main(*sys.argv[1:])
