"""A real browser to open reports with, and what it then says and asks for."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

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
