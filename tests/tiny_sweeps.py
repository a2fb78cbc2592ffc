"""Small studies: a sweep file around the tiny run, run here on the tests' Ray, and what is left in its folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mowe_ray.output.run_folder import RunFolder
from mowe_ray.sweeping.load import load_sweep
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import Trial, load_all
from tests.tiny_runs import TINY, Corpus


def write_sweep(folder: Path, corpus: Corpus, **keys: Any) -> Path:
    """Write the sweep file of a study of tiny runs; `keys` are added, `set` on top of what makes them tiny."""
    tiny = {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in TINY)}
    tiny |= {
        "training.max_steps": 12,
        "training.eval_every": 4,
        "data.train": [{"path": str(corpus.train)}],
        "data.validation": [{"path": str(corpus.validation), "name": "held_out"}],
    }
    tree = {"name": "study", "question": "Which is best?", "storage": str(folder / "runs"), "base": "quickstart"}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree | keys | {"set": tiny | keys.get("set", {})}))
    return path


def run_here(sweep: Path, *overrides: str, show: Callable[[Study], None] = lambda study: None) -> Study:
    """Run a study on the Ray of this process, to its end."""
    from mowe_ray.distributed.ray_tune.tuner import run_study

    study = Study(load_sweep(sweep, overrides), cost=lambda config: None)
    assert run_study(study, log=print, show=show) is False
    return study


def trials_in(study: Path) -> list[Trial]:
    """Return the trials in a study's folder, by number."""
    return load_all(RunFolder(str(study.parent), study.name))


def log_of(study: Path, trial: Trial) -> str:
    """Return what the run of a trial has said."""
    return (study / trial.name / "log.txt").read_text()
