"""What Tune asks of a study, without a cluster."""

import copy
import pickle
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import Searcher

from mowe_ray.distributed.ray_tune.tuner import StudySearcher
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.study import Study

RATES = [1e-4, 1e-3, 1e-2]


def study(folder: Path, **keys: Any) -> Study:
    space = {"training.learning_rate": {"grid": RATES}}
    tree = {"name": "s", "question": "Why?", "storage": str(folder), "space": space} | keys
    return Study(SweepConfig.model_validate(tree), cost=lambda config: None)


def test_trials_are_suggested_as_others_end(tmp_path: Path) -> None:
    searcher = StudySearcher(study(tmp_path), concurrent=2)
    assert [searcher.suggest(name) for name in "abc"] == [{}, {}, None]
    searcher.on_trial_complete("a", error=True)
    assert [searcher.suggest(name) for name in "cd"] == [{}, None]
    searcher.on_trial_complete("b")
    assert searcher.suggest("d") == Searcher.FINISHED


def test_a_scheduler_that_pauses_gets_all_trials_at_once_and_the_keys_it_may_change(tmp_path: Path) -> None:
    keys = {"scheduler": {"kind": "pbt"}, "search": {"kind": "random"}, "budget": {"points": 3}}
    space = {"training.learning_rate": {"loguniform": [1e-4, 1e-2]}, "model.router.top_k": {"choice": [1, 2]}}
    made = study(tmp_path, space=space, **keys)
    searcher = StudySearcher(made, concurrent=1)
    suggested = [searcher.suggest(name) for name in "abcd"]
    rates = [trial.values["training.learning_rate"] for trial in made.trials.values()]
    assert suggested == [*({"training.learning_rate": rate} for rate in rates), Searcher.FINISHED]


def test_a_trial_of_tune_has_the_name_of_the_trial_of_the_study(tmp_path: Path) -> None:
    """Tune copies the specification of a trial, and pickles it; the configuration goes from trial to trial."""
    made = study(tmp_path)
    searcher = StudySearcher(made, concurrent=3)
    creator = copy.deepcopy(searcher.trial_name_creator())
    for tune_id in "xyz":
        assert searcher.suggest(tune_id) == {}
    trials = [TuneTrial("t", stub=True, trial_id=tune_id, trial_name_creator=creator) for tune_id in "xyz"]
    assert [str(trial) for trial in trials] == [trial.name for trial in made.trials.values()]


def test_nothing_of_the_study_is_in_the_files_of_tune(tmp_path: Path) -> None:
    searcher = StudySearcher(study(tmp_path), concurrent=1)
    searcher.suggest("a")
    assert vars(pickle.loads(pickle.dumps(searcher))) == {}
    searcher.save_to_dir(str(tmp_path), "session")
    assert not list(tmp_path.glob("*session*"))
