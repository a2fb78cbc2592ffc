"""Keep a command alive: run it in a child process, and start it again when that dies without an answer.

The driver of a run may be killed (out of memory, a lost head node, an operator's mistake). Its checkpoints are
on storage, so the same command goes on from there; this process, which holds nothing, types it again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

# Set for the child: the file it makes when it ends by itself, whatever its exit code.
_ANSWER = "MOWE_RAY_ANSWER_FILE"


def supervised() -> bool:
    """Whether this process is the child."""
    return _ANSWER in os.environ


def supervise(
    command: Sequence[str],
    *,
    max_failures: int,
    progress: Callable[[], int],
    say: Callable[[str], None],
    pause_s: float = 5.0,
) -> int:
    """Run `command` until it ends by itself; returns its exit code.

    SIGTERM and SIGINT are handed on: the command then saves and ends.

    Args:
        max_failures: Deaths without progress in between after which this gives up and returns 1.
        progress: A number that has grown when the command got somewhere, such as its newest checkpoint.
        say: Shows a line to the person who waits.
        pause_s: Wait between two starts: a cluster's head may need a while to come back.
    """
    failures, reached = 0, progress()
    while True:
        code, answered, stopped = _run(command)
        if answered or stopped or code == 0:
            return code if code >= 0 else 128 - code
        now = progress()
        failures, reached = (1, now) if now > reached else (failures + 1, reached)
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if failures > max_failures:
            say(f"error: the driver died ({cause}) {failures} times without a new checkpoint: giving up")
            return 1
        say(f"warning: the driver died ({cause}): starting it again ({failures} of {max_failures} without progress)")
        time.sleep(pause_s)


def _run(command: Sequence[str]) -> tuple[int, bool, bool]:
    """Run the command once; returns its exit code, whether it ended by itself, and whether it was told to stop."""
    stopped = False
    with tempfile.TemporaryDirectory(prefix="mowe_ray_supervisor_") as folder:
        answer = Path(folder, "answer")
        # A session of its own: a Ctrl-C reaches it once, through us.
        child = subprocess.Popen(command, env={**os.environ, _ANSWER: str(answer)}, start_new_session=True)

        def hand_on(number: int, _frame: FrameType | None) -> None:
            nonlocal stopped
            stopped = True
            child.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return code, answer.exists(), stopped


def run_child(main: Callable[[TextIO], int]) -> int:
    """Run `main` as the supervised child; returns its exit code.

    Args:
        main: Gets the stream for its result. What others print to stdout goes to stderr: Ray's own threads print until
            the process ends, and the result is to be the last line on stdout.
    """
    end_with_parent()
    out, sys.stdout = sys.stdout, sys.stderr
    return answer(main(out))


def answer(code: int) -> int:
    """Tell the supervisor that this process ends by itself; returns `code`."""
    Path(os.environ[_ANSWER]).touch()
    return code


def end_with_parent() -> None:
    """Stop this process, as by SIGTERM, when its supervisor is killed: nobody would hear its answer."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        sys.stderr.write("the supervisor is gone: stopping\n")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="supervisor").start()
