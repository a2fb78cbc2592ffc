"""Runs whose workers and driver are killed end with the weights, metrics and samples of one that nobody disturbed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mowe_ray.distributed.trainer import train
from tests.faults import RunningCommand, ended
from tests.tiny_runs import Corpus, exported_weights, records, tiny_config

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


def assert_same_run(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every step stands in the metrics once with the same numbers, and every weight is the same to the bit."""
    assert result["steps"] == expected["steps"]
    assert result["tasks"] == expected["tasks"]
    assert result["samples"] == {"lost": 0, "repeated": 0} == expected["samples"]
    for name in ("step", "loss", "lm_loss", "routing_loss", "grad_norm"):
        numbers, expected_numbers = ([r[name] for r in records(run["run"], "train")] for run in (result, expected))
        assert numbers == expected_numbers, name
    lines, expected_lines = (_steps_of(Path(run["run"])) for run in (result, expected))
    assert lines == expected_lines
    weights, expected_weights = exported_weights(result["run"]), exported_weights(expected["run"])
    assert weights.keys() == expected_weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []


def _steps_of(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


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
