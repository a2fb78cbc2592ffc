"""`ray job submit --working-dir . -- python -m mowe_ray.train` on a cluster that knows nothing of this package."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.end_to_end import ROOT, write_tones
from tests.ray_nodes import free_ports, shell
from tests.tiny_runs import TINY

pytestmark = pytest.mark.slow

_RAY = str(Path(sys.executable).with_name("ray"))
_START_TIMEOUT_S = 120
# As on a shared cluster: whoever lacks the token is turned away, the job's own processes included.
_AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

# Written at import: which process took the code from which file.
_WITNESS = """
import os as _os, pathlib as _pathlib
_pathlib.Path({folder!r}, f"{{_os.getpid()}}-{{__name__}}").write_text(__file__)
"""


def _environment(**changes):
    return shell(**_AUTHENTICATION, RAY_USAGE_STATS_ENABLED="0", **changes)


@pytest.fixture(scope="module")
def dashboard():
    """URL of a cluster's dashboard, started as its own process group; nothing of another Ray is touched."""
    gcs, http, agent, client = free_ports(4)
    folder = tempfile.mkdtemp(prefix="mowe_ray_", dir="/tmp")  # short: socket paths hold 107 characters
    command = [
        *(_RAY, "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={folder}", f"--port={gcs}"),
        *(f"--dashboard-port={http}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        *("--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=300000000"),
    ]
    environment = _environment(RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0")  # do not wait for idle workers at the end
    with Path(folder, "start.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(http, head, Path(folder, "start.log"))
        yield f"http://127.0.0.1:{http}"
    finally:
        head.terminate()  # it ends its own Ray processes
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port, process, log):
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"no dashboard after {_START_TIMEOUT_S} s: {log.read_text()}")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a checkout uploads, whose driver and worker leave a witness each, and the witnesses' folder."""
    copy, witnesses = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("witnesses")
    shutil.copytree(ROOT / "mowe_ray", copy / "mowe_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for module in ("driver.py", "worker.py"):
        path = copy / "mowe_ray" / "distributed" / "ray_train" / module
        assert path.exists()
        with path.open("a") as file:
            file.write(_WITNESS.format(folder=str(witnesses)))
    return copy, witnesses


def _job(dashboard, *arguments, cwd):
    return subprocess.run(
        [_RAY, "job", arguments[0], "--address", dashboard, *arguments[1:]],
        cwd=cwd,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )


def test_a_submitted_job_trains_with_the_uploaded_code(dashboard, checkout, tmp_path):
    copy, witnesses = checkout
    train = write_tones(tmp_path / "train", 16)
    validation = write_tones(tmp_path / "validation", 4, first=16)

    submitted = _job(
        dashboard,
        *("submit", "--working-dir", ".", "--submission-id", "mowe", "--", "python", "-m", "mowe_ray.train"),
        *TINY,
        *("name=job", f"storage={tmp_path / 'runs'}", "training.max_steps=3", "training.epochs=null"),
        *(f"data.train=[{{path: {train}}}]", f"data.validation=[{{path: {validation}}}]"),
        cwd=copy,
    )

    logs = _job(dashboard, "logs", "mowe", cwd=copy)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    result = json.loads(logs.stdout.splitlines()[-1])
    run = tmp_path / "runs" / "job"
    assert (result["run"], result["steps"]) == (str(run), 3)
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
    assert {Path(source).name for source in sources} == {"driver.py", "worker.py"}
    assert all("working_dir_files" in source for source in sources), sources


def test_a_job_with_a_wrong_key_fails(dashboard, checkout, tmp_path):
    copy, _ = checkout
    submitted = _job(
        dashboard,
        *("submit", "--working-dir", ".", "--submission-id", "wrong", "--", "python", "-m", "mowe_ray.train"),
        "training.max_step=3",
        cwd=copy,
    )
    assert submitted.returncode == 1
    assert "training.max_steps" in submitted.stdout + submitted.stderr
