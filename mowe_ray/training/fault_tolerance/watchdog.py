"""What a training process is doing, and an alarm for when it does the same thing for too long.

A rank that hangs cannot say so itself: its main thread waits in a collective, a read or a kernel. So a thread
beside it keeps the time of every step, and tells where the main thread is when the time is up.
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


class Whereabouts:
    """The place the main thread is at: a phase of the step, and the part of the model it is in.

    Attributes:
        place: In words; read by other threads.
    """

    def __init__(self) -> None:
        """Start nowhere."""
        self.place = "starting"

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Be at `place` inside the block, and back where it was after it."""
        before, self.place = self.place, place
        try:
            yield
        finally:
            self.place = before

    def watch(self, items: Iterable[T], place: str) -> Iterator[T]:
        """Yield `items`; each wait for the next one is at `place`."""
        iterator = iter(items)
        while True:
            with self.at(place):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def follow(self, modules: dict[str, nn.Module]) -> None:
        """Name the module whose forward runs, also when checkpointed activations are computed again."""
        for name, module in modules.items():
            stack: list[str] = []

            def enter(_module: nn.Module, _inputs: Any, name: str = name, stack: list[str] = stack) -> None:
                stack.append(self.place)
                self.place = f"{self.place.partition(' in ')[0]} in {name}"

            def leave(_module: nn.Module, _inputs: Any, _output: Any, stack: list[str] = stack) -> None:
                self.place = stack.pop()

            module.register_forward_pre_hook(enter)
            # Also on the way out of an error: recomputation ends by one as soon as it has what it needs.
            module.register_forward_hook(leave, always_call=True)


@dataclass(frozen=True)
class Hang:
    """A step that takes too long.

    Attributes:
        step: The step that is under way, counted from 1.
        seconds: How long it has taken so far.
        place: Where the main thread is, by `Whereabouts`; `line` is its innermost line of code.
        stacks: Stack of every Python thread.
    """

    step: int
    seconds: float
    place: str
    line: str
    stacks: str


class Watchdog:
    """Calls `on_hang` once, in its own thread, when a step takes longer than `timeout_s`."""

    def __init__(self, whereabouts: Whereabouts, timeout_s: float, on_hang: Callable[[Hang], None]):
        """Start to watch; nothing is timed before the first `begin`."""
        self._whereabouts, self._timeout_s, self._on_hang = whereabouts, timeout_s, on_hang
        self._main = threading.get_ident()
        self._changed = threading.Condition()
        self._step, self._closed = 0, False
        self._began: float | None = None
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def begin(self, step: int) -> None:
        """Start the time of `step`, which ends that of the step before."""
        self._set(step, time.monotonic())

    def pause(self) -> None:
        """Stop the time: what follows may take long (validation, export)."""
        self._set(self._step, None)

    def close(self) -> None:
        """Watch no more."""
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
        self._on_hang(Hang(step, seconds, self._whereabouts.place, _innermost(self._main), stacks()))


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
