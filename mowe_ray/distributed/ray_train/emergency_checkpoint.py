"""What a worker does when it is to stop, is about to be taken away, or will not finish its step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import ray
import torch
from ray.actor import ActorHandle

from mowe_ray.distributed.ray_internals import WorkerCallback, get_train_context
from mowe_ray.distributed.ray_train.control import Control, when
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.fault_tolerance.watchdog import Hang

if TYPE_CHECKING:  # Ray's controller imports this too, and needs no model
    from mowe_ray.distributed.engine.deepspeed_engine import DeepSpeedEngine

# How long a checkpoint may take when a rank is in trouble, or about to be.
RESCUE_S = 60.0

_terminated = threading.Event()


class SaveOnSigterm(WorkerCallback):
    """Installs a handler of SIGTERM in a worker's main thread; training runs in another, which may not."""

    def after_init_train_context(self) -> None:
        """See the class."""

        def note(_number: int, _frame: FrameType | None) -> None:
            _terminated.set()

        signal.signal(signal.SIGTERM, note)


class Wishes:
    """What the world outside asks of the workers: every rank hears a part of it, and all must act on the same step."""

    def __init__(self, control: ActorHandle[Control]):
        """Listen to the driver, to the notice that a node will be taken away, and to SIGTERM."""
        self._stop = threading.Event()
        self._notice: object = None
        when(control.stopping.remote(), self._stop.set)

    def agree(self, engine: DeepSpeedEngine) -> tuple[bool, bool]:
        """Return whether any rank was asked to stop for good, and whether any has to save now. Collective."""
        notice = get_train_context().preemption_context.preemption_info  # the public call is a barrier of its own
        announced, self._notice = notice is not None and notice != self._notice, notice
        mine = torch.tensor([float(self._stop.is_set()), float(announced or _terminated.is_set())])
        stop, save = engine.all_reduce(mine).tolist()
        return stop > 0, save > 0


def leave_if_terminated() -> None:
    """End this process if it got SIGTERM; the others go on without it."""
    if _terminated.is_set():
        os._exit(128 + signal.SIGTERM)


class Rescue:
    """Saves what can be saved when a rank will not finish its step.

    Every rank holds its own stretch of the weights and moments, and only the optimizer's step changes them. So
    while the ranks wait for one another in forward or backward, a thread on each can still write its stretch of
    the last finished step; together they are a whole checkpoint.
    """

    def __init__(
        self,
        *,
        engine: DeepSpeedEngine,
        save: Callable[[], bool],
        control: ActorHandle[Control],
        folder: RunFolder,
    ):
        """Listen for calls for help of the ranks of this group. Collective.

        Args:
            save: Writes a checkpoint of the last finished step, without collectives; returns whether it is whole.
        """
        self._engine, self._save, self._control, self._folder = engine, save, control, folder
        self._group: str = engine.gather(os.urandom(8).hex())[0]
        self._updates = engine.updates
        self._once = threading.Lock()
        when(control.help_called.remote(self._group), self.save)

    def step_finished(self) -> None:
        """Remember that weights, moments and position are of the same step now."""
        self._updates = self._engine.updates

    def call(self) -> bool:
        """Have all ranks save, this one too; returns whether a whole checkpoint came of it."""
        self._control.call_for_help.remote(self._group)
        return self.save()

    def save(self) -> bool:
        """Save this rank's part, if its weights are not just being changed."""
        with self._once:
            return self._updates == self._engine.updates and self._save()

    def hang(self, hang: Hang) -> None:
        """Tell where this rank hangs, save, and end the process, so that the group starts again."""
        rank = self._engine.rank
        file = f"hangs/step-{hang.step:08d}-rank-{rank}.txt"
        with contextlib.suppress(OSError):  # the disk may be what hangs, or full
            self._folder.write_text(file, f"{hang}\n\n{hang.stacks}")
        self._say(
            f"error: step {hang.step} has taken {hang.seconds:.0f} s (training.step_timeout_s): "
            f"rank {rank} is at: {hang.place}, in {hang.line}; all stacks: {self._folder.path(file)}"
        )
        saved = self.call()
        self._say(f"rank {rank}: {'saved' if saved else 'could not save'} the step before; restarting")
        os._exit(1)

    def _say(self, line: str) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._control.say.remote(line), timeout=5)
