"""A server under load: clients with clips of mixed lengths, all at once, against one request at a time.

The real command in a process of its own, one replica on one core; answers of at most --new-tokens tokens. Every answer
under load is compared with the one that was given alone, and the memory of the replicas must not grow: the line through
it, second by second, is taken. Then malformed requests: each must get a 4xx. Then the model's replica is killed under
load: no answer may be wrong, and the server must answer as before. Figures of a busy machine say little; the ratio is
of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import soundfile
from measuring import Check, conclude

RATE = 16_000


def make_export(folder: Path, width: int) -> Path:
    """Write a model with random weights, two pool members and a language model of two layers."""
    from mowe_ray.model.building import WeakEncoder, build_model, build_processor
    from mowe_ray.model.export import export
    from mowe_ray.model.tokenizing import train_tokenizer

    whisper = {"model_type": "whisper", "d_model": width, "encoder_layers": 2, "encoder_attention_heads": 4}
    hubert = {"model_type": "hubert", "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4}
    hubert |= {"intermediate_size": 2 * width, "conv_dim": [width] * 7}
    llama = {"model_type": "llama", "hidden_size": 2 * width, "intermediate_size": 4 * width, "num_hidden_layers": 2}
    llama |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048, "vocab_size": 300}
    tokenizer = train_tokenizer(["What can be heard?"], 300)
    weak = [WeakEncoder("hubert", hubert), WeakEncoder("whisper", whisper)]
    model = build_model(base_encoder=whisper, weak_encoders=weak, language_model=llama, tokenizer=tokenizer)
    export(model.eval(), build_processor(model, tokenizer), folder)
    return folder


def make_clips(count: int, longest_s: float) -> list[bytes]:
    """Make WAV files of 0.5 s to `longest_s`, tones in noise."""
    rng, clips = np.random.default_rng(0), []
    for seconds in np.geomspace(0.5, longest_s, count):
        time_s = np.arange(round(RATE * seconds)) / RATE
        wave = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 2000) * time_s) + 0.05 * rng.standard_normal(len(time_s))
        file = io.BytesIO()
        soundfile.write(file, wave, RATE, format="WAV")
        clips.append(file.getvalue())
    return clips


@contextmanager
def server(export: Path, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run the command; yields its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "server.log").open("w") as log:
        command = [sys.executable, "-m", "mowe_ray.serve", str(export), "--port", str(port), "--max-requests", "128"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            while True:
                if process.poll() is not None:
                    raise RuntimeError((folder / "server.log").read_text())
                try:
                    httpx.get(f"{url}/health", timeout=5).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def body_of(name: str, clip: bytes, new_tokens: int) -> dict[str, Any]:
    """Return the request for one clip."""
    audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(clip).decode(), "format": "wav"}}
    content = [audio, {"type": "text", "text": "What can be heard?"}]
    return {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": new_tokens}


def ask(http: httpx.Client, url: str, body: dict[str, Any]) -> str:
    """Return the answer to one request."""
    answer = http.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


async def under_load(
    url: str,
    bodies: list[dict[str, Any]],
    wanted: list[str],
    clients: int,
    seconds: float,
    every_s: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Let clients ask again and again, and call `every_s` each second; returns counts, latencies and batch sizes."""
    end, latencies, batches = time.monotonic() + seconds, [], []
    found = {"wrong": 0, "lost": 0}

    async def watch() -> None:
        while time.monotonic() < end:
            every_s()
            await asyncio.sleep(1)

    async def client(number: int, http: httpx.AsyncClient) -> None:
        turn = number
        while time.monotonic() < end:
            which = turn % len(bodies)
            turn += clients + 1
            began = time.monotonic()
            answer = await http.post(f"{url}/v1/chat/completions", json=bodies[which])
            if answer.status_code != 200:
                assert answer.status_code == 503, answer.text
                found["lost"] += 1
                await asyncio.sleep(1)  # as Retry-After asks, more or less
                continue
            latencies.append(time.monotonic() - began)
            batches.append(answer.json()["mowe"]["batch_size"])
            found["wrong"] += answer.json()["choices"][0]["message"]["content"] != wanted[which]

    began = time.monotonic()
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=clients)) as http:
        await asyncio.gather(watch(), *(client(number, http) for number in range(clients)))
    elapsed = time.monotonic() - began
    cuts = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else [0.0] * 99
    return {
        **found,
        "answers": len(latencies),
        "per_s": len(latencies) / elapsed,
        "p50_s": round(cuts[49], 3),
        "p95_s": round(cuts[94], 3),
        "mean_batch": round(statistics.mean(batches or [0]), 1),
    }


def after_a_restart(url: str, body: dict[str, Any]) -> str:
    """Return the answer to a request, once there is a replica again."""
    for _ in range(60):
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        if answer.status_code == 200:
            return str(answer.json()["choices"][0]["message"]["content"])
        assert answer.status_code == 503, answer.text
        time.sleep(1)
    raise RuntimeError("no replica came back")


