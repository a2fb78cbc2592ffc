"""A training command in processes of its own, to watch and to harm: kill its workers, its driver, its controller.

Only processes below the command, or of the cluster a test started itself, are ever touched.
"""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from tests.end_to_end import ROOT, Finished
from tests.tiny_runs import Corpus, tiny_arguments

POLL_S = 0.05


class RunningCommand:
    """`python -m mowe_ray.train` on a tiny model, running.

    Attributes:
        run: Folder of the run.
        scratch: What it writes to its streams.
    """

    def __init__(self, corpus: Corpus, storage: Path, name: str, *overrides: str, **environment: str):
        """Start it; `environment` comes on top of this process's own."""
        self._start("mowe_ray.train", [*tiny_arguments(corpus, storage, name), *overrides], storage / name, environment)

    def _start(self, module: str, arguments: list[str], run: Path, environment: dict[str, str]) -> None:
        self.run, self._module = run, module
        self.scratch = Path(tempfile.mkdtemp(prefix="mowe_ray_command_"))  # not in the storage, whose disk may be full
        self._streams = [self.scratch / name for name in ("out", "err")]
        command = [sys.executable, "-m", module, *arguments]
        kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.process = self._open(command, {**kept, **environment})

    def _open(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with self._streams[0].open("w") as out, self._streams[1].open("w") as err:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)

    @property
    def said(self) -> str:
        """What it has written to stderr so far."""
        return self._streams[1].read_text()

    def wait(self, timeout_s: float = 400) -> Finished:
        """Wait until it ends."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"has not ended in {timeout_s} s:\n{self.said}") from None
        return Finished(code, self._streams[0].read_text(), self.said)

    def until(self, true: Callable[[], Any], what: str, timeout_s: float = 240) -> Any:
        """Wait until `true` is so while the command runs; returns what it returned."""
        deadline = time.monotonic() + timeout_s
        while not (found := true()):
            assert self.process.poll() is None, f"ended before {what}:\n{self.said}"
            assert time.monotonic() < deadline, f"no {what} in {timeout_s} s:\n{self.said}"
            time.sleep(POLL_S)
        return found

    def until_step(self, step: int) -> None:
        """Wait until `step` is trained and logged."""
        self.until(lambda: self.step() >= step, f"step {step}")

    def step(self) -> int:
        """The last step in the metrics; 0 before the first."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        return max((json.loads(line)["step"] for line in lines if '"train"' in line), default=0)

    def checkpoints(self) -> list[int]:
        """Steps of the whole checkpoints."""
        return sorted(int(file.parent.name[5:]) for file in self.run.glob("checkpoints/step-*/checkpoint.json"))

    def driver(self) -> psutil.Process:
        """The process that the command supervises."""

        def find() -> psutil.Process | None:
            below = psutil.Process(self.process.pid).children()
            return next((p for p in below if self._module in " ".join(_cmdline(p))), None)

        return self.until(find, "driver")

    def actors(self, name: str, below: int | None = None) -> list[psutil.Process]:
        """The Ray processes below the command (or another process) whose title begins with `ray::NAME`, by pid."""
        found = [p for p in _descendants(below or self.process.pid) if _title(p).startswith(f"ray::{name}")]
        return sorted(found, key=lambda p: p.pid)

    def processes(self) -> dict[psutil.Process, str]:
        """All processes below the command, with their titles."""
        return {process: _title(process) for process in _descendants(self.process.pid)}

    def workers(self, count: int = 1, below: int | None = None) -> list[psutil.Process]:
        """The training processes, once there are `count`."""
        return self.until(
            lambda: found if len(found := self.actors("RayTrainWorker", below)) >= count else None, f"{count} workers"
        )


class CommandOnTerminal(RunningCommand):
    """The same on a terminal of its own, which takes both streams and may be closed."""

    def _open(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        self._terminal, end = pty.openpty()
        self._closing = threading.Event()
        self._streams[1].touch()
        # setsid without a fork: the command leads the session of the terminal, as the only program in a window.
        process = subprocess.Popen(
            ["setsid", "--ctty", *command], cwd=ROOT, env=environment, stdin=end, stdout=end, stderr=end
        )
        os.close(end)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return process

    def _read(self) -> None:
        with self._streams[1].open("ab", buffering=0) as said, suppress(OSError):  # EIO: nobody writes any longer
            while not self._closing.is_set():
                if select.select([self._terminal], [], [], POLL_S)[0]:
                    said.write(os.read(self._terminal, 1 << 16))

    def close_terminal(self) -> None:
        """Close the window: the command gets SIGHUP, and whoever writes there an error."""
        self._closing.set()
        self._reader.join()
        os.close(self._terminal)


class RunningSweep(RunningCommand):
    """`python -m mowe_ray.sweep`, running; `run` is the study's folder."""

    def __init__(self, sweep: Path, study: Path, *overrides: str, **environment: str):
        """Start it; `environment` comes on top of this process's own."""
        self._start("mowe_ray.sweep", [str(sweep), *overrides], study, environment)


@contextmanager
def ended(command: RunningCommand) -> Iterator[RunningCommand]:
    """End the command and all it started, whatever happened."""
    below: list[psutil.Process] = []
    try:
        yield command
    finally:
        if command.process.poll() is None:
            below = _descendants(command.process.pid)
            command.process.kill()
        for process in below:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        command.process.wait()
        shutil.rmtree(command.scratch)


def fill(ballast: Path) -> None:
    """Fill the disk of `ballast`."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    return " ".join(_cmdline(process))


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
