"""A server of tiny models in this process, without Ray, on a real port."""

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from openai import OpenAI

from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.serving.app import Interface, Limits
from mowe_ray.serving.batching import Batcher, LocalBackend
from mowe_ray.serving.decoding import Decoders
from mowe_ray.serving.examples import Example
from mowe_ray.serving.served_model import ServedModel
from mowe_ray.training.flops import Amount

LIMITS = Limits(max_new_tokens=8)
Made = tuple[MoweForConditionalGeneration, MoweProcessor]


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    batchers: dict[str, Batcher]

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def serving(
    made: dict[str, Made],
    limits: Limits = LIMITS,
    *,
    token: str | None = None,
    examples: list[Example] | None = None,
    **options: Any,
) -> Iterator[Served]:
    """Serve models under names; `options` are for their batchers."""
    models = {name: ServedModel(*one, gflops_of(one[0])) for name, one in made.items()}
    batchers = {name: Batcher(model, **options) for name, model in models.items()}
    backend = LocalBackend({name: (models[name], batchers[name]) for name in made})
    app = Interface(backend, Decoders(2, timeout_s=20), limits, examples or []).app(token)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", batchers)
    finally:
        server.should_exit = True
        thread.join()
        for batcher in batchers.values():
            batcher.close()


def gflops_of(model: MoweForConditionalGeneration) -> dict[float, Amount]:
    """Made-up operations: 1 a second always, and 1, 2, 3 ... a second of the members."""
    members = len(model.config.weak_encoders or [])
    return {s: Amount(s, tuple(s * (n + 1) for n in range(members))) for s in (0.0, 30.0)}


def audio_part(data: bytes, container: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": container}}


def asked(*parts: str | bytes) -> list[dict[str, Any]]:
    """One turn of the user."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else audio_part(part) for part in parts]
    return [{"role": "user", "content": content}]
