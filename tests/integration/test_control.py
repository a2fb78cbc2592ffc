"""The coordinator between driver and workers, without either."""

import asyncio
from typing import Any

import pytest
import ray

from mowe_ray.distributed.ray_train.coordinator import RunCoordinator


def test_only_the_controller_of_a_run_that_is_to_stop_without_workers_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)

    async def check() -> None:
        coordinator, controller, workers = RunCoordinator(idle_timeout_s=1), object(), object()
        await coordinator.set_controller(controller)  # type: ignore[arg-type]
        await asyncio.sleep(1.5)
        assert not killed, "nobody asked it to stop"
        await coordinator.set_placement_group(workers)  # type: ignore[arg-type]
        await coordinator.stop()
        await asyncio.sleep(1.5)
        assert not killed, "its workers will save"
        assert not await coordinator.controller_killed()
        await coordinator.set_placement_group(None)
        await asyncio.sleep(2.5)
        assert killed == [controller]
        assert await coordinator.controller_killed()

    asyncio.run(check())
