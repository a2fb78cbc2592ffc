"""What is read back of a trial, and how a study under way is summed up."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mowe_ray.output.run_folder import RunFolder
from mowe_ray.sweeping.progress import best_trial, summary, table
from mowe_ray.sweeping.report.results import ResultsWriter
from mowe_ray.sweeping.schema import ObjectiveSection, SweepConfig
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import (
    ModelCost,
    Trial,
    history,
    joined,
    load_all,
    objective,
    point_label,
    run_folder,
    save,
)

TASKS = {"asr": {"score": 0.2, "majority": 0.1, "samples": 5}, "er": {"score": 0.6, "majority": 0.3, "samples": 5}}


def test_a_trial_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    study = RunFolder(str(tmp_path), "s")
    trials = [
        Trial(
            0,
            0,
            3,
            {"p": ["a", "a"]},
            "finished",
            None,
            2,
            5,
            50.0,
            1.5,
            TASKS,
            ModelCost(1, 2, 3),
            4.0,
            8.0,
            {"k": 1e-3},
        ),
        Trial(11, 1, 3, {"p": []}, "failed", "no"),
    ]
    for trial in trials:
        save(study, trial)
    assert load_all(study) == trials


def test_objectives() -> None:
    assert objective("score", 2.0, TASKS) == pytest.approx(0.4)
    assert objective("score.er", 2.0, TASKS) == 0.6
    assert objective("loss", 2.0, TASKS) == 2.0
    assert objective("score.none", 2.0, TASKS) is None
    assert objective("score", None, {}) is None


def test_the_course_of_a_run_in_progress_can_be_read(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "trial-0000")
    assert history(folder).validations == []
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": 1, "lm_loss": 3.0},
        {"kind": "train", "step": 2, "lm_loss": None},
        {
            "kind": "validation",
            "step": 2,
            "source": "a",
            "loss": 1.0,
            "tasks": {"asr": TASKS["asr"], "er": TASKS["er"]},
        },
        {"kind": "validation", "step": 2, "source": "b", "loss": 3.0, "tasks": {"asr": TASKS["asr"]}},
    ]
    folder.append_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    course = history(folder)
    assert course.train_loss == [(1, 3.0)]
    (validation,) = course.validations
    assert (validation.step, validation.loss) == (2, 2.0)
    assert set(validation.tasks) == {"a/asr", "b/asr", "er"}
    assert course.routing is None


def test_a_validation_without_a_loss_has_none() -> None:
    assert math.isnan(joined(1, [{"source": "a", "loss": None, "tasks": {}}]).loss)


def study(folder: Path, trials: Iterable[Trial]) -> Study:
    sweep = {
        "name": "s",
        "question": "Why?",
        "storage": str(folder),
        "space": {"model.router.top_k": {"choice": [1, 2, 3]}},
    }
    found = RunFolder(str(folder), "s")
    for trial in trials:
        save(found, trial)
    return Study(SweepConfig.model_validate(sweep), cost=lambda config: None)


def scored(number: int, value: float, **changes: Any) -> Trial:
    trial = Trial(number, number, 0, {"model.router.top_k": number + 1}, "finished", step=9, percent=100.0, loss=value)
    tasks = {"asr": {"score": value, "majority": 0.0, "samples": 9}}
    return replace(trial, tasks=tasks, **changes)


def test_the_best_trial_depends_on_the_objective() -> None:
    trials = [scored(0, 0.2), scored(1, 0.7), Trial(2, 2, 0, {})]
    assert best_trial(trials, ObjectiveSection()) is trials[1]
    assert best_trial(trials, ObjectiveSection(metric="loss")) is trials[0]
    assert best_trial(trials[2:], ObjectiveSection()) is None


def test_progress_tells_states_the_best_and_the_time_left(tmp_path: Path) -> None:
    books = study(tmp_path, [scored(0, 0.25), scored(1, 0.5), scored(2, 0.1, status="running", percent=50.0)])
    books.trials[2] = replace(books.trials[2], status="running")
    assert books.expected_trials == 3
    left_s = 25.0
    told = summary(books, left_s)
    assert told.startswith("3 of 3 trials: 1 running, 2 finished")
    assert "best trial-0001 0.500" in told
    assert told.endswith("25s left")
    assert table(books, left_s).row_count == 3


def test_results_are_written_at_most_once_a_minute_and_read_an_ended_trial_once(tmp_path: Path) -> None:
    books = study(tmp_path, [scored(0, 0.25), scored(1, 0.5), Trial(2, 2, 0, {"model.router.top_k": 3})])
    metrics = run_folder(books.folder, books.trials[0])
    metrics.append_text("metrics.jsonl", '{"kind": "train", "step": 1, "lm_loss": 3.0}\n')
    results, report = ResultsWriter(books), tmp_path / "s" / "report.html"
    results.update()
    results.write()
    written = report.read_text()
    assert "loss in training" in written.lower()
    books.over(2, "failed", error="lost")
    metrics.remove("metrics.jsonl")
    report.unlink()
    results.update()
    assert not report.exists(), "the last version is not a minute old"
    results.write()
    assert "loss in training" in report.read_text().lower(), "what an ended trial has left is kept"


def test_the_results_of_a_study_under_way_are_files(tmp_path: Path) -> None:
    result = ResultsWriter(study(tmp_path, [scored(0, 0.25), scored(1, 0.5)])).write()
    assert result["best"]["values"] == {"model.router.top_k": 2}
    assert json.loads(json.dumps(result)) == result
    for name in ("results.csv", "report.html", "best.yaml"):
        assert (tmp_path / "s" / name).stat().st_size > 0, name
    assert ResultsWriter(study(tmp_path / "empty", [])).write()["best"] is None
    assert not (tmp_path / "empty/s/best.yaml").exists()


def test_a_point_is_named_by_its_words_where_there_is_no_room() -> None:
    values = {"model.base_encoder_features": "layer:1", "pool": "with_pool", "model.router.top_k": 2}
    assert point_label(values) == "base_encoder_features = layer:1, pool = with_pool, router.top_k = 2"
    assert point_label(values, 40) == "layer:1, with_pool, router.top_k = 2"
    assert point_label(values, 20) == "layer:1, with_pool,…"
