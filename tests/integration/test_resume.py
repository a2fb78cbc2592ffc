"""A run that was stopped ends with the weights of one that nothing happened to."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mowe_ray.distributed.ray_train.driver import train
from tests.tiny_runs import Corpus, assert_same_run, records, tiny_config

STEPS = 6
SETTINGS = ("compute.num_workers=2", "compute.zero_stage=2", "training.save_every=2", "training.log_samples=true")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def _train(corpus: Corpus, storage: Path, name: str, *overrides: str) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return train(tiny_config(corpus, storage, name, *overrides), said.append), said


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tiny_corpus: Corpus, storage: Path) -> dict[str, Any]:
    """The result of a run on two workers that nothing happened to."""
    return _train(tiny_corpus, storage, "undisturbed", *SETTINGS, f"training.max_steps={STEPS}")[0]


def test_one_worker_has_the_loss_curve_of_two(undisturbed: dict[str, Any], tiny_corpus: Corpus, storage: Path) -> None:
    overrides = ("training.gradient_accumulation=2", "compute.zero_stage=1", f"training.max_steps={STEPS}")
    result, _ = _train(tiny_corpus, storage, "one_worker", *overrides)
    curve, expected = (records(run["run"], "train") for run in (result, undisturbed))
    assert [r["step"] for r in curve] == list(range(1, STEPS + 1))
    for name in ("loss", "lm_loss", "routing_loss", "grad_norm"):
        # AdamW's eps of 1e-8 lets rounding errors move weights whose gradient is nearly zero.
        assert [r[name] for r in curve] == pytest.approx([r[name] for r in expected], rel=1e-4), name
    validation, expected_validation = (records(run["run"], "validation")[-1] for run in (result, undisturbed))
    assert validation["loss"] == pytest.approx(expected_validation["loss"], rel=1e-4)
    assert result["tasks"] == undisturbed["tasks"]


@pytest.mark.soak  # two runs more; test_faults.py and test_kill.py continue runs by default
def test_the_same_command_with_more_steps_continues(
    undisturbed: dict[str, Any], tiny_corpus: Corpus, storage: Path
) -> None:
    # Three steps: the checkpoint at the end of a run is not one of every second step.
    first, _ = _train(tiny_corpus, storage, "stopped", *SETTINGS, "training.max_steps=3")
    assert first["steps"] == 3
    result, said = _train(tiny_corpus, storage, "stopped", *SETTINGS, f"training.max_steps={STEPS}")
    assert [line.split()[1] for line in said if line.startswith("step")] == [f"{s}/{STEPS}" for s in (4, 5, 6)]
    assert_same_run(result, undisturbed)


def test_other_batches_train_the_rest_of_the_epoch(tiny_corpus: Corpus, storage: Path) -> None:
    first, _ = _train(tiny_corpus, storage, "rebatched", *SETTINGS, "training.max_steps=3")
    assert (first["steps"], first["epochs"]) == (3, 0)
    changes = ("training.gradient_accumulation=2", "data.max_batch_size=3", "training.epochs=2")
    changes += ("training.max_steps=null",)
    result, said = _train(tiny_corpus, storage, "rebatched", *SETTINGS, *changes)
    assert result["epochs"] == 2
    assert result["samples"] == {"lost": 0, "repeated": 0}
    assert "samples: 2 epochs, 0 lost, 0 repeated" in said
    lines = [json.loads(line) for line in (Path(result["run"]) / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, result["steps"] + 1))
    for epoch in (0, 1):
        counts = Counter(name for line in lines if line["epoch"] == epoch for _, name in line["samples"])
        assert set(counts.values()) == {1}
        assert len(counts) == 40
    progress = [line for line in said if line.startswith("step")]
    assert progress[-1].startswith(f"step {result['steps']} (100 %)")
    assert "is finished" in _train(tiny_corpus, storage, "rebatched", *SETTINGS, *changes)[1][-1]


def test_a_finished_run_returns_at_once(undisturbed: dict[str, Any], tiny_corpus: Corpus, storage: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(undisturbed["run"]).rglob("*.jsonl")}
    began = time.monotonic()
    result, said = _train(tiny_corpus, storage, "undisturbed", *SETTINGS, f"training.max_steps={STEPS}")
    assert time.monotonic() - began < 20  # workers alone take that long to start on a busy machine
    assert result == undisturbed
    assert "is finished" in said[-1]
    assert {path: path.stat().st_mtime_ns for path in before} == before
