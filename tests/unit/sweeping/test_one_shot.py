"""The course of a one-shot study: the supernets first, then pools spread over their ranking, also after a stop."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from mowe_ray.config import ConfigError
from mowe_ray.sweeping.dry_run import dry_run
from mowe_ray.sweeping.load import load_sweep
from mowe_ray.sweeping.one_shot import is_unscored, spread
from mowe_ray.sweeping.report.results import ResultsWriter
from mowe_ray.sweeping.schema import POOL_KEY, SUPERNET_KEY, SweepConfig
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import Trial, Validation

ALL = ["whisper", "hubert", "wav2vec2"]


def sweep(folder: Path, *overrides: str) -> SweepConfig:
    return load_sweep("oneshot", [f"storage={folder}", "search.calibrate=3", *overrides])


def opened(folder: Path, *overrides: str) -> Study:
    return Study(sweep(folder, *overrides), cost=lambda config: None)


def run(study: Study, trial: Trial) -> None:
    pool = trial.values[POOL_KEY]
    tasks = {"asr": {"score": 0.1 * len(pool) + 0.3 * ("hubert" in pool), "majority": 0.1, "samples": 9}}
    study.validated(trial.number, Validation(300, 1.0, tasks), percent=100.0, wall_s=1.0, changed={})
    study.over(trial.number, "finished")


def write_scores(study: Study, trial: Trial) -> None:
    pools: list[list[str]] = [[], *(point[POOL_KEY] for point in study.space.points())]
    rows = [
        {"members": pool, "dataset": "held_out", "task": "asr", "samples": 9,
         "score": 0.1 * len(pool) + 0.2 * ("hubert" in pool)}
        for pool in pools
    ]  # fmt: skip
    study.folder.write_json(f"pools/{trial.name}/scores.json", {"pools": rows, "shapley": []})


def run_all(study: Study, most: int = 100) -> list[Trial]:
    ran = []
    while len(ran) < most and (trial := study.next_trial()):
        run(study, trial)
        ran.append(trial)
    return ran


def test_a_study_trains_supernets_then_pools_from_the_first_to_the_last(tmp_path: Path) -> None:
    study = opened(tmp_path)
    assert study.expected_trials == 8
    supernets = run_all(study)
    assert [(trial.values, trial.seed) for trial in supernets] == [
        ({POOL_KEY: ALL, SUPERNET_KEY: True}, 0), ({POOL_KEY: ALL, SUPERNET_KEY: True}, 1)
    ]  # fmt: skip
    config = study.config(supernets[0])
    assert config.training.pool_dropout
    assert [member.name for member in config.model.weak_encoders] == ALL

    assert is_unscored(study.sweep, study.folder, study.trials.values())
    write_scores(study, supernets[0])
    assert is_unscored(study.sweep, study.folder, study.trials.values())
    write_scores(study, supernets[1])
    assert not is_unscored(study.sweep, study.folder, study.trials.values())

    # Stopped after each trial: the same points in the same order.
    alone = [trial for _ in range(9) for trial in run_all(opened(tmp_path), most=1)]
    assert [(trial.values[POOL_KEY], trial.seed) for trial in alone] == [
        (pool, seed) for pool in (ALL, ["hubert"], ["wav2vec2"]) for seed in (0, 1)
    ]
    assert not study.config(alone[0]).training.pool_dropout
    assert opened(tmp_path).next_trial() is None


def test_the_results_rank_pools_and_leave_the_supernet_out(tmp_path: Path) -> None:
    study = opened(tmp_path)
    for trial in run_all(study):
        write_scores(study, trial)
    study = opened(tmp_path)
    run_all(study)
    result = ResultsWriter(study).write()
    assert result["points"] == 3
    assert SUPERNET_KEY not in result["best"]["values"]
    assert [row["pool"] for row in result["one_shot"]["pools"]][:2] == [ALL, ["whisper", "hubert"]]
    assert result["one_shot"]["tau"]["value"] == 1.0
    assert result["answer"].startswith("The one-shot ranking is not to be trusted: only 3 pools")
    html = (tmp_path / "oneshot" / "report.html").read_text()
    assert {"One-shot ranking", "Can the ranking be trusted?"} <= {part.split("<")[0] for part in html.split("<h2>")}
    assert "pool_dropout" in html
    json.dumps(result)


def test_a_dry_run_counts_trainings_and_evaluations(tmp_path: Path) -> None:
    out = io.StringIO()
    facts: dict[str, Any] = dry_run(sweep(tmp_path), lambda config: None, out)
    assert facts["one_shot"] == {"encoders": 3, "supernets": 2, "pools": 8, "evaluations": 16, "alone": 3}
    assert (facts["points"], facts["trials"]) == (4, 8)
    assert "16 passes over the validation data: 8 pools with each supernet" in out.getvalue()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("space={training.learning_rate: {grid: [1, 2]}}", "oneshot searches model.weak_encoders alone"),
        ("space={model.weak_encoders: {pools: [[hubert]]}}", "given as subsets"),
        ("scheduler.kind=asha", "scheduler.kind: oneshot compares complete trainings"),
        ("budget.points=4", "budget.points: with oneshot, search.calibrate"),
        ("objective.metric=loss", "objective.metric: oneshot ranks by score"),
        ("search.calibrate=1", "search.calibrate"),
    ],
)
def test_what_one_shot_cannot_do_is_refused(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sweep(tmp_path, override)


def test_items_are_spread_from_end_to_end() -> None:
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 6) == [1, 2]
    assert spread([], 3) == []
