"""Runs whose workers and driver are killed end with the weights, metrics and samples of one that nobody disturbed."""

from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from mowe_ray.distributed.ray_train.driver import train
from mowe_ray.output.run_folder import RunFolder
from tests.faults import RunningCommand, ended
from tests.tiny_runs import REFERENCE, Corpus, assert_same_run, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_a_killed_worker_and_a_killed_driver_change_nothing(
    tiny_corpus: Corpus, tmp_path: Path, reference: dict[str, Any]
) -> None:
    kill_and_compare(tiny_corpus, tmp_path, REFERENCE, reference)


@pytest.mark.soak  # a run more, for a line told once
def test_workers_killed_in_the_export_tell_of_no_validation_twice(tiny_corpus: Corpus, tmp_path: Path) -> None:
    settings = ["training.max_steps=4", "training.save_every=4", "training.eval_every=2"]
    with ended(RunningCommand(tiny_corpus, tmp_path, "exporting", *settings)) as command:
        command.until(lambda: _validated(command.run)[-1:] == [4], "the last validation")
        for worker in command.workers():
            worker.kill()
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert "continuing after step 4" in finished.err, "killed too late"
    assert _validated(command.run) == [2, 4]
    assert finished.err.count("validation held_out at step 4") == 1


@pytest.mark.soak  # two agents of Ray report the death of their node for a minute, to a Ray that is dead
def test_no_process_is_left_when_the_command_and_its_driver_are_killed_at_once(
    tiny_corpus: Corpus, tmp_path: Path
) -> None:
    with ended(RunningCommand(tiny_corpus, tmp_path, "orphaned", "training.max_steps=100000")) as command:
        command.until_step(2)
        below, driver = command.processes(), command.driver()
        command.process.kill()
        driver.kill()
        command.process.wait()
        _, left = psutil.wait_procs(below, timeout=30)
        assert [title for process, title in below.items() if process in left and "Agent" not in title] == []
        _, left = psutil.wait_procs(left, timeout=120)
        assert [below[process] for process in left] == []


def _validated(run: Path) -> list[int]:
    return [
        record["step"]
        for record in RunFolder(str(run.parent), run.name).read_records("metrics.jsonl")
        if record["kind"] == "validation"
    ]


@pytest.mark.soak  # the same under the other ZeRO stages, each with an undisturbed run of its own
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_it_is_so_under_every_zero_stage(tiny_corpus: Corpus, tmp_path: Path, stage: int) -> None:
    settings = [*REFERENCE, f"compute.zero_stage={stage}"]
    expected = train(tiny_config(tiny_corpus, tmp_path, "undisturbed", *settings), [].append)
    kill_and_compare(tiny_corpus, tmp_path, settings, expected)


def kill_and_compare(corpus: Corpus, storage: Path, settings: list[str], expected: dict[str, Any]) -> None:
    """Kill a worker of a run after its first checkpoint and its driver later on; it has to end as `expected`."""
    random = np.random.default_rng(3)
    with ended(RunningCommand(corpus, storage, "killed", *settings)) as command:
        command.until_step(int(random.integers(5, 8)))
        command.until(command.checkpoints, "checkpoint")
        killed = [random.choice(command.workers(2))]
        killed[0].kill()
        command.until(lambda: "continuing after step" in command.said, "restart")
        command.until_step(int(random.integers(9, 13)))
        killed.append(command.driver())
        killed[1].kill()
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert "the driver died (signal SIGKILL): starting it again" in finished.err
    assert finished.err.count("continuing after step") == 2
    assert "recovered in" in finished.err
    assert not any(process.is_running() for process in killed)
    assert_same_run(finished.result, expected)
