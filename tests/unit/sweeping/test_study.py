"""The books: order of trials, replicas, going on after an interruption, growing."""

import json
from pathlib import Path
from typing import Any

import pytest

from mowe_ray.config import RunConfig
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import ModelCost, Validation

SPACE = {"model.router.top_k": {"choice": [1, 2, 3]}}


def cost(config: RunConfig) -> ModelCost:
    return ModelCost(10.0 * config.model.router.top_k, 1.0, 2.0)


def study(folder: Path, **keys: Any) -> Study:
    tree = {"name": "s", "question": "Why?", "storage": str(folder), "space": SPACE} | keys
    return Study(SweepConfig.model_validate(tree), cost)


def score(value: float) -> Validation:
    return Validation(5, 1.0, {"asr": {"score": value, "majority": 0.1, "samples": 10}})


def finish(books: Study, number: int, value: float) -> None:
    books.validated(number, score(value), percent=100.0, wall_s=2.0, changed={})
    books.over(number, "finished", wall_s=1.0)


def test_every_point_with_every_seed_then_nothing(tmp_path: Path) -> None:
    books = study(tmp_path, seeds=[4, 5])
    trials = []
    while (trial := books.next_trial()) is not None:
        trials.append(trial)
    assert [(t.number, t.point, t.seed, t.values["model.router.top_k"]) for t in trials] == [
        (0, 0, 4, 1),
        (1, 0, 5, 1),
        (2, 1, 4, 2),
        (3, 1, 5, 2),
        (4, 2, 4, 3),
        (5, 2, 5, 3),
    ]
    assert books.expected_trials == 6
    assert [t.cost.stored for t in trials if t.cost] == [10, 10, 20, 20, 30, 30]


def test_a_trials_run_is_written_out_before_it_starts(tmp_path: Path) -> None:
    books = study(tmp_path, seeds=[7], set={"training.epochs": 2})
    trial = books.next_trial()
    assert trial is not None
    config = RunConfig.model_validate(json.loads((tmp_path / "s/trial-0000/config.json").read_text()))
    assert config == books.config(trial)
    assert (config.name, config.seed, config.training.epochs) == ("trial-0000", 7, 2)
    assert config.storage == str(tmp_path / "s")
    assert config.tracking.wandb.group == "s"


def test_the_same_study_goes_on_where_it_was(tmp_path: Path) -> None:
    books = study(tmp_path)
    for _ in range(2):
        books.next_trial()
    finish(books, 0, 0.5)
    books.validated(1, score(0.2), percent=40.0, wall_s=2.0, changed={})
    again = study(tmp_path)
    assert [t.status for t in again.trials.values()] == ["finished", "waiting"]
    running = again.next_trial()
    assert running is not None
    assert (running.number, running.attempts, running.percent, running.wall_s) == (1, 2, 40.0, 2.0)
    new = again.next_trial()
    assert new is not None
    assert (new.number, new.values) == (2, {"model.router.top_k": 3})
    assert again.next_trial() is None


def test_failed_trials_stay_failed_until_their_folder_is_removed(tmp_path: Path) -> None:
    books = study(tmp_path)
    books.next_trial()
    books.over(0, "failed", error="no memory")
    again = study(tmp_path)
    assert (again.trials[0].status, again.trials[0].error) == ("failed", "no memory")
    (tmp_path / "s/trial-0000/trial.json").unlink()
    values = [trial.values for trial in iter(study(tmp_path).next_trial, None)]
    assert values == [{"model.router.top_k": 1}, {"model.router.top_k": 2}, {"model.router.top_k": 3}]


def test_a_study_may_grow_but_not_become_another(tmp_path: Path) -> None:
    first = study(tmp_path, budget={"points": 1})
    assert first.next_trial() is not None
    finish(first, 0, 0.4)
    assert first.next_trial() is None
    grown = study(tmp_path, budget={"points": 2}, seeds=[0, 1])
    trials = list(iter(grown.next_trial, None))
    assert [(trial.point, trial.seed) for trial in trials] == [(0, 1), (1, 0), (1, 1)]
    with pytest.raises(ValueError, match="another space: choose another name"):
        study(tmp_path, space={"model.router.top_k": {"choice": [1]}})


def test_random_points_are_the_same_after_an_interruption(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "space": {"training.clip_norm": {"uniform": [0, 1]}},
        "search": {"kind": "random"},
        "budget": {"points": 6},
    }
    whole = [trial.values for trial in iter(study(tmp_path / "a", **keys).next_trial, None)]
    broken = study(tmp_path / "b", **keys)
    for number in range(3):
        broken.next_trial()
        finish(broken, number, 0.1)
    rest = [trial.values for trial in iter(study(tmp_path / "b", **keys).next_trial, None)]
    assert [*(t.values for t in broken.trials.values()), *rest] == whole


def test_time_adds_up_over_attempts_and_workers(tmp_path: Path) -> None:
    books = study(tmp_path, set={"compute.num_workers": 2})
    books.next_trial()
    finish(books, 0, 0.3)
    assert (books.trials[0].wall_s, books.trials[0].device_s) == (3.0, 6.0)


def test_trials_that_are_paused_or_copied_keep_their_checkpoints(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"scheduler": {"kind": "hyperband"}, "set": {"training.eval_every": 3}}
    books = study(tmp_path, **keys)
    trial = books.next_trial()
    assert trial is not None
    training = books.config(trial).training
    assert (training.save_every, training.keep_checkpoints) == (3, 1000)
