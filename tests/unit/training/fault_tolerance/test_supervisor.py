"""The supervisor over real child processes that really die."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from mowe_ray.training.fault_tolerance.supervisor import supervise

# A command that writes down each start, and ends as the test says.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from mowe_ray.training.fault_tolerance.supervisor import mark_ended, end_with_parent
starts = Path({folder!r}, "starts")
with starts.open("a") as file:
    file.write(f"{{os.getpid()}}\\n")
turn = len(starts.read_text().splitlines())
{body}
"""


@pytest.fixture
def child(tmp_path):
    """Make a command of Python lines; `turn` counts its starts."""

    def make(body: str) -> list[str]:
        return [sys.executable, "-c", CHILD.format(folder=str(tmp_path), body=textwrap.dedent(body))]

    return make


def starts(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "starts").read_text().splitlines()]


def watch(command: list[str], *, max_failures: int = 3, progress=lambda: 0) -> tuple[int, list[str]]:
    said: list[str] = []
    return supervise(command, max_failures=max_failures, progress=progress, log=said.append, pause_s=0.0), said


def test_a_killed_command_is_started_again_until_it_answers(child, tmp_path):
    code, said = watch(child("if turn < 3: os.kill(os.getpid(), signal.SIGKILL)\nsys.exit(mark_ended(0))"))
    assert code == 0
    assert len(starts(tmp_path)) == 3
    assert all("SIGKILL" in line for line in said)
    assert len(said) == 2


@pytest.mark.parametrize("code", [1, 2])
def test_a_command_that_says_it_failed_is_not_started_again(child, tmp_path, code):
    assert watch(child(f"sys.exit(mark_ended({code}))")) == (code, [])
    assert len(starts(tmp_path)) == 1


def test_an_exit_without_an_answer_is_a_death(child, tmp_path):
    code, said = watch(
        child("sys.exit(mark_ended(0) if turn == 2 else 1)")
    )  # as when Ray ends a driver that lost its head
    assert (code, len(starts(tmp_path))) == (0, 2)
    assert "exit code 1" in said[0]


def test_it_gives_up_when_nothing_moves(child, tmp_path):
    code, said = watch(child("os.kill(os.getpid(), signal.SIGKILL)"), max_failures=2)
    assert code == 1
    assert len(starts(tmp_path)) == 3
    assert "giving up" in said[-1]


@pytest.mark.slow
def test_progress_between_deaths_starts_the_count_anew(child, tmp_path):
    body = "if turn < 6: os.kill(os.getpid(), signal.SIGKILL)\nsys.exit(mark_ended(0))"
    code, _ = watch(
        child(body), max_failures=1, progress=lambda: len(starts(tmp_path)) if starts_exist(tmp_path) else 0
    )
    assert (code, len(starts(tmp_path))) == (0, 6)


def test_a_storage_that_is_away_is_no_progress_and_no_crash(child, tmp_path):
    def progress() -> int:
        raise ConnectionError("the storage does not answer")

    code, said = watch(child("os.kill(os.getpid(), signal.SIGKILL)"), max_failures=1, progress=progress)
    assert (code, len(starts(tmp_path))) == (1, 2)
    assert "giving up" in said[-1]


def starts_exist(folder: Path) -> bool:
    return (folder / "starts").exists()


SUPERVISING = """
import sys
from mowe_ray.output.terminal import outlive_terminal
from mowe_ray.training.fault_tolerance.supervisor import supervise
outlive_terminal()
sys.exit(supervise({command!r}, max_failures=3, progress=lambda: 0, log=lambda line: print(line, file=sys.stderr)))
"""


class Terminal:
    """A terminal of its own for a process."""

    def __init__(self, command: list[str]):
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.execv(command[0], command)

    def close(self) -> None:
        """Close the window: who reads and writes there gets an error, and the process SIGHUP."""
        os.close(self._end)


@pytest.fixture
def supervising(child, tmp_path):
    """Start a supervisor in a process of its own, on a terminal if need be, and wait until its command runs."""
    running: list[int] = []

    def start(body: str, *, terminal: bool = False, before: Sequence[str] = ()):
        command = [*before, sys.executable, "-c", SUPERVISING.format(command=child(body))]
        process = Terminal(command) if terminal else subprocess.Popen(command)
        running.append(process.pid)
        wait_until((tmp_path / "ready").exists)
        return process

    yield start
    for pid in running + (starts(tmp_path) if starts_exist(tmp_path) else []):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


WAITING = """
from mowe_ray.output.terminal import outlive_terminal
from mowe_ray.training.fault_tolerance.supervisor import stop_signals_handled
outlive_terminal()
def stop(number):
    print("stopping", file=sys.stderr)
    Path({folder!r}, "stopped").write_text(str(number))
    sys.exit(mark_ended(128 + number))
with stop_signals_handled(stop):
    end_with_parent()
    Path({folder!r}, "ready").touch()
    while True:
        time.sleep(0.1)
        print("a step", file=sys.stderr)
        Path({folder!r}, "step").touch()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_handed_on_and_end_it(supervising, tmp_path, number):
    process = supervising(WAITING.format(folder=str(tmp_path)))
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert (tmp_path / "stopped").read_text() == str(int(number))
    assert len(starts(tmp_path)) == 1


@pytest.mark.slow
def test_a_command_ends_when_its_supervisor_is_killed(supervising, tmp_path):
    process = supervising(WAITING.format(folder=str(tmp_path)))
    process.kill()
    (pid,) = starts(tmp_path)
    wait_until((tmp_path / "stopped").exists)
    wait_until(lambda: has_ended(pid))


@pytest.mark.slow
def test_a_command_whose_supervisor_was_killed_before_it_looked_ends_as_well(supervising, tmp_path):
    """Importing its libraries takes seconds: time enough for a terminal to be closed."""
    slow = WAITING.format(folder=str(tmp_path)).replace("    end_with_parent()", SLOW.format(folder=str(tmp_path)))
    process = supervising(slow)
    process.kill()
    process.wait()
    (tmp_path / "go").touch()
    wait_until((tmp_path / "stopped").exists)


SLOW = """
    Path({folder!r}, "ready").touch()
    while not Path({folder!r}, "go").exists():
        time.sleep(0.05)
    end_with_parent()
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_closed_terminal_saves_and_ends_the_command(supervising, tmp_path, killed):
    """Killed: as by a desktop session that ends everything; nobody is left to hand the signal on."""
    terminal = supervising(WAITING.format(folder=str(tmp_path)), terminal=True)
    if killed:
        os.kill(terminal.pid, signal.SIGKILL)
    terminal.close()
    wait_until((tmp_path / "stopped").exists)
    assert (tmp_path / "stopped").read_text() == str(int(signal.SIGTERM if killed else signal.SIGHUP))
    (pid,) = starts(tmp_path)
    wait_until(lambda: has_ended(pid))
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == (-9 if killed else 129)


@pytest.mark.slow
def test_a_closed_terminal_is_nothing_to_a_command_under_nohup(supervising, tmp_path):
    nohup = ["/bin/sh", "-c", 'trap "" HUP; exec "$@"', "nohup"]  # the real one also writes a file into this folder
    terminal = supervising(WAITING.format(folder=str(tmp_path)), terminal=True, before=nohup)
    terminal.close()
    time.sleep(1)
    (tmp_path / "step").unlink()
    wait_until((tmp_path / "step").exists)
    assert not (tmp_path / "stopped").exists()
