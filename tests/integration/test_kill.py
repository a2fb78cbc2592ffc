"""Runs whose workers and driver are killed end with the weights, metrics and samples of one that nobody disturbed."""

from pathlib import Path

import numpy as np
import pytest

from mowe_ray.distributed.ray_train.driver import train
from tests.faults import RunningCommand, ended
from tests.tiny_runs import Corpus, assert_same_run, tiny_config

STEPS = 40
SETTINGS = (
    "compute.num_workers=2",
    f"training.max_steps={STEPS}",
    "training.save_every=4",
    "training.log_samples=true",
    "training.clip_norm=0.5",
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("stage", [pytest.param(n, marks=pytest.mark.soak) for n in (0, 1, 2)] + [3])
def test_a_killed_worker_and_a_killed_driver_change_nothing(tiny_corpus: Corpus, storage: Path, stage: int) -> None:
    settings = (*SETTINGS, f"compute.zero_stage={stage}")
    expected = train(tiny_config(tiny_corpus, storage, f"undisturbed{stage}", *settings), [].append)
    random = np.random.default_rng(stage)
    with ended(RunningCommand(tiny_corpus, storage, f"killed{stage}", *settings)) as command:
        command.until_step(int(random.integers(5, 16)))
        killed = [random.choice(command.workers(2))]
        killed[0].kill()
        command.until(lambda: "continuing after step" in command.said, "restart")
        command.until_step(int(random.integers(20, 36)))
        killed.append(command.driver())
        killed[1].kill()
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert "the driver died (signal SIGKILL): starting it again" in finished.err
    assert finished.err.count("continuing after step") == 2
    assert "recovered in" in finished.err
    assert not any(process.is_running() for process in killed)
    assert_same_run(finished.result, expected)
