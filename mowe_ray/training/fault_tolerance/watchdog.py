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


class ActivityTracker:
    """Tracks the activity of the main thread: the phase of the step, and the part of the model that runs.

    Attributes:
        activity: In words; read by other threads.
    """

    def __init__(self) -> None:
        """Start with `starting`."""
        self.activity = "starting"

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Set the activity inside the block, and restore the previous one after it."""
        before, self.activity = self.activity, activity
        try:
            yield
        finally:
            self.activity = before

    def track(self, items: Iterable[T], activity: str) -> Iterator[T]:
        """Yield `items`; waiting for the next one is `activity`."""
        iterator = iter(items)
        while True:
            with self.during(activity):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

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
    """A step that takes too long.

    Attributes:
        step: The step that is under way, counted from 1.
        seconds: How long it has taken so far.
        activity: What the main thread is doing, by `ActivityTracker`; `line` is its innermost line of code.
        stacks: Stack of every Python thread.
    """

    step: int
    seconds: float
    activity: str
    line: str
    stacks: str


class Watchdog:
    """Calls `on_hang` once, in its own thread, when a step takes longer than `timeout_s`."""

    def __init__(self, activity: ActivityTracker, timeout_s: float, on_hang: Callable[[Hang], None]):
        """Start the thread; nothing is timed before the first `begin`."""
        self._activity, self._timeout_s, self._on_hang = activity, timeout_s, on_hang
        # The thread that trains: its stack is what a report is about.
        self._main = threading.get_ident()
        self._changed = threading.Condition()
        self._step, self._closed = 0, False
        self._began: float | None = None
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def begin(self, step: int) -> None:
        """Start to time `step`, which ends the step before."""
        self._set(step, time.monotonic())

    def pause(self) -> None:
        """Stop timing: what follows may take long (validation, export)."""
        self._set(self._step, None)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _set(self, step: int, began: float | None) -> None:
        with self._changed:
            self._step, self._began = step, began
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
            step, seconds = self._step, time.monotonic() - self._began
        # Outside the lock: the main thread must be able to go on to its next `begin`.
        self._on_hang(Hang(step, seconds, self._activity.activity, _innermost(self._main), stacks()))


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
