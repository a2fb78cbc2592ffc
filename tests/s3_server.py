"""A local S3 server (moto) that can be slow, refuse requests and break connections.

with S3Server() as server:
    os.environ.update(server.environment)   # what s3fs, and any process that inherits it, needs to find it
    server.faults.latency_s = 0.03
    server.faults.fail(3, 503)
"""

import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from moto.backends import get_backend
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
Fault = Literal[500, 503] | Literal["reset"]


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        latency_s: Added to every request, in seconds.
        rate: Share of the requests that fail, by one of `kinds`.
        only: Pattern of the requests ("GET /bucket/name") that may fail.
        requests: All of them so far.
        bytes: Of the bodies of requests and answers so far.
    """

    latency_s: float = 0.0
    rate: float = 0.0
    kinds: tuple[Fault, ...] = (503, "reset")
    only: str = "GET"
    requests: list[str] = field(default_factory=list)
    bytes: int = 0
    _left: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def fail(self, number: int, fault: Fault) -> None:
        """Let the next `number` requests fail."""
        self._left += [fault] * number

    def count(self, pattern: str) -> int:
        """Return how many requests so far match a pattern."""
        return sum(re.match(pattern, request) is not None for request in self.requests)

    def next(self, request: str) -> Fault | None:
        """Return what happens to a request."""
        if not re.match(self.only, request):
            return None
        with self._lock:
            if self._left:
                return self._left.pop(0)
            return self._random.choice(self.kinds) if self._random.random() < self.rate else None


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # clients keep their connections, as to a real one

    def log(self, *_: Any) -> None:
        pass


class S3Server:
    """Serves from memory, empty at first, while the context is open."""

    def __init__(self) -> None:
        self.faults = Faults()
        self._app = DomainDispatcherApplication(create_backend_app)

    def __enter__(self) -> Self:
        get_backend("s3").reset()  # one for the process, with the buckets of the server before
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead every S3 client here."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        time.sleep(self.faults.latency_s)
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        if environ.get("QUERY_STRING"):
            request += f"?{environ['QUERY_STRING']}"
        self.faults.requests.append(request)
        self.faults.bytes += int(environ.get("CONTENT_LENGTH") or 0)
        fault = self.faults.next(request)
        if isinstance(fault, int):
            start_response(f"{fault} Refused", [("Content-Type", "application/xml"), ("Content-Length", "0")])
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return []
        content = b"".join(self._app(environ, start_response))
        self.faults.bytes += len(content)
        return [content] if fault is None else self._cut(environ, content)

    def _cut(self, environ: dict[str, Any], content: bytes) -> Iterator[bytes]:
        yield content[: len(content) // 2]
        environ["werkzeug.socket"].close()
        raise ConnectionResetError("on purpose")


@contextmanager
def served(latency_s: float = 0.0) -> Iterator[dict[str, str]]:
    """Serve from a process of its own, whose CPU time is not the caller's; yields the environment that leads there."""
    command = [sys.executable, __file__, str(latency_s)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        yield json.loads(server.stdout.readline())
    finally:
        server.stdin.close()
        server.wait()


def make_bucket() -> None:
    """Create the bucket, in the process whose environment leads to the server."""
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)


if __name__ == "__main__":
    with S3Server() as running:
        running.faults.latency_s = float(sys.argv[1])
        sys.stdout.write(json.dumps(running.environment) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
