"""The supervisor over real child processes that really die."""

import signal
import subprocess
import sys
import textwrap
import time
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


def test_progress_between_deaths_starts_the_count_anew(child, tmp_path):
    body = "if turn < 6: os.kill(os.getpid(), signal.SIGKILL)\nsys.exit(mark_ended(0))"
    code, _ = watch(
        child(body), max_failures=1, progress=lambda: len(starts(tmp_path)) if starts_exist(tmp_path) else 0
    )
    assert (code, len(starts(tmp_path))) == (0, 6)


def starts_exist(folder: Path) -> bool:
    return (folder / "starts").exists()


SUPERVISING = """
import sys
from mowe_ray.training.fault_tolerance.supervisor import supervise
sys.exit(supervise({command!r}, max_failures=3, progress=lambda: 0, log=lambda line: print(line, file=sys.stderr)))
"""


@pytest.fixture
def supervising(child, tmp_path):
    """Start a supervisor in a process of its own, and wait until its command runs."""
    running: list[subprocess.Popen] = []

    def start(body: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", SUPERVISING.format(command=child(body))])
        running.append(process)
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


WAITING = """
def stop(number, frame):
    Path({folder!r}, "stopped").write_text(str(number))
    sys.exit(mark_ended(128 + number))
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
end_with_parent()
Path({folder!r}, "ready").touch()
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_handed_on_and_end_it(supervising, tmp_path, number):
    process = supervising(WAITING.format(folder=str(tmp_path)))
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert (tmp_path / "stopped").read_text() == str(int(number))
    assert len(starts(tmp_path)) == 1


def test_a_command_ends_when_its_supervisor_is_killed(supervising, tmp_path):
    process = supervising(WAITING.format(folder=str(tmp_path)))
    process.kill()
    deadline = time.monotonic() + 30
    (pid,) = starts(tmp_path)
    while not (tmp_path / "stopped").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
