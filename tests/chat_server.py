"""A local OpenAI-compatible endpoint that can be told to misbehave."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server sends: a chat completion with `text`, or `body` as it is."""

    text: str | None = "Explanation: it agrees.\nRating: 4"
    status: int = 200
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0

    def content(self) -> bytes:
        message = {"role": "assistant", "content": self.text}
        completion = {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}
        return (json.dumps(completion) if self.body is None else self.body).encode()


@dataclass
class Request:
    """What was asked, and when, in seconds of the monotonic clock."""

    path: str
    headers: Message
    body: dict[str, Any]
    at: float

    @property
    def question(self) -> str:
        return self.body["messages"][-1]["content"]


class ChatServer:
    """Answers request number N (from 0) with `script(N, request)`, each in its own thread."""

    def __init__(self, script: Callable[[int, Request], Reply]):
        self.script = script
        self.requests: list[Request] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False  # slow replies nobody waits for any more
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        content = handler.rfile.read(int(handler.headers["Content-Length"]))
        if not content:
            return  # who asks was killed before the question was out
        request = Request(handler.path, handler.headers, json.loads(content), time.monotonic())
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        reply = self.script(number, request)
        time.sleep(reply.delay_s)
        with self._lock:
            self.in_flight -= 1
        content = reply.content()
        try:
            handler.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # who asked has given up

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def chat_server(script: Callable[[int, Request], Reply] = lambda _n, _r: Reply()) -> Iterator[ChatServer]:
    server = ChatServer(script)
    server.start()
    try:
        yield server
    finally:
        server.stop()
