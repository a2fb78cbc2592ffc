"""The line between the driver and its workers: what they say, the wish to stop, a call for help, and the clock."""

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

from mowe_ray.data.data_report import DataReport

# What a recovery consists of, from the last step before a failure to the first one after it.
_PHASES = ("detection", "restart", "load", "data")
# Workers that have just ended have handed in their result by then.
_ALONE_S = 5


class Control:
    """A small actor on the driver's node; it lives as long as the driver, and workers come and go."""

    def __init__(self) -> None:
        """Start with nothing said and nobody wishing to stop."""
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()
        self._validations: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._stop = asyncio.Event()
        self._distress: dict[str, asyncio.Event] = {}
        self._last_step = time.monotonic()
        self._marks: list[float] = []
        self._held: PlacementGroup | None = None
        self._abandoned = False
        self._controller: ActorHandle[Any] | None = None

    async def say(self, line: str | None) -> None:
        """Show `line` to the person at the driver; None ends `next_line`."""
        await self._lines.put(line)

    async def next_line(self) -> str | None:
        """Wait for the next line."""
        return await self._lines.get()

    async def validated(self, validation: dict[str, Any] | None) -> None:
        """Hand a validation to `next_validation`; None says that there will be no more."""
        await self._validations.put(validation)

    async def next_validation(self) -> dict[str, Any] | None:
        """Wait for the next validation."""
        return await self._validations.get()

    async def stop(self) -> None:
        """Ask the workers to save and end; if they wait for their nodes, end the controller that waits for them."""
        self._stop.set()
        self._watch = asyncio.create_task(self._end_waiting())

    async def _end_waiting(self) -> None:
        alone = 0
        while alone < _ALONE_S:
            await asyncio.sleep(1)
            alone = 0 if self._held is not None or self._controller is None else alone + 1
        self._abandoned = True
        ray.kill(self._controller)

    async def abandoned(self) -> bool:
        """Whether `stop` has ended the controller."""
        return self._abandoned

    async def controlled_by(self, controller: ActorHandle[Any]) -> None:
        """Remember Ray Train's controller, which is about to start workers."""
        self._controller = controller

    async def stopping(self) -> None:
        """Wait for `stop`."""
        await self._stop.wait()

    async def call_for_help(self, group: str) -> None:
        """Tell the ranks of a worker group that one of them will not finish this step."""
        self._distress.setdefault(group, asyncio.Event()).set()

    async def help_called(self, group: str) -> None:
        """Wait for `call_for_help` of this worker group."""
        await self._distress.setdefault(group, asyncio.Event()).wait()

    async def hold(self, resources: PlacementGroup | None) -> None:
        """Remember what the workers run on; None when they are gone."""
        self._held = resources

    async def held(self) -> PlacementGroup | None:
        """Return what the workers run on, None while there are none."""
        return self._held

    async def step_finished(self) -> None:
        """Keep the time of the last sign of life."""
        self._last_step = time.monotonic()

    async def failed(self) -> None:
        """Start to measure a recovery: the failure has been noticed."""
        self._marks = [self._last_step, time.monotonic()]

    async def recovered(self, phase: str) -> dict[str, float]:
        """End a phase of a recovery: `restart`, `load` or `data`.

        Returns:
            Seconds of each phase so far, from the last finished step on; empty outside a recovery.
        """
        if len(self._marks) != _PHASES.index(phase) + 1:  # no failure before, or another one on the way
            return {}
        self._marks.append(time.monotonic())
        spans = zip(_PHASES, self._marks, self._marks[1:], strict=False)
        return {name: after - before for name, before, after in spans}


def start_control() -> ActorHandle[Control]:
    """Start the actor on this node: a worker's node may go."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: ActorHandle[Control] = (
        ray.remote(Control).options(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here).remote()
    )
    return actor


def relay(control: ActorHandle[Control], say: Callable[[str], None]) -> threading.Thread:
    """Print what the workers say, in a thread that ends after `say(None)`."""

    def run() -> None:
        try:
            while (line := ray.get(control.next_line.remote())) is not None:
                say(line)
        except ray.exceptions.RayError:
            return  # the actor ends with its driver's connection to Ray

    thread = threading.Thread(target=run, daemon=True, name="relay")
    thread.start()
    return thread


def when(signal: ray.ObjectRef, act: Callable[[], object]) -> None:
    """Call `act` in a thread once `signal`, a call of the control actor that waits, returns."""

    def run() -> None:
        try:
            ray.get(signal)
        except ray.exceptions.RayError:
            return  # the driver is gone, and this process with it
        act()

    threading.Thread(target=run, daemon=True, name="signal").start()


@dataclass(frozen=True)
class WorkerSetup:
    """What the driver hands to every training process.

    Attributes:
        config: The run, as JSON.
        train_index: Index table of the training data, in the object store; validation_indexes by source name.
        feature_cache: What need not be computed, likewise; None without such a cache.
        report: What scanning the shards found.
        control: The line to the driver.
    """

    config: str
    train_index: ray.ObjectRef
    validation_indexes: dict[str, ray.ObjectRef]
    feature_cache: ray.ObjectRef | None
    report: DataReport
    control: ActorHandle[Control]
