"""Requests to stop or save, and the checkpoint of a run one of whose ranks will not finish its step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import ray
import torch
from ray.actor import ActorHandle

from mowe_ray.distributed.ray_internals import WorkerCallback, get_train_context
from mowe_ray.distributed.ray_train.coordinator import RunCoordinator, call_when_done
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.fault_tolerance.watchdog import ActivityTracker, Hang
from mowe_ray.training.protocols import Ranks

if TYPE_CHECKING:  # Ray's controller imports this too, and needs no model
    from mowe_ray.distributed.engine.deepspeed_engine import DeepSpeedEngine

# Seconds that a checkpoint may take after a failure, or before one that was announced.
EMERGENCY_SAVE_S = 60.0

# How long a run that is to stop may wait for data before it stops without the step under way.
_STUCK_S = 10.0

_terminated = threading.Event()


class SaveOnSigterm(WorkerCallback):
    """Installs a handler of SIGTERM in a worker's main thread; training runs in another, which may not."""

    def after_init_train_context(self) -> None:
        """Install the handler; called by Ray."""

        def note(_number: int, _frame: FrameType | None) -> None:
            _terminated.set()

        signal.signal(signal.SIGTERM, note)


class StopRequests:
    """Requests from outside the worker group; each reaches some ranks, and all must act on it in the same step.

    They are the driver's request to stop, the notice that a node will be taken away, and SIGTERM.
    """

    def __init__(self, coordinator: ActorHandle[RunCoordinator], ranks: Ranks):
        """Start to wait for the driver's request."""
        self._ranks = ranks
        self._stop = threading.Event()
        self._notice: object = None
        call_when_done(coordinator.stop_requested.remote(), self._stop.set)

    def synchronize(self, *, report_due: bool) -> tuple[bool, bool, bool]:
        """Make all ranks act on the same requests in the same step. Collective.

        Args:
            report_due: Whether it is time to report to Ray; that of rank 0 counts.

        Returns:
            Whether any rank was asked to stop, whether any has to save now, and whether all report.
        """
        notice = get_train_context().preemption_context.preemption_info  # the public call is a barrier of its own
        announced, self._notice = notice is not None and notice != self._notice, notice
        report = report_due and self._ranks.is_rank_zero
        mine = torch.tensor([self._stop.is_set(), announced or _terminated.is_set(), report], dtype=torch.float32)
        stop, save, report = self._ranks.all_reduce(mine).tolist()
        return stop > 0, save > 0, report > 0


def exit_if_terminated() -> None:
    """End this process if it received SIGTERM; the group restarts without it."""
    if _terminated.is_set():
        os._exit(128 + signal.SIGTERM)


class EmergencyCheckpointer:
    """Saves the last finished step when a rank will not finish the present one.

    Every rank holds its own slice of the weights and moments, and only the optimizer's step changes them. While the
    ranks wait for one another in forward or backward, a thread on each can therefore still write its slice of the
    last finished step; together these are a complete checkpoint. No method but the constructor is collective.
    """

    def __init__(
        self,
        *,
        engine: DeepSpeedEngine,
        ranks: Ranks,
        save: Callable[[], bool],
        coordinator: ActorHandle[RunCoordinator],
        folder: RunFolder,
        activity: ActivityTracker,
    ):
        """Start to wait for requests of the other ranks of this group, and for the driver's to stop. Collective.

        Args:
            save: Writes a checkpoint of the last finished step, without collectives; returns whether it is committed.
        """
        self._engine, self._save, self._coordinator, self._folder = engine, save, coordinator, folder
        self._rank, self._activity, self._closed = ranks.rank, activity, False
        # Distinguishes this worker group from earlier ones: a late request of a dead group must not stop its successor.
        self._group: str = ranks.gather(os.urandom(8).hex())[0]
        self._updates = engine.updates
        self._once = threading.Lock()
        call_when_done(coordinator.emergency_save_requested.remote(self._group), self.save)
        call_when_done(coordinator.stop_requested.remote(), self._stop_if_stuck)

    def close(self) -> None:
        """Do not stop a run any more that waits for data."""
        self._closed = True

    def _stop_if_stuck(self) -> None:
        """End a run that is to stop but waits for data which may never come: steps end only with them."""
        while not self._closed:
            if (waited_s := self._activity.waited_s) > _STUCK_S:
                self._log(f"rank {self._rank} has waited {waited_s:.0f} s for data: stopping without them")
                self.save_on_all_ranks()
                ray.get(self._coordinator.kill_controller.remote())
                return
            time.sleep(1)

    def step_finished(self) -> None:
        """Mark weights, moments and position as belonging to the same step."""
        self._updates = self._engine.updates

    def save_on_all_ranks(self) -> bool:
        """Make all ranks save, including this one; returns whether the checkpoint is committed."""
        self._coordinator.request_emergency_save.remote(self._group)
        return self.save()

    def save(self) -> bool:
        """Save this rank's slices, unless the optimizer is changing them."""
        # Requests arrive in several threads: the watchdog's, and that of the coordinator's answer.
        with self._once:
            # Different numbers mean that the optimizer's step has begun: some weights are new, some are not.
            return self._updates == self._engine.updates and self._save()

    def on_hang(self, hang: Hang) -> None:
        """Log where this rank hangs, save, and end the process, so that the group restarts."""
        rank = self._rank
        file = f"hangs/step-{hang.step:08d}-rank-{rank}.txt"
        with contextlib.suppress(OSError):  # the disk may be what hangs, or full
            self._folder.write_text(file, f"{hang}\n\n{hang.stacks}")
        self._log(
            f"error: {hang.what} has taken {hang.seconds:.0f} s (training.step_timeout_s): "
            f"rank {rank} is at: {hang.activity}, in {hang.line}; all stacks: {self._folder.path(file)}"
        )
        saved = self.save_on_all_ranks()
        self._log(f"rank {rank}: {'saved' if saved else 'could not save'} the step before; restarting")
        # Not sys.exit: the main thread hangs and would never end.
        os._exit(1)

    def _log(self, line: str) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._coordinator.log.remote(line), timeout=5)
