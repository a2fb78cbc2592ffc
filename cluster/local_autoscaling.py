"""Try autoscaling on one machine: a head without CPUs, and Ray's own autoscaler, which starts processes as nodes.

    python cluster/local_autoscaling.py [--port 6397] [--dashboard-port 8266]

Prints how to submit to it, and how many nodes there are whenever that changes. Ctrl-C stops what it has started, and
nothing else: Ray's own helper for this ends with `ray stop --force`, which ends every Ray process on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import yaml
from ray.job_submission import JobSubmissionClient
from ray.util import get_node_ip_address
from ray.util.state import list_nodes

CONFIG = Path(__file__).with_name("local-autoscaling.yaml")
# The head has the id that its autoscaler knows it by.
HEAD = "f" * 51 + "00000"
_START_S = 180.0


@contextmanager
def autoscaling_cluster(port: int, dashboard_port: int, log: Path) -> Iterator[str]:
    """Run the cluster; yields the address for `ray job submit`.

    Args:
        port: Of the head.
        dashboard_port: Of dashboard and job server.
        log: File that takes what Ray prints.

    Raises:
        RuntimeError: It does not start; the message says why.
    """
    for number, option in ((port, "--port"), (dashboard_port, "--dashboard-port")):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", number)) == 0:
                raise RuntimeError(f"port {number} is in use, perhaps by another Ray: choose a free one with {option}")
    folder = Path(tempfile.mkdtemp(prefix="mowe_as_"))  # short: socket paths end at 107 characters
    config = yaml.safe_load(CONFIG.read_text())
    config["provider"] |= {"gcs_address": f"{get_node_ip_address()}:{port}", "head_node_id": HEAD}
    (folder / "autoscaler.json").write_text(json.dumps(config))
    command = ["ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=0"]
    command += ["--include-dashboard=true", f"--dashboard-port={dashboard_port}", f"--temp-dir={folder / 'ray'}"]
    command += ["--object-store-memory=268435456", f"--autoscaling-config={folder / 'autoscaler.json'}"]
    settings = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    settings |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    settings["RAY_JOB_STOP_WAIT_TIME_S"] = "60"  # as in a cloud, for the last checkpoint
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | settings
    environment["PYTHONPATH"] = os.pathsep.join([str(CONFIG.parent), *filter(None, [environment.get("PYTHONPATH")])])
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    with log.open("w") as out:
        head = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard_port}"
    try:
        _wait(address, head, log)
        yield address
    finally:
        _end(head, folder)
        shutil.rmtree(folder, ignore_errors=True)


def nodes(dashboard: str) -> int:
    """Return how many nodes there are beside the head."""
    return sum(node.state == "ALIVE" and not node.is_head_node for node in list_nodes(dashboard))


def _wait(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the job server takes jobs, which is seconds after the dashboard is there."""
    began = time.monotonic()
    while time.monotonic() - began < _START_S and head.poll() is None:
        try:
            JobSubmissionClient(address).submit_job(entrypoint="true")
        except (OSError, RuntimeError):
            time.sleep(0.5)
        else:
            return
    raise RuntimeError(f"the cluster does not start: {log.read_text()[-2000:]}")


def _end(head: subprocess.Popen[bytes], folder: Path) -> None:
    """End the head, and the nodes, which are no children of it but name its folder."""
    with_folder = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in part for part in process.info["cmdline"] or ())
    ]
    workers = []
    for process in with_folder:
        with suppress(psutil.NoSuchProcess):  # nodes end on their own too
            workers += process.children(recursive=True)
    head.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs([*with_folder, *workers], timeout=5)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=6397)
    parser.add_argument("--dashboard-port", type=int, default=8266)
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # whether or not a parent has chosen to ignore them
        signal.signal(number, signal.default_int_handler)
    with tempfile.NamedTemporaryFile(suffix=".log", prefix="mowe_as_") as log:
        try:
            _show(arguments, Path(log.name))
        except RuntimeError as error:
            sys.exit(f"error: {error}")


def _show(arguments: argparse.Namespace, log: Path) -> None:
    with autoscaling_cluster(arguments.port, arguments.dashboard_port, log) as address:
        print(f"submit: ray job submit --address {address} --working-dir . -- python -m mowe_ray.train ...")
        print("Ctrl-C ends it", flush=True)
        before, began = None, time.monotonic()
        try:
            while True:
                if (now := nodes(address)) != before:
                    print(f"{time.monotonic() - began:6.1f} s  {now} nodes", flush=True)
                    before = now
                time.sleep(1)
        except KeyboardInterrupt:
            print("ending")


if __name__ == "__main__":
    main()
