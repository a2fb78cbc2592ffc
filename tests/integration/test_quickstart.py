"""The command a newcomer types, in a process of its own, on the preset it uses (only shorter)."""

import json
from pathlib import Path

import pytest
from matplotlib import image

from mowe_ray.train import main
from tests.end_to_end import Finished, quickstart_arguments, run_command
from tests.tiny_runs import records

TASKS = {"asr", "er", "ac", "aqa", "sqa"}


@pytest.mark.slow
def test_the_last_line_is_the_result_of_a_complete_run(quickstart: Finished, quickstart_storage: Path):
    assert quickstart.code == 0, quickstart.err
    assert quickstart.out.count("\n") == 1
    result = quickstart.result
    run = Path(result["run"])
    assert run == quickstart_storage / "quick"
    assert result["export"] == str(run / "export")
    assert result["steps"] == 12
    assert set(result["tasks"]) == TASKS
    for scores in result["tasks"].values():
        assert set(scores) == {"score", "majority"}
        assert all(0 <= value <= 1 for value in scores.values())
    assert "step 12/12" in quickstart.err
    assert "Traceback" not in quickstart.err


@pytest.mark.slow
def test_the_run_folder_is_complete(quickstart: Finished):
    run = Path(quickstart.result["run"])

    assert json.loads((run / "config.json").read_text())["training"]["max_steps"] == 12
    last = records(run, "train")[-1]
    assert last["step"] == 12
    assert 0.5 < last["useful_flops_share"] <= 1
    (validation,) = records(run, "validation")
    assert set(validation["tasks"]) == TASKS
    report = json.loads((run / "data_report.json").read_text())
    assert (report["bad"], len(report["sources"])) == (0, 2)
    assert report["samples"] == report["good"] > 600
    router = json.loads((run / "router_report.json").read_text())
    assert router["members"] == ["whisper", "hubert", "wav2vec2"]
    assert list(router["datasets"]) == ["builtin"]
    assert set(router["datasets"]["builtin"]) == TASKS
    assert image.imread(run / "router_report.png").std() > 0
    assert "Finished after 12 steps" in (run / "report.html").read_text()
    assert (run / "export" / "model.safetensors").stat().st_size > 100_000
    assert len(list(run.glob("checkpoints/step-*/checkpoint.json"))) == 1
    assert not list(run.rglob("*.part"))


@pytest.mark.slow
def test_its_run_is_evaluated_by_naming_it(quickstart: Finished):
    run = Path(quickstart.result["run"])
    finished = run_command(run, "ablation_samples=10", module="mowe_ray.evaluate")

    assert finished.code == 0, finished.err
    assert finished.out.count("\n") == 1
    assert set(finished.result["models"]["quick"]["scores"]) == {f"builtin/{task}" for task in TASKS}
    folder = run / "evaluation"
    assert finished.result["report"] == str(folder / "report.html")
    for file in ("scores.json", "router_report.json", "router_report.png", "report.html"):
        assert (folder / file).stat().st_size > 1000, file
    assert len((folder / "predictions" / "builtin.jsonl").read_text().splitlines()) == 150
    assert "WER" in finished.err
    assert "Traceback" not in finished.err
    assert "WARNING" not in finished.err


@pytest.mark.slow
def test_running_the_command_again_trains_nothing_and_gives_the_same_result(
    quickstart: Finished, quickstart_storage: Path, ray_cluster, capsys
):
    metrics = Path(quickstart.result["run"], "metrics.jsonl").read_bytes()

    assert main(quickstart_arguments(quickstart_storage)) == 0

    again = capsys.readouterr()
    assert json.loads(again.out.splitlines()[-1]) == quickstart.result
    assert "is finished" in again.err
    assert Path(quickstart.result["run"], "metrics.jsonl").read_bytes() == metrics


@pytest.mark.slow
def test_the_folder_of_another_run_is_refused(quickstart: Finished, quickstart_storage: Path, ray_cluster, capsys):
    assert main([*quickstart_arguments(quickstart_storage), "training.learning_rate=0.5"]) == 1
    printed = capsys.readouterr()
    assert "training.learning_rate" in printed.err
    assert "error" in json.loads(printed.out)


def test_a_wrong_key_stops_before_anything_starts(tmp_path):
    finished = run_command("training.max_step=12", f"storage={tmp_path}")
    assert (finished.code, finished.out) == (2, "")
    assert "training.max_step" in finished.err
    assert "training.max_steps" in finished.err
    assert "Traceback" not in finished.err
    assert not list(tmp_path.iterdir())
