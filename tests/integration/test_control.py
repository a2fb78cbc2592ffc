"""The line between driver and workers, without either."""

import asyncio

import pytest

from mowe_ray.distributed import control
from mowe_ray.distributed.control import Control


async def _has_ended(waiting: asyncio.Task[None], within_s: float) -> bool:
    await asyncio.wait([waiting], timeout=within_s)
    return waiting.done()


def test_only_a_run_that_is_to_stop_and_has_no_workers_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_ALONE_S", 1)

    async def check() -> None:
        line = Control()
        waiting = asyncio.create_task(line.abandoned())
        assert not await _has_ended(waiting, 1.5), "nobody wishes to stop"
        await line.hold(None)  # type: ignore[arg-type]
        await line.stop()
        assert not await _has_ended(waiting, 1.5), "its workers will save"
        await line.let_go()
        assert await _has_ended(waiting, 4)

    asyncio.run(check())
