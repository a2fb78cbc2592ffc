"""A real browser to open reports with, and what it then says and asks for."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A browser is no dependency of ours: who only trains has none. .ci/run installs one.
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open the report with")

# No name resolves but that of the page's own server: nothing leaves this machine, whoever asks.
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--enable-logging=stderr", "--v=0",
    "--virtual-time-budget=2000", "--window-size=1200,2400",
]  # fmt: skip


@dataclass
class Opened:
    """What a browser did with a page: its lines on the console, what the page asked for, and the final document."""

    console: list[str]
    requests: list[str]
    dom: str


class Handler(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[ThreadingHTTPServer]:
    """Serve a folder on this machine only."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def opened(html: str, server: ThreadingHTTPServer, folder: Path) -> Opened:
    """Open a page as http://127.0.0.1:PORT/report.html."""
    (folder / "report.html").write_text(html, encoding="utf-8")
    origin = f"http://127.0.0.1:{server.server_port}"
    log = folder / "net.json"
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    result = subprocess.run(
        [*command, "--dump-dom", f"{origin}/report.html"], capture_output=True, text=True, timeout=120, check=True
    )
    record = json.loads(log.read_text())
    begins = record["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    begun = [
        event["params"] for event in record["events"] if event["type"] == begins and "url" in event.get("params", {})
    ]
    # The browser asks for things of its own; what a page asks for has the page's origin as its initiator.
    asked = [event["url"] for event in begun if event["initiator"] == origin or event["url"].startswith(origin)]
    return Opened([line for line in result.stderr.splitlines() if "CONSOLE" in line], asked, result.stdout)


class Tab:
    """A page that is used: by its scripts' language, and by keys."""

    def __init__(self, socket: ClientConnection):
        self._socket = socket
        self._number = 0
        self.console: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the debugging protocol; keeps what the page says and asks for meanwhile."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            heard = json.loads(self._socket.recv(timeout=60))
            found = heard.get("params", {})
            if heard.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.console.append(json.dumps(found))
            if heard.get("method") == "Network.requestWillBeSent":
                self.requests.append(found["request"]["url"])
            if heard.get("id") == self._number:
                assert "error" not in heard, heard
                return dict(heard["result"])

    def look(self, *, width: int = 1100, dark: bool = False) -> None:
        """Set the width of the window, and the colours the reader prefers."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def visit(self, url: str) -> None:
        """Open a page."""
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Return what a script comes to."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 40) -> None:
        """Wait until a script is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, condition
            time.sleep(0.1)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)


@contextmanager
def browsing(folder: Path) -> Iterator[Tab]:
    """Start a browser with one empty page."""
    assert CHROMIUM is not None
    flags = [flag for flag in FLAGS if not flag.startswith("--virtual-time")]
    more = ["--remote-debugging-port=0", "--autoplay-policy=no-user-gesture-required"]
    browser = subprocess.Popen(
        [CHROMIUM, *flags, *more, f"--user-data-dir={folder / 'profile'}", "about:blank"], stderr=subprocess.DEVNULL
    )
    try:
        port = folder / "profile" / "DevToolsActivePort"
        for _ in range(300):
            if port.exists() and port.read_text().strip():
                break
            time.sleep(0.1)
        tabs = httpx.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json").json()
        address = next(tab for tab in tabs if tab["type"] == "page")["webSocketDebuggerUrl"]
        with connect(address, max_size=1 << 26) as socket:
            yield Tab(socket)
    finally:
        browser.kill()
        browser.wait()
