"""The coordinator between driver and workers, and what Ray Train is told of a run."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import ray

from mowe_ray.distributed.ray_train.coordinator import RunCoordinator
from tests.tiny_runs import records


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


@pytest.mark.slow
def test_ray_train_sees_the_metrics_of_every_rank(reference: dict[str, Any]) -> None:
    """What a callback of Ray, and so its tools, gets; `tests/ray_reports.py` writes it down."""
    lines = (Path(reference["run"]).parent / "reports.jsonl").read_text().splitlines()
    reports = [json.loads(line) for line in lines]
    assert all(len(ranks) == 2 and ranks[0]["step"] == ranks[1]["step"] for ranks in reports)
    steps = [ranks[0]["step"] for ranks in reports]
    assert steps == sorted(set(steps)), "at a checkpoint or a validation, each step once"
    assert all(step % 4 == 0 or step % 6 == 0 for step in steps)
    last, validation = reports[-1][0], records(reference["run"], "validation")[-1]
    assert (last["step"], last["progress"], last["validation_step"]) == (16, 1.0, 16)
    assert last["loss"] == records(reference["run"], "train")[-1]["loss"]
    assert last["held_out/loss"] == validation["loss"]
    assert {task: last[f"held_out/{task}"] for task in validation["tasks"]} == {
        task: values["score"] for task, values in validation["tasks"].items()
    }
