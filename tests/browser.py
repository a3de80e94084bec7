"""A browser without a window, for tests of pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Chromium reads and writes the pipe as files 3 and 4
START = """
import fcntl, os, sys
far = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, file in enumerate(far, start=3):
    os.dup2(file, number)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """Chromium without a window, told what to do through its pipe."""

    def __init__(self, program: str, profile: Path) -> None:
        reading, to = os.pipe()
        source, writing = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --window-size=1400,1000 --remote-debugging-pipe"
        )
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                START,
                str(reading),
                str(writing),
                program,
                *flags.split(),
                f"--user-data-dir={profile}",
            ],
            pass_fds=(reading, writing),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reading)
        os.close(writing)
        self._to, self._from = os.fdopen(to, "wb", 0), os.fdopen(source, "rb")
        self.events: list[dict[str, Any]] = []
        self._session: dict[str, str] = {}
        self._number = 0

    def start(self) -> None:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _read(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "the browser ended"
            message += byte
        return json.loads(message)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file: Path) -> None:
        self.events.clear()
        self.send("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def js(self, code: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x: float, y: float) -> None:
        self.mouse("mousePressed", x, y, button="left", clickCount=1)
        self.mouse("mouseReleased", x, y, button="left", clickCount=1)

    def press(self, key: str, **more: Any) -> None:
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **more)

    def troubles(self) -> list[Any]:
        """What the console said, and what was asked of the network beside the page itself."""
        wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [e for e in self.events if e["method"] in wrong] + [url for url in asked[1:] if url != "data:,"]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        self._to.close()
        self._from.close()
