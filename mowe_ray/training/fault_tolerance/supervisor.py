"""Runs a command in a child process, and restarts it when it is killed.

The driver of a run may be killed (out of memory, a lost head node, an operator's mistake). Its checkpoints are on
storage, so the same command resumes from them; this process holds no state and runs it again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from mowe_ray.data.child_process import exit_reason
from mowe_ray.training.fault_tolerance.restart_policy import RestartDecision, RestartPolicy

# Set for the child: the file it makes when it ends by itself, whatever its exit code, and the supervisor's number.
_ENDED_FILE, _SUPERVISOR = "MOWE_RAY_ENDED_FILE", "MOWE_RAY_SUPERVISOR"

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that save and end a run; SIGHUP comes when the terminal is closed or the connection drops."""


def supervised() -> bool:
    """Whether this process is the child."""
    return _ENDED_FILE in os.environ


def supervise(
    command: Sequence[str],
    *,
    max_failures: int,
    progress: Callable[[], int],
    log: Callable[[str], None],
    pause_s: float = 5.0,
) -> int:
    """Run `command` until it ends by itself; returns its exit code.

    Signals that ask it to stop are forwarded: the command then saves and ends.

    Args:
        max_failures: Failures without progress that are followed by a restart; then this returns 1.
        progress: Returns a number that grows with progress, such as the newest checkpoint's step.
        log: Shows a line to the user.
        pause_s: Seconds between two starts: a cluster's head may need a while to come back.
    """

    def steps() -> int:
        try:
            return progress()
        except Exception:  # noqa: BLE001 - each storage raises its own; one that is away shows no progress, and the
            return -1  # command that is started again says what is wrong with it

    policy, reached = RestartPolicy(max_failures), steps()
    while True:
        code, ended_by_itself, stopped = _run(command)
        if stopped is not None and code < 0:
            # Before it handles signals itself, Ray's handler prints a stack and aborts it: the stop is what counts.
            return 128 + stopped
        if ended_by_itself or stopped is not None or code == 0:
            # A negative code is the number of the signal that ended the child; shells report 128 + N.
            return code if code >= 0 else 128 - code
        now = steps()
        policy, reached = policy.after_failure(progressed=now > reached), max(now, reached)
        died = f"the driver died ({exit_reason(code)})"
        if policy.decision is RestartDecision.GIVE_UP:
            log(f"error: {died} {policy.failures} times without a new checkpoint: giving up")
            return 1
        log(f"warning: {died}: starting it again ({policy.failures} of {max_failures} without progress)")
        time.sleep(pause_s)


@contextmanager
def stop_signals_handled(
    handler: Callable[[int], object], signals: Sequence[signal.Signals] = STOP_SIGNALS
) -> Iterator[None]:
    """Call `handler` with the number of each of the signals inside; a SIGHUP ignored by `nohup` stays ignored."""

    def handle(number: int, _frame: FrameType | None) -> None:
        handler(number)

    before = {
        number: signal.signal(number, handle)
        for number in signals
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _run(command: Sequence[str]) -> tuple[int, bool, int | None]:
    """Run the command once; returns its exit code, whether it ended by itself, and the signal that asked it to stop."""
    stopped: int | None = None
    with tempfile.TemporaryDirectory(prefix="mowe_ray_supervisor_") as folder:
        ended = Path(folder, "ended")
        environment = {**os.environ, _ENDED_FILE: str(ended), _SUPERVISOR: str(os.getpid())}
        # A session of its own: a Ctrl-C or a closed terminal reaches it once, through us.
        child = subprocess.Popen(command, env=environment, start_new_session=True)

        def forward(number: int) -> None:
            nonlocal stopped
            stopped = number
            child.send_signal(number)

        with stop_signals_handled(forward):
            code = child.wait()
        return code, ended.exists(), stopped


def run_child(main: Callable[[TextIO], int]) -> int:
    """Run `main` as the supervised child; returns its exit code.

    Args:
        main: Gets the stream for its result. What others print to stdout goes to stderr: Ray's own threads print until
            the process ends, and the result is to be the last line on stdout.
    """
    end_with_parent()
    out, sys.stdout = sys.stdout, sys.stderr
    return mark_ended(main(out))


def mark_ended(code: int) -> int:
    """Mark for the supervisor that this process ends by itself; returns `code`."""
    Path(os.environ[_ENDED_FILE]).touch()
    return code


def end_with_parent() -> None:
    """Stop this process, as by SIGTERM, when its supervisor is killed: its result would be lost."""
    supervisor = int(os.environ[_SUPERVISOR])  # not getppid: it may have been killed before this process came here

    def watch() -> None:
        # A process whose parent dies gets another one. Polled: Python has no portable notice of it.
        while os.getppid() == supervisor:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)  # before the line, which may block: the terminal may have gone as well
        sys.stderr.write("the supervisor is gone: stopping\n")

    threading.Thread(target=watch, daemon=True, name="supervisor").start()
