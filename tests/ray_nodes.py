"""A Ray cluster of several nodes on this machine, each a `ray start` of its own, to lose and to gain nodes."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_RAY = str(Path(sys.executable).with_name("ray"))
_START_S = 120


class Nodes:
    """A head without CPUs, and the worker nodes that come and go.

    Attributes:
        address: For RAY_ADDRESS.
    """

    def __init__(self, folder: str, environment: dict[str, str]):
        gcs, dashboard, agent, client = free_ports(4)
        self._environment = environment
        self.address, self._folder = f"127.0.0.1:{gcs}", folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ids: dict[int, str] = {}
        self._start(
            *("--head", "--num-cpus=0", f"--temp-dir={folder}", f"--port={gcs}", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        )

    def add(self, cpus: int, *options: str, inside: Sequence[str] = (), **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker node, with more options of `ray start`, inside another command, in another environment."""
        (agent,) = free_ports(1)
        own = (f"--address={self.address}", f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={agent}")
        return self._start(*own, *options, inside=inside, **environment)

    def lose(self, node: subprocess.Popen[bytes]) -> None:
        """Kill all processes of a node at once, as a power cut does."""
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        node.wait()

    def announce_loss(self, node: subprocess.Popen[bytes], seconds: int) -> None:
        """Give notice that a node will be taken away, as clouds do for spot machines."""
        command = [_RAY, "drain-node", f"--address={self.address}", f"--node-id={self._ids[node.pid]}"]
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        notice = [*command, *reason, f"--deadline-remaining-seconds={seconds}"]
        subprocess.run(notice, check=True, capture_output=True, timeout=60)

    def stop(self) -> None:
        """End all nodes that are left."""
        for process in reversed(self._processes):
            if process.poll() is None:
                self.lose(process)

    def _start(self, *options: str, inside: Sequence[str] = (), **environment: str) -> subprocess.Popen[bytes]:
        node_id = secrets.token_hex(28)  # chosen here, for `ray start` does not tell
        ports = ("--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=200000000")
        kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        said = Path(self._folder, f"node-{len(self._processes)}.log")
        with said.open("w") as log:
            process = subprocess.Popen(
                [*inside, _RAY, "start", "--block", "--disable-usage-stats", *options, *ports],
                env={**kept, **self._environment, **environment, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        self._ids[process.pid] = node_id
        deadline = time.monotonic() + _START_S
        while "This command will now block" not in said.read_text():
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)
        return process


@contextmanager
def ray_nodes(**environment: str) -> Iterator[Nodes]:
    """Start a head, in this environment, and end all its nodes afterwards; no other Ray is touched."""
    folder = tempfile.mkdtemp(prefix="mowe_ray_", dir="/tmp")  # short: socket paths hold 107 characters
    nodes = Nodes(folder, environment)
    try:
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


def shell(**environment: str) -> dict[str, str]:
    """Return the environment of somebody who has the dependencies, but knows nothing of this process's Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DS_", "PYTHONPATH"))}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", **environment}


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
