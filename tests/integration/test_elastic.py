"""One epoch on 2, then 1, then 3 workers, as nodes are lost, come, and are announced to go: the run of one worker."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mowe_ray.distributed.ray_train.driver import train
from tests.faults import RunningCommand, ended
from tests.ray_nodes import ray_nodes
from tests.tiny_runs import Corpus, records, tiny_config

PASSES = 48  # of forty clips: about 160 steps an epoch, so that nodes can come before it ends

SETTINGS = (
    "training.max_steps=null",
    "training.epochs=1",
    "training.save_every=5",
    "training.log_samples=true",
    "training.learning_rate=3e-4",
)

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(2400), pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tiny_corpus: Corpus, storage: Path) -> dict[str, Any]:
    """The same global batches of three micro-batches, on one worker that nobody disturbs."""
    settings = (*SETTINGS, f"data.train.0.weight={PASSES}", "training.gradient_accumulation=3")
    return train(tiny_config(tiny_corpus, storage, "undisturbed", *settings), [].append)


def test_workers_come_and_go_within_an_epoch(tiny_corpus: Corpus, storage: Path, undisturbed: dict[str, Any]) -> None:
    elastic = ("compute.num_workers=[1,3]", "compute.resize_interval_s=5", f"data.train.0.weight={PASSES}")
    with ray_nodes() as nodes:
        first, second = nodes.add(2), nodes.add(2)
        command = RunningCommand(tiny_corpus, storage, "elastic", *SETTINGS, *elastic, RAY_ADDRESS=nodes.address)
        with ended(command):
            command.until_step(7)
            nodes.lose(second)
            command.until(lambda: "on 1 worker" in command.said, "1 worker")
            command.until_step(command.step() + 5)
            third, _ = nodes.add(2), nodes.add(2)
            command.until(lambda: "on 3 workers" in command.said, "3 workers")
            command.until_step(command.step() + 4)
            nodes.announce_loss(third, seconds=20)
            command.until(lambda: any(step % 5 for step in command.checkpoints()), "checkpoint on notice")
            finished = command.wait()
        assert first.poll() is None
    assert finished.code == 0, finished.err
    assert finished.result["samples"] == {"lost": 0, "repeated": 0}
    curve, expected = (records(run["run"], "train") for run in (finished.result, undisturbed))
    assert [r["step"] for r in curve] == [r["step"] for r in expected] == list(range(1, len(expected) + 1))
    assert [r["clips"] for r in curve] == [r["clips"] for r in expected], "the same global batches"
    assert [r["learning_rate"] for r in curve] == [r["learning_rate"] for r in expected]
    gaps = np.abs([a["lm_loss"] - b["lm_loss"] for a, b in zip(curve, expected, strict=True)])
    noise = np.abs(np.diff([r["lm_loss"] for r in expected])).mean()
    print(f"largest gap to the undisturbed run {gaps.max():.2e}, step-to-step noise {noise:.2e}")
    assert gaps.max() < 0.05 * noise
