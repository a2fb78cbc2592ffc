"""The books: order of trials, replicas, going on after an interruption, growing."""

import json
from collections.abc import Callable
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


def study(folder: Path, *, log: Callable[[str], object] = lambda line: None, **keys: Any) -> Study:
    tree = {"name": "s", "question": "Why?", "storage": str(folder), "space": SPACE} | keys
    return Study(SweepConfig.model_validate(tree), cost, log)


def score(value: float) -> Validation:
    return Validation(5, 1.0, {"asr": {"score": value, "majority": 0.1, "samples": 10}})


def finish(books: Study, number: int, value: float) -> None:
    books.validated(number, score(value), percent=100.0, wall_s=2.0, changed={})
    books.over(number, "finished", wall_s=1.0)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_trials_that_are_paused_or_copied_keep_their_checkpoints(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"scheduler": {"kind": "hyperband"}, "set": {"training.eval_every": 3}}
    books = study(tmp_path, **keys)
    trial = books.next_trial()
    assert trial is not None
    training = books.config(trial).training
    assert (training.save_every, training.keep_checkpoints) == (3, 1000)


@pytest.mark.parametrize("content", [b"", bytes(200), b'{"number": 0}', b"[]"])
def test_a_damaged_trial_is_told_and_its_point_run_again_in_another_folder(tmp_path: Path, content: bytes) -> None:
    books = study(tmp_path)
    for number in range(2):
        books.next_trial()
        finish(books, number, 0.1)
    (tmp_path / "s/trial-0001/trial.json").write_bytes(content)
    said: list[str] = []
    again = study(tmp_path, log=said.append)
    assert list(again.trials) == [0]
    assert len(said) == 1
    assert f"{tmp_path}/s/trial-0001/trial.json is damaged" in said[0]
    # Not 1: that folder may hold checkpoints of another configuration.
    assert [(t.number, t.values["model.router.top_k"]) for t in iter(again.next_trial, None)] == [(2, 2), (3, 3)]
    assert [trial.number for trial in study(tmp_path).trials.values()] == [0, 2, 3]


def test_a_damaged_study_names_its_file_and_what_to_do(tmp_path: Path) -> None:
    study(tmp_path)
    (tmp_path / "s/sweep.json").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{tmp_path}/s/sweep.json is damaged.*remove the file if"):
        study(tmp_path)
    (tmp_path / "s/sweep.json").unlink()
    study(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_a_trial_that_goes_on_gets_its_configuration_again_if_it_is_damaged(
    tmp_path: Path, content: bytes | None
) -> None:
    books = study(tmp_path)
    trials = [books.next_trial() for _ in range(2)]
    assert trials[0] is not None
    damaged, changed = (tmp_path / f"s/trial-000{n}/config.json" for n in range(2))
    if content is None:
        damaged.unlink()  # as by a kill between the two files of a new trial
    else:
        damaged.write_bytes(content)
    changed.write_text(json.dumps({"changed": "by the scheduler"}))
    again = study(tmp_path)
    assert RunConfig.model_validate(json.loads(damaged.read_text())) == again.config(trials[0])
    assert json.loads(changed.read_text()) == {"changed": "by the scheduler"}


def test_a_storage_that_cannot_be_written_ends_nothing_and_all_is_written_later(tmp_path: Path) -> None:
    said: list[str] = []
    books = study(tmp_path, log=said.append)
    assert books.next_trial() is not None
    (tmp_path / "s").rename(tmp_path / "away")
    (tmp_path / "s").touch()
    finish(books, 0, 0.7)
    assert not books.ready(), "a run could not read its configuration"
    assert not books.ready()
    with pytest.raises(OSError, match="s/trial"):
        books.save(insist=True)
    assert len(said) == 1
    assert "cannot be written, new trials wait" in said[0]
    (tmp_path / "s").unlink()
    (tmp_path / "away").rename(tmp_path / "s")
    assert books.ready()
    new = books.next_trial()
    assert new is not None
    again = study(tmp_path)
    assert [(t.number, t.status) for t in again.trials.values()] == [(0, "finished"), (1, "waiting")]
    assert again.trials[0].tasks["asr"]["score"] == 0.7
    assert RunConfig.model_validate(json.loads((tmp_path / "s/trial-0001/config.json").read_text())) == again.config(
        new
    )
