"""Tracks the activity of a training process, and detects steps that exceed their time limit.

The main thread of a rank that hangs waits in a collective, a read or a kernel. So another thread times every step, and
reports where the main thread is when the time is up.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

WAITING_FOR_DATA = "waiting for data"


class ActivityTracker:
    """Tracks the activity of the main thread: the phase of the step, and the part of the model that runs.

    Attributes:
        activity: In words; read by other threads.
    """

    def __init__(self) -> None:
        """Start with `starting`."""
        self.activity = "starting"
        self._waits_since: float | None = None

    @property
    def waited_s(self) -> float:
        """Seconds for which the main thread has been waiting for data; 0 if it does anything else."""
        since = self._waits_since
        return 0.0 if since is None else time.monotonic() - since

    def waiting_for_data(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`; the activity is to wait for data while the next one is not there."""
        iterator = iter(items)
        while True:
            with self.during(WAITING_FOR_DATA):
                self._waits_since = time.monotonic()
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                finally:
                    self._waits_since = None
            yield item

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Set the activity inside the block, and restore the previous one after it."""
        before, self.activity = self.activity, activity
        try:
            yield
        finally:
            self.activity = before

    def track_modules(self, modules: dict[str, nn.Module]) -> None:
        """Add the name of the module whose forward runs, also when checkpointed activations are recomputed."""
        for name, module in modules.items():
            stack: list[str] = []

            def enter(_module: nn.Module, _inputs: Any, name: str = name, stack: list[str] = stack) -> None:
                stack.append(self.activity)
                # Replaces the outer module's name: the innermost is the most specific.
                self.activity = f"{self.activity.partition(' in ')[0]} in {name}"

            def leave(_module: nn.Module, _inputs: Any, _output: Any, stack: list[str] = stack) -> None:
                self.activity = stack.pop()

            module.register_forward_pre_hook(enter)
            # Also on the way out of an error: recomputation ends by one as soon as it has what it needs.
            module.register_forward_hook(leave, always_call=True)


@dataclass(frozen=True)
class Hang:
    """A step, or a part of a validation, that takes too long.

    Attributes:
        step: The step that is under way, counted from 1, or that was the last before the validation.
        what: What is timed, in words.
        seconds: How long it has taken so far.
        activity: What the main thread is doing, by `ActivityTracker`; `line` is its innermost line of code.
        stacks: Stack of every Python thread.
    """

    step: int
    what: str
    seconds: float
    activity: str
    line: str
    stacks: str


class Watchdog:
    """Calls `on_hang` once, in its own thread, when what is timed takes longer than `timeout_s`."""

    def __init__(self, activity: ActivityTracker, timeout_s: float, on_hang: Callable[[Hang], None]):
        """Start the thread; nothing is timed before the first `begin`."""
        self._activity, self._timeout_s, self._on_hang = activity, timeout_s, on_hang
        # The thread that trains: its stack is what a report is about.
        self._main = threading.get_ident()
        self._changed = threading.Condition()
        self._step, self._what, self._closed = 0, "", False
        self._began: float | None = None
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def begin(self, step: int, what: str | None = None) -> None:
        """Start to time `step`, or `what` comes after it; this ends what was timed before."""
        self._set(step, what or f"step {step}", time.monotonic())

    def pause(self) -> None:
        """Stop timing: what follows may take long (an export)."""
        self._set(self._step, self._what, None)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _set(self, step: int, what: str, began: float | None) -> None:
        with self._changed:
            self._step, self._what, self._began = step, what, began
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = None if self._began is None else self._began + self._timeout_s - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            if self._closed:
                return
            assert self._began is not None
            step, what, seconds = self._step, self._what, time.monotonic() - self._began
        # Outside the lock: the main thread must be able to go on to its next `begin`.
        self._on_hang(Hang(step, what, seconds, self._activity.activity, _innermost(self._main), stacks()))


def stacks() -> str:
    """Return the stack of every Python thread of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, 'unknown')} ({ident}):\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


def _innermost(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "the thread has ended"
    last = traceback.extract_stack(frame)[-1]
    return f"{last.name} ({last.filename}:{last.lineno})"
