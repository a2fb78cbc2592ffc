"""`ray job submit --working-dir . -- python -m mowe_ray.train` to a cluster that knows nothing of this package.

Its head has no CPUs: Ray's own autoscaler brings the nodes a run needs, which end once they are idle.
"""

import json
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end import ROOT
from tests.ray_nodes import free_ports, shell
from tests.tiny_runs import Corpus, tiny_arguments
from tests.tiny_sweeps import write_sweep

pytestmark = pytest.mark.slow
# In processes of their own, all of them: Ray keeps the first token that a process reads.
_AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
_GONE_S, _START_S = 90, 180
# Appended to a module, leaves a file that tells which process imported it from where.
_WITNESS = """
import os as _os, pathlib as _pathlib
_pathlib.Path({folder!r}, f"{{_os.getpid()}}-{{__name__}}").write_text(__file__)
"""
_WITNESSES = ("driver.py", "worker.py")

Submitted = subprocess.CompletedProcess[str]


class Cluster:
    """`python cluster/local_autoscaling.py`, running.

    Attributes:
        counts: How many nodes it had, from what second on.
        checkout: The folder that is submitted from.
    """

    def __init__(self, log: Path, checkout: Path):
        ports = [str(port) for port in free_ports(2)]
        self.address, self._log, self.checkout = f"http://127.0.0.1:{ports[1]}", log, checkout
        command = [sys.executable, str(ROOT / "cluster" / "local_autoscaling.py")]
        options = ["--port", ports[0], "--dashboard-port", ports[1]]
        with log.open("w") as out:
            self.process = subprocess.Popen([*command, *options], env=shell(**_AUTHENTICATION), stdout=out, stderr=out)

    @property
    def counts(self) -> list[tuple[float, int]]:
        lines = [line.split() for line in self._log.read_text().splitlines() if line.endswith(" nodes")]
        return [(float(seconds), int(count)) for seconds, _, count, _ in lines]

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + (_GONE_S if self.counts else _START_S)
        while not self.counts or self.counts[-1][1]:
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.5)

    def submit(self, *command: str, name: str, wait: bool = True, **environment: str) -> Submitted:
        options = ["--submission-id", name, *([] if wait else ["--no-wait"]), "--working-dir", "."]
        if environment:
            options.append(f"--runtime-env-json={json.dumps({'env_vars': environment})}")
        return self.job("submit", *options, "--", "python", "-m", *command)

    def job(self, what: str, *arguments: str) -> Submitted:
        return _ray("job", what, "--address", self.address, *arguments, cwd=self.checkout)

    def until(self, name: str, true: Callable[[], Any]) -> None:
        """Wait until something is so while a job runs."""
        deadline = time.monotonic() + _START_S
        while not true():
            assert time.monotonic() < deadline, self.job("logs", name).stdout
            assert "FAILED" not in self.job("status", name).stdout, self.job("logs", name).stdout
            time.sleep(0.5)

    def actors_by_node(self) -> list[tuple[str, str]]:
        """Return the node and the class of all actors there have been."""
        listed = _ray("list", "actors", "--address", self.address, "--detail", "--format=json", "--limit=1000")
        return sorted((actor["node_id"], actor["class_name"]) for actor in json.loads(listed.stdout))

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(60) == 0


