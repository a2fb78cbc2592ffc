"""The actor through which the driver and its workers communicate: log lines, stop requests, emergency saves."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mowe_ray.config import RunConfig
from mowe_ray.data.data_report import DataReport

# Phases of a recovery, from the last step before a failure to the first one after it.
_PHASES = ("detection", "restart", "load", "data")


class RunCoordinator:
    """An actor on the driver's node that lives as long as the driver; workers come and go."""

    def __init__(self, idle_timeout_s: int = 5) -> None:
        """Start without lines, validations or requests.

        Args:
            idle_timeout_s: How long a run that is to stop may be without workers before its controller is killed.
                Workers that have just ended have returned their result by then.
        """
        self._idle_timeout_s = idle_timeout_s
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()
        self._validations: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._validated: set[int | None] = set()
        self._stop = asyncio.Event()
        self._emergencies: dict[str, asyncio.Event] = {}
        self._last_step = time.monotonic()
        self._marks: list[float] = []
        self._placement_group: PlacementGroup | None = None
        self._controller: ActorHandle[Any] | None = None
        self._controller_killed = False

    async def log(self, line: str | None) -> None:
        """Show `line` to the user at the driver; None ends `next_line`."""
        await self._lines.put(line)

    async def next_line(self) -> str | None:
        """Wait for the next line."""
        return await self._lines.get()

    async def add_validation(self, validation: dict[str, Any] | None) -> None:
        """Pass a validation to `next_validation`, once for each step; None means that there will be no more."""
        step = None if validation is None else validation["step"]
        # Workers that are killed while they export validate the last step again.
        if step is None or step not in self._validated:
            self._validated.add(step)
            await self._validations.put(validation)

    async def next_validation(self) -> dict[str, Any] | None:
        """Wait for the next validation."""
        return await self._validations.get()

    async def stop(self) -> None:
        """Ask the workers to save and end; if they wait for nodes, kill the controller that waits for them."""
        self._stop.set()
        self._watch = asyncio.create_task(self._kill_idle_controller())

    async def _kill_idle_controller(self) -> None:
        idle_s = 0
        while idle_s < self._idle_timeout_s and not self._controller_killed:
            await asyncio.sleep(1)
            # Workers that run end by themselves; only a controller that waits for nodes would never notice the request.
            idle_s = 0 if self._placement_group is not None or self._controller is None else idle_s + 1
        await self.kill_controller()

    async def kill_controller(self) -> None:
        """End a run that is to stop, and would not by itself; its workers end with the controller."""
        if self._controller is not None and not self._controller_killed:
            self._controller_killed = True
            ray.kill(self._controller)

    async def controller_killed(self) -> bool:
        """Whether `kill_controller` has."""
        return self._controller_killed

    async def set_controller(self, controller: ActorHandle[Any]) -> None:
        """Register Ray Train's controller, which is about to start workers."""
        self._controller = controller

    async def stop_requested(self) -> None:
        """Wait for `stop`."""
        await self._stop.wait()

    async def request_emergency_save(self, group: str) -> None:
        """Ask all ranks of a worker group to save: one of them will not finish this step."""
        self._emergencies.setdefault(group, asyncio.Event()).set()

    async def emergency_save_requested(self, group: str) -> None:
        """Wait for `request_emergency_save` of this worker group."""
        await self._emergencies.setdefault(group, asyncio.Event()).wait()

    async def set_placement_group(self, placement_group: PlacementGroup | None) -> None:
        """Register what the workers run on; None when they have ended."""
        self._placement_group = placement_group

    async def placement_group(self) -> PlacementGroup | None:
        """Return what the workers run on, None while there are none."""
        return self._placement_group

    async def step_finished(self) -> None:
        """Record the time of the last finished step."""
        self._last_step = time.monotonic()

    async def failure_detected(self) -> None:
        """Start to time a recovery."""
        self._marks = [self._last_step, time.monotonic()]

    async def end_recovery_phase(self, phase: str) -> dict[str, float]:
        """End a phase of a recovery: `restart`, `load` or `data`.

        Returns:
            Seconds of each phase so far, from the last finished step on; empty outside a recovery.
        """
        if len(self._marks) != _PHASES.index(phase) + 1:  # there was no failure, or there is another one
            return {}
        self._marks.append(time.monotonic())
        spans = zip(_PHASES, self._marks, self._marks[1:], strict=False)
        return {name: after - before for name, before, after in spans}


def start_coordinator() -> ActorHandle[RunCoordinator]:
    """Start the actor on this node: the nodes of workers may be taken away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: ActorHandle[RunCoordinator] = (
        ray.remote(RunCoordinator).options(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here).remote()
    )
    return actor


def print_lines(coordinator: ActorHandle[RunCoordinator], log: Callable[[str], None]) -> threading.Thread:
    """Pass the lines of the workers to `log`, in a thread that ends after `RunCoordinator.log(None)`."""

    def run() -> None:
        try:
            while (line := ray.get(coordinator.next_line.remote())) is not None:
                log(line)
        except ray.exceptions.RayError:
            return  # the actor ends with its driver's connection to Ray

    thread = threading.Thread(target=run, daemon=True, name="print_lines")
    thread.start()
    return thread


def call_when_done(waiting: ray.ObjectRef, callback: Callable[[], object]) -> None:
    """Call `callback` in a thread once a call of the coordinator has returned; never if the driver has ended."""

    def run() -> None:
        try:
            ray.get(waiting)
        except ray.exceptions.RayError:
            return  # the driver is gone, and this process with it
        callback()

    threading.Thread(target=run, daemon=True, name="call_when_done").start()


@dataclass(frozen=True)
class WorkerSetup:
    """Arguments of every training process.

    Attributes:
        config: The run's configuration, which brings its plugins along.
        train_index: Index table of the training data, in the object store; validation_indexes by source name.
        feature_cache: The `FeatureCache` in the object store; None if the run has none.
        report: What scanning the shards found.
        coordinator: Connection to the driver.
    """

    config: RunConfig
    train_index: ray.ObjectRef
    validation_indexes: dict[str, ray.ObjectRef]
    feature_cache: ray.ObjectRef | None
    report: DataReport
    coordinator: ActorHandle[RunCoordinator]
