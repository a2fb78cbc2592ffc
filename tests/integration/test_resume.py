"""A run that was stopped ends with the weights of one that nothing happened to."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.data.synthetic_corpus import builtin_samples
from mowe_ray.distributed.ray_train.driver import train
from mowe_ray.train import main
from tests.tiny_runs import REFERENCE, Corpus, assert_same_run, records, tiny_arguments, tiny_config

STEPS = 6  # of the reference, which validates after them

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def _train(corpus: Corpus, storage: Path, name: str, *overrides: str) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return train(tiny_config(corpus, storage, name, *REFERENCE, *overrides), said.append), said


def test_one_worker_has_the_loss_curve_of_two(reference: dict[str, Any], tiny_corpus: Corpus, tmp_path: Path) -> None:
    overrides = ("compute.num_workers=1", "training.gradient_accumulation=2", "compute.zero_stage=1")
    result, _ = _train(tiny_corpus, tmp_path, "one_worker", *overrides, f"training.max_steps={STEPS}")
    curve, expected = (records(run["run"], "train")[:STEPS] for run in (result, reference))
    assert [r["step"] for r in curve] == list(range(1, STEPS + 1))
    for name in ("loss", "lm_loss", "routing_loss", "grad_norm"):
        # AdamW's eps of 1e-8 lets rounding errors move weights whose gradient is nearly zero.
        assert [r[name] for r in curve] == pytest.approx([r[name] for r in expected], rel=1e-4), name
    validation, expected_validation = (records(run["run"], "validation")[0] for run in (result, reference))
    assert validation["step"] == expected_validation["step"] == STEPS
    assert validation["loss"] == pytest.approx(expected_validation["loss"], rel=1e-4)
    assert validation["tasks"] == expected_validation["tasks"]


@pytest.mark.soak  # two runs more; test_faults.py and test_kill.py continue runs by default
def test_the_same_command_with_more_steps_continues(
    reference: dict[str, Any], tiny_corpus: Corpus, tmp_path: Path
) -> None:
    # Seven steps: the checkpoint at the end of a run is not one of every fourth step.
    first, _ = _train(tiny_corpus, tmp_path, "stopped", "training.max_steps=7")
    assert first["steps"] == 7
    result, said = _train(tiny_corpus, tmp_path, "stopped")
    assert [line.split()[1] for line in said if line.startswith("step")] == [f"{s}/16" for s in range(8, 17)]
    assert_same_run(result, reference)


def test_other_batches_train_the_rest_of_the_epoch(
    reference: dict[str, Any], tiny_corpus: Corpus, tmp_path: Path
) -> None:
    assert (reference["steps"], reference["epochs"]) == (16, 3)  # it ends within the fourth epoch
    shutil.copytree(reference["run"], tmp_path / "rebatched")
    changes = ("training.gradient_accumulation=2", "data.max_batch_size=3", "training.epochs=5")
    changes += ("training.max_steps=null",)
    result, said = _train(tiny_corpus, tmp_path, "rebatched", *changes)
    assert result["epochs"] == 5
    assert result["samples"] == {"lost": 0, "repeated": 0}
    assert "samples: 5 epochs, 0 lost, 0 repeated" in said
    lines = [json.loads(line) for line in (Path(result["run"]) / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, result["steps"] + 1))
    for epoch in range(5):
        counts = Counter(name for line in lines if line["epoch"] == epoch for _, name in line["samples"])
        assert set(counts.values()) == {1}
        assert len(counts) == 40
    progress = [line for line in said if line.startswith("step")]
    assert progress[-1].startswith(f"step {result['steps']} (100 %)")
    assert "is finished" in _train(tiny_corpus, tmp_path, "rebatched", *changes)[1][-1]


@pytest.mark.soak  # three runs; test_carry_over.py has all kinds of change
def test_a_corpus_that_was_moved_and_cut_anew_is_trained_on_once(
    reference: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(reference["run"], tmp_path / "cut")  # it ended within the fourth epoch
    samples = list(builtin_samples("train", 40))[::-1]
    corpus = Corpus(tmp_path / "elsewhere", Path(reference["run"]).parent / "unused")
    write_webdataset(samples, str(corpus.train), shard_bytes=250_000)
    changes = ("training.max_steps=20", "training.eval_every=0", "data.validation=[]")
    result, said = _train(corpus, tmp_path, "cut", *changes)
    assert any("data have changed since the checkpoint: 40 samples moved, 0 new, 0 gone" in line for line in said)
    assert (result["steps"], result["epochs"]) == (20, 4)
    assert result["samples"] == {"lost": 0, "repeated": 0}

    # The same command finds nothing to train, and counts again: now a line of the log has lost a sample.
    run = Path(result["run"])
    log = (run / "samples.jsonl").read_text().splitlines()
    first = json.loads(log[0])
    log[0] = json.dumps({**first, "samples": first["samples"][1:]})
    (run / "samples.jsonl").write_text("\n".join(log) + "\n")
    (run / "result.json").unlink()
    arguments = [*tiny_arguments(corpus, tmp_path, "cut"), *REFERENCE, *changes]
    for _ in range(2):  # also the run that is finished already
        assert main(["--config", "quickstart", *arguments]) == 1
        told = capfd.readouterr()
        assert json.loads(told.out.splitlines()[-1])["samples"] == {"lost": 1, "repeated": 0}
    assert "is finished" in told.err


@pytest.mark.soak
def test_a_validation_that_was_cut_off_is_made_up_for(
    reference: dict[str, Any], tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """A run that was killed between a checkpoint and the validation that was due has it after the restart."""
    run = tmp_path / "cut_off"
    shutil.copytree(reference["run"], run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints/step-00000016")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if (json.loads(line)["step"], json.loads(line)["kind"]) < (12, "validation")]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    result, said = _train(tiny_corpus, tmp_path, "cut_off")
    assert any("continuing after step 12" in line for line in said)
    assert [record["step"] for record in records(result["run"], "validation")] == [6, 12, 16]
    assert_same_run(result, reference)


def test_a_finished_run_returns_at_once(reference: dict[str, Any], tiny_corpus: Corpus) -> None:
    run = Path(reference["run"])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.jsonl")}
    result, said = _train(tiny_corpus, run.parent, run.name)
    assert result == reference
    assert "is finished" in said[-1]
    assert not any("continuing after step" in line for line in said), "workers were started"
    assert {path: path.stat().st_mtime_ns for path in before} == before