def _ray(*arguments: str, cwd: Path = ROOT) -> Submitted:
    command = [str(Path(sys.executable).with_name("ray")), *arguments]
    environment = shell(**_AUTHENTICATION)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def witnesses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the driver and the workers of submitted runs leave the path of their code."""
    return tmp_path_factory.mktemp("witnesses")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, witnesses: Path) -> Path:
    """A copy of what a checkout uploads, with a witness in two of its modules."""
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "mowe_ray", copy / "mowe_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for module in _WITNESSES:
        path = copy / "mowe_ray" / "distributed" / "ray_train" / module
        path.write_text(path.read_text() + _WITNESS.format(folder=str(witnesses)))
    return copy


@pytest.fixture(scope="module")
def autoscaling(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster") / "log", checkout)
    try:
        cluster.wait_until_idle()  # which says that it takes jobs
        yield cluster
    finally:
        cluster.close()
        print(f"\nnodes over time (s, nodes): {cluster.counts}")


def result_of(submitted: Submitted) -> dict[str, Any]:
    (line,) = [line for line in submitted.stdout.splitlines() if line.startswith('{"')]
    return json.loads(line)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def submitted(autoscaling: Cluster, tiny_corpus: Corpus, storage: Path) -> Submitted:
    """A run of four steps."""
    arguments = tiny_arguments(tiny_corpus, storage, "scaled")
    return autoscaling.submit("mowe_ray.train", *arguments, "training.max_steps=4", name="scaled")


def test_a_run_brings_its_nodes_and_idle_ones_go(autoscaling: Cluster, submitted: Submitted) -> None:
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert result_of(submitted)["steps"] == 4
    assert "waiting for its autoscaler" in submitted.stdout + submitted.stderr
    assert "step 4/4" in submitted.stdout + submitted.stderr
    autoscaling.wait_until_idle()
    counts = [count for _, count in autoscaling.counts]
    print(f"\nnodes over time (s, nodes): {autoscaling.counts}")
    assert counts[0] == counts[-1] == 0
    assert 1 <= max(counts) <= yaml.safe_load((ROOT / "cluster" / "local-autoscaling.yaml").read_text())["max_workers"]


def test_it_trains_with_the_uploaded_code(
    autoscaling: Cluster, submitted: Submitted, storage: Path, witnesses: Path
) -> None:
    logs = autoscaling.job("logs", "scaled")
    result = json.loads(logs.stdout.splitlines()[-1])
    run = storage / "scaled"
    assert (result["run"], result["steps"]) == (str(run), 4)
    for name in (
        "config.json",
        "metrics.jsonl",
        "data_report.json",
        "router_report.json",
        "router_report.png",
        "result.json",
        "export/model.safetensors",
        "export/config.json",
    ):
        assert (run / name).stat().st_size > 0, name
    sources = [file.read_text() for file in witnesses.iterdir()]
    assert len({file.name.partition("-")[0] for file in witnesses.iterdir()}) >= 2, "the driver and a training worker"
    assert {Path(source).name for source in sources} == set(_WITNESSES)
    assert all("working_dir_files" in source for source in sources), sources


def test_a_job_with_a_wrong_key_fails(autoscaling: Cluster) -> None:
    done = autoscaling.submit("mowe_ray.train", "training.max_step=3", name="wrong")
    assert done.returncode == 1
    assert "training.max_steps" in done.stdout + done.stderr


@pytest.mark.soak  # a minute or so each; the first one runs by default
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


@pytest.mark.soak  # a minute or so each; the first one runs by default
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


@pytest.mark.soak  # a minute or so each; the first one runs by default
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


@pytest.mark.soak  # a minute or so each; the first one runs by default
def test_a_study_runs_on_nodes_that_come_with_it(autoscaling: Cluster, tiny_corpus: Corpus, tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path, tiny_corpus, space={"model.router.top_k": {"grid": [1, 2]}}, set={"training.max_steps": 3}
    )
    done = autoscaling.submit("mowe_ray.sweep", str(sweep), name="study")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result_of(done)["trials"]["finished"] == 2
    actors = autoscaling.actors_by_node()
    (head,) = {node for node, kind in actors if kind == "JobSupervisor"}
    trials = [node for node, kind in actors if kind.endswith("Trainable")]
    assert trials == [head, head], "the drivers of trials must not be lost"
    assert {node for node, kind in actors if kind in ("RunCoordinator", "TrainController")} == {head}
    assert head not in {node for node, kind in actors if kind == "RayTrainWorker"}
    autoscaling.wait_until_idle()
    print(f"\nnodes over time (s, nodes): {autoscaling.counts}")
