"""Submitted to a head without CPUs, a run makes Ray's own autoscaler bring the nodes it needs; idle, they go again."""

import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ray.util.state import list_actors

from tests.end_to_end import ROOT
from tests.tiny_runs import Corpus, tiny_arguments
from tests.tiny_sweeps import write_sweep

pytestmark = pytest.mark.slow
_AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
_GONE_S, _START_S = 90, 180


def launcher() -> ModuleType:
    """cluster/local_autoscaling.py, which is no package."""
    spec = importlib.util.spec_from_file_location("local_autoscaling", ROOT / "cluster" / "local_autoscaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Submitted = subprocess.CompletedProcess[str]


class Cluster:
    """The cluster, and how many nodes it had when."""

    def __init__(self, address: str, module: ModuleType):
        self.address, self._nodes = address, module.nodes
        self.counts: list[tuple[float, int]] = []
        self._began, self._over = time.monotonic(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            now = self._nodes(self.address)
            if not self.counts or self.counts[-1][1] != now:
                self.counts.append((round(time.monotonic() - self._began, 1), now))

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + _GONE_S
        while not self.counts or self.counts[-1][1]:
            assert time.monotonic() < deadline, self.counts
            time.sleep(0.5)

    def close(self) -> None:
        self._over.set()

    def submit(self, *command: str, name: str, wait: bool = True, **environment: str) -> Submitted:
        options = ["--submission-id", name, *([] if wait else ["--no-wait"]), "--working-dir", "."]
        if environment:
            options.append(f"--runtime-env-json={json.dumps({'env_vars': environment})}")
        return self.job("submit", *options, "--", "python", "-m", *command)

    def job(self, what: str, *arguments: str) -> Submitted:
        return _ray("job", what, "--address", self.address, *arguments)

    def until(self, name: str, true: Callable[[], Any]) -> None:
        """Wait until something is so while a job runs."""
        deadline = time.monotonic() + _START_S
        while not true():
            assert time.monotonic() < deadline, self.job("logs", name).stdout
            assert "FAILED" not in self.job("status", name).stdout, self.job("logs", name).stdout
            time.sleep(0.5)


def _ray(*arguments: str) -> Submitted:
    ray = str(Path(sys.executable).with_name("ray"))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DS_", "PYTHONPATH"))}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return subprocess.run(
        [ray, *arguments],
        cwd=ROOT,
        env={**kept, **_AUTHENTICATION, "PATH": path},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def autoscaling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    ports = []
    for _ in range(2):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            ports.append(one.getsockname()[1])
    module = launcher()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in _AUTHENTICATION.items():
            environment.setenv(name, value)
        with module.autoscaling_cluster(*ports, tmp_path_factory.mktemp("head") / "log") as address:
            cluster = Cluster(address, module)
            try:
                yield cluster
            finally:
                cluster.close()
                print(f"\nnodes over time (s, nodes): {cluster.counts}")


def result_of(submitted: Submitted) -> dict[str, Any]:
    (line,) = [line for line in submitted.stdout.splitlines() if line.startswith('{"')]
    return json.loads(line)


def test_a_run_brings_its_nodes_and_idle_ones_go(autoscaling: Cluster, tiny_corpus: Corpus, tmp_path: Path) -> None:
    arguments = tiny_arguments(tiny_corpus, tmp_path, "scaled")
    done = autoscaling.submit("mowe_ray.train", *arguments, "training.max_steps=4", name="scaled")
    assert done.returncode == 0, done.stdout + done.stderr
    result = result_of(done)
    assert result["steps"] == 4
    assert "waiting for its autoscaler" in done.stdout + done.stderr
    assert "step 4/4" in done.stdout + done.stderr
    autoscaling.wait_until_idle()
    counts = [count for _, count in autoscaling.counts]
    print(f"\nnodes over time (s, nodes): {autoscaling.counts}")
    assert counts[0] == counts[-1] == 0
    assert 1 <= max(counts) <= yaml.safe_load((ROOT / "cluster" / "local-autoscaling.yaml").read_text())["max_workers"]


@pytest.mark.soak
def test_a_stopped_job_leaves_a_checkpoint_that_the_same_submit_continues(
    autoscaling: Cluster, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    command = ["mowe_ray.train", *tiny_arguments(tiny_corpus, tmp_path, "stopped"), "training.max_steps=400"]
    autoscaling.submit(*command, name="first", wait=False)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    autoscaling.until("first", lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    autoscaling.job("stop", "first")
    said = autoscaling.job("logs", "first").stdout
    (step,) = (int(path.name.partition("-")[2]) for path in (tmp_path / "stopped" / "checkpoints").glob("step-*"))
    assert f'"stopped_at_step": {step}' in said
    assert 3 <= step < 400
    again = autoscaling.submit(*command[:-1], f"training.max_steps={step + 2}", name="second")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"continuing after step {step}" in again.stdout + again.stderr
    assert result_of(again)["steps"] == step + 2


@pytest.mark.soak
def test_nodes_may_take_longer_than_ray_train_waits(autoscaling: Cluster, tiny_corpus: Corpus, tmp_path: Path) -> None:
    autoscaling.wait_until_idle()
    done = autoscaling.submit(
        *("mowe_ray.train", *tiny_arguments(tiny_corpus, tmp_path, "slow"), "training.max_steps=2"),
        *("compute.num_workers=2",),
        name="slow",
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert result_of(done)["steps"] == 2


@pytest.mark.soak
def test_a_job_that_waits_for_nodes_can_be_stopped(autoscaling: Cluster, tiny_corpus: Corpus, tmp_path: Path) -> None:
    arguments = tiny_arguments(tiny_corpus, tmp_path, "waits")
    asked = ("training.max_steps=2", "compute.num_workers=20")
    autoscaling.submit("mowe_ray.train", *arguments, *asked, name="waits", wait=False)
    autoscaling.until("waits", lambda: "waiting for its autoscaler" in autoscaling.job("logs", "waits").stdout)
    time.sleep(10)  # the shards are indexed, and Ray Train asks for its workers
    began = time.monotonic()
    autoscaling.job("stop", "waits")
    print(f"\nstopped in {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 45, "it was killed"
    assert '"stopped_at_step": 0' in autoscaling.job("logs", "waits").stdout


@pytest.mark.soak
def test_a_study_runs_on_nodes_that_come_with_it(autoscaling: Cluster, tiny_corpus: Corpus, tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path, tiny_corpus, space={"model.router.top_k": {"grid": [1, 2]}}, set={"training.max_steps": 3}
    )
    done = autoscaling.submit("mowe_ray.sweep", str(sweep), name="study")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result_of(done)["trials"]["finished"] == 2
    actors = list_actors(autoscaling.address, detail=True, limit=1000)
    elsewhere = [actor.class_name for actor in actors if actor.node_id != launcher().HEAD]
    assert elsewhere == ["RayTrainWorker"] * 2, "the drivers of trials, which must not be lost, are on the head"
    autoscaling.wait_until_idle()
    print(f"\nnodes over time (s, nodes): {autoscaling.counts}")