def malformed(url: str, name: str, count: int) -> dict[int, int]:
    """Send requests that are none; returns how often each status came."""
    rng, statuses = np.random.default_rng(1), {}
    good = json.dumps(body_of(name, make_clips(1, 0.5)[0], 4)).encode()
    headers = {"Content-Type": "application/json"}
    with httpx.Client(timeout=60) as http:
        for number in range(count):
            noise = rng.bytes(int(rng.integers(1, 2000)))
            if number % 4 == 0:
                answer = http.post(f"{url}/v1/chat/completions", content=noise, headers=headers)
            elif number % 4 == 1:  # cut off
                part = good[: int(rng.integers(1, len(good) - 1))]
                answer = http.post(f"{url}/v1/chat/completions", content=part, headers=headers)
            elif number % 4 == 2:  # noise for audio
                answer = http.post(f"{url}/v1/chat/completions", json=body_of(name, noise, 4))
            else:
                answer = http.post(
                    f"{url}/v1/audio/transcriptions", data={"model": name}, files={"file": ("clip.wav", noise)}
                )
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
    return statuses


def replicas_of(process: psutil.Process) -> dict[str, psutil.Process]:
    """Return the processes of the server's replicas by deployment: the gateway, and the model."""
    found = {}
    for child in process.children(recursive=True):
        title = " ".join(child.cmdline())
        if "ServeReplica:" in title:
            found["gateway" if "Gateway" in title else "model"] = child
    return found


def growth(memory_mb: list[float]) -> float:
    """Return the end of the straight line through measurements, divided by its beginning."""
    times = np.arange(len(memory_mb))
    slope, start = np.polyfit(times, memory_mb, 1) if len(memory_mb) > 2 else (0.0, 1.0)
    return float((start + slope * times[-1]) / start)


def main() -> int:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, help="default: random weights")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--longest", type=float, default=12, help="seconds")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--width", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mowe_ray_serving_") as temporary:
        folder = Path(temporary)
        export = arguments.export or make_export(folder / "model", arguments.width)
        with server(export, folder) as (url, process):
            name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
            bodies = [
                body_of(name, clip, arguments.new_tokens) for clip in make_clips(arguments.clips, arguments.longest)
            ]
            with httpx.Client(timeout=120) as http:
                ask(http, url, bodies[-1])  # warm
                began = time.monotonic()
                wanted = [ask(http, url, body) for body in bodies]
                alone_per_s = len(bodies) / (time.monotonic() - began)
            seconds, parts = arguments.seconds, replicas_of(process)
            memory: dict[str, list[float]] = {name: [] for name in parts}

            def weigh() -> None:
                for name, part in parts.items():
                    memory[name].append(part.memory_info().rss / 1e6)

            asyncio.run(under_load(url, bodies, wanted, arguments.clients, seconds / 4))  # buffers grow
            load = asyncio.run(under_load(url, bodies, wanted, arguments.clients, seconds, weigh))
            statuses = malformed(url, name, arguments.malformed)
            still = httpx.post(f"{url}/v1/chat/completions", json=bodies[0], timeout=60)
            second = itertools.count()

            def kill_once() -> None:
                if next(second) == 2:
                    parts["model"].kill()

            kill = asyncio.run(under_load(url, bodies, wanted, arguments.clients, max(4.0, seconds / 4), kill_once))
            after = after_a_restart(url, bodies[0])
    good = sum(count for status, count in statuses.items() if 400 <= status < 500)
    assert load["wrong"] == load["lost"] == kill["wrong"] == 0, (load, kill)
    assert still.json()["choices"][0]["message"]["content"] == after == wanted[0]
    checks = [
        Check("throughput, under load / one at a time", load["per_s"] / alone_per_s, 2.0, at_most=False),
        Check("memory of the model's replica, end / start of the load", growth(memory["model"]), 1.1),
        Check("memory of the gateway, end / start of the load", growth(memory["gateway"]), 1.1),
        Check("malformed requests that got a 4xx", good / max(1, sum(statuses.values())), 1.0, at_most=False),
    ]
    table = {
        "one at a time": f"{alone_per_s:.2f} answers a second",
        f"{arguments.clients} clients": f"{load['per_s']:.2f} answers a second, {load['answers']} in all, none wrong",
        "latency": f"p50 {load['p50_s']} s, p95 {load['p95_s']} s; batches of {load['mean_batch']} in the mean",
        "memory": ", ".join(f"{name} {mb[0]:.0f} to {mb[-1]:.0f} MB" for name, mb in memory.items()),
        "malformed": ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items())),
        "replica killed": f"{kill['answers']} answers, none wrong; {kill['lost']} requests were told to come again",
    }
    return conclude("serving", table, checks, **load)


if __name__ == "__main__":
    sys.exit(main())
