"""The line between driver and workers, without either."""

import asyncio
from typing import Any

import pytest
import ray

from mowe_ray.distributed.ray_train import control
from mowe_ray.distributed.ray_train.control import Control


def test_only_a_run_that_is_to_stop_and_has_no_workers_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(control, "_ALONE_S", 1)
    monkeypatch.setattr(ray, "kill", killed.append)

    async def check() -> None:
        line, controller, workers = Control(), object(), object()
        await line.controlled_by(controller)  # type: ignore[arg-type]
        await asyncio.sleep(1.5)
        assert not killed, "nobody wishes to stop"
        await line.hold(workers)  # type: ignore[arg-type]
        await line.stop()
        await asyncio.sleep(1.5)
        assert not killed, "its workers will save"
        assert not await line.abandoned()
        await line.hold(None)
        await asyncio.sleep(2.5)
        assert killed == [controller]
        assert await line.abandoned()

    asyncio.run(check())
