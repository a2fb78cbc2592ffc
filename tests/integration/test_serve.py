"""The real command: on Ray Serve, asked by the official client, with a replica killed in the middle."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from openai import OpenAI

from mowe_ray.ask import main as ask
from tests.end_to_end import ROOT, encoded, run_command
from tests.exported_models import export_to, steered_model, task_sound
from tests.serving import asked

pytestmark = pytest.mark.slow

CLIPS = [encoded(task_sound(kind, 0, 2)) for kind in range(5)]


@dataclass(frozen=True)
class Server:
    """The command as it runs."""

    url: str
    process: subprocess.Popen[str]
    client: OpenAI


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    export_to(folder / "tiny", steered_model(2))
    for number, clip in enumerate(CLIPS):
        (folder / f"clip{number}.flac").write_bytes(clip)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mowe_ray.serve", str(folder / "tiny"), "--port", str(port)]
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "8"], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        assert process.poll() is None, (folder / "server.log").read_text()
        try:
            httpx.get(f"{url}/health", timeout=5).raise_for_status()
            break
        except httpx.HTTPError:
            time.sleep(0.5)
    yield Server(url, process, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120))
    if process.poll() is None:
        process.kill()
    log.close()


def answer(server: Server, number: int) -> str:
    reply = server.client.chat.completions.create(model="tiny", messages=asked(CLIPS[number % 5], "What is it?"))
    return str(reply.choices[0].message.content)


def test_answers_are_those_of_the_model_in_this_process(server: Server, folder: Path, capsys) -> None:
    for number in range(5):
        clip = str(folder / f"clip{number}.flac")
        assert ask([str(folder / "tiny"), clip, "What is it?", "--max-new-tokens", "8", "--json"]) == 0
        wanted = json.loads(capsys.readouterr().out)
        assert answer(server, number) == wanted["answer"]
        assert ask(["--url", f"{server.url}/v1", clip, "What is it?", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["answer"], found["mowe"]["clips"]) == (wanted["answer"], wanted["mowe"]["clips"])
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda number: answer(server, number), range(30)))
    assert together == [answer(server, number) for number in range(5)] * 6


def test_streams_and_errors_come_through(server: Server) -> None:
    whole = answer(server, 0)
    chunks = server.client.chat.completions.create(model="tiny", messages=asked(CLIPS[0], "What is it?"), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    with pytest.raises(openai.BadRequestError, match="not an audio file"):
        server.client.chat.completions.create(model="tiny", messages=asked(b"text " * 99, "?"))
    with pytest.raises(openai.BadRequestError, match="no encoder 'whale'"):
        server.client.chat.completions.create(
            model="tiny", messages=asked("?"), extra_body={"mowe": {"without": ["whale"]}}
        )
    host = httpx.get(f"{server.url}/v1/models", headers={"Host": "elsewhere.example"})
    assert host.status_code == 403


@pytest.mark.soak  # half a minute
def test_a_killed_replica_costs_no_answer_or_says_so_and_the_next_ones_work(server: Server) -> None:
    wanted = [answer(server, number) for number in range(5)]
    (replica,) = [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if "ServeReplica:mowe_ray:model-tiny" in " ".join(child.cmdline())
    ]

    def tried(number: int) -> str:
        try:
            return answer(server, number)
        except openai.InternalServerError as error:
            return "refused" if error.status_code == 503 else str(error)

    with ThreadPoolExecutor(8) as pool:
        asked_for = [pool.submit(tried, number) for number in range(10)]
        replica.kill()
        found = [one.result() for one in asked_for]
    assert all(one in ("refused", wanted[number % 5]) for number, one in enumerate(found))
    for _ in range(120):
        if tried(1) != "refused":
            break
        time.sleep(1)
    assert [answer(server, number) for number in range(5)] == wanted


def test_it_ends_when_it_is_asked_to(server: Server, folder: Path) -> None:
    server.process.send_signal(signal.SIGTERM)
    out, _ = server.process.communicate(timeout=120)
    assert server.process.returncode == 0
    assert json.loads(out.splitlines()[-1]) == {"models": ["tiny"], "url": server.url}
    said = (folder / "server.log").read_text()
    assert said.endswith("ending\n")
    assert "graceful_shutdown" not in said
    assert " serve " not in said  # nothing of Ray's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither a run nor an export"),
        (["tiny", "--host", "0.0.0.0"], "--token-file"),
        (["tiny", "--replicas", "4-1"], "--replicas"),
        (["tiny", "--port", "99999"], "--port"),
        (["tiny", "--token-file", "missing"], "--token-file"),
    ],
)
def test_a_wrong_request_starts_nothing(folder: Path, arguments: list[str], message: str) -> None:
    paths = [str(folder / word) if word in ("nowhere", "tiny", "missing") else word for word in arguments]
    done = run_command(*paths, module="mowe_ray.serve")
    assert done.code == 2
    assert message in done.err
    assert done.out == ""
