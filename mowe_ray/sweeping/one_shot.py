"""One-shot search: the weights of one training score every pool, and pools along that ranking are trained alone.

The training is a supernet: it has all encoders, and `training.pool_dropout` lets each clip use some of them. Whether
its ranking is that of pools trained alone is what `analysis/calibration.py` tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from mowe_ray.output.run_folder import RunFolder
from mowe_ray.sweeping.schema import POOL_KEY, SweepConfig
from mowe_ray.sweeping.search_space import PointValues, SearchSpace
from mowe_ray.sweeping.trials import Trial, joined, objective

SCORES_FOLDER = "pools"  # of the study: an evaluation over all its supernets
LOGME_FILE = f"{SCORES_FOLDER}/logme.json"
Pool = frozenset[str]


@dataclass(frozen=True)
class Supernet:
    """What one seed's supernet scores with each pool.

    Attributes:
        tasks: By pool and task, as a trial's.
        shapley: Of each encoder and task, as `scores.json` has them.
    """

    seed: int
    tasks: Mapping[Pool, dict[str, dict[str, float]]]
    shapley: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def score(self, pool: Iterable[str], metric: str) -> float | None:
        """Return the objective of a pool; None if it was not scored."""
        return objective(metric, None, self.tasks.get(frozenset(pool), {}))


def supernet_trials(config: SweepConfig, trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that trained a supernet to its end; none before all seeds' are over."""
    ours = [trial for trial in trials if config.is_supernet(trial.values)]
    return [trial for trial in ours if trial.status == "finished"] if all(trial.over for trial in ours) else []


def load_supernets(config: SweepConfig, folder: RunFolder, trials: Iterable[Trial]) -> list[Supernet]:
    """Return the scores of all supernets; none while some are missing, as in a study that was interrupted before."""
    trained = supernet_trials(config, trials)
    found = [folder.find_json(f"{SCORES_FOLDER}/{trial.name}/scores.json") for trial in trained]
    pairs = zip(trained, found, strict=True)
    supernets = [_supernet(trial.seed, scores) for trial, scores in pairs if scores and scores.get("pools")]
    return supernets if len(supernets) == len(trained) else []


def load_logme(folder: RunFolder) -> dict[Pool, float]:
    """Return LogME of the pools, a ranking without training; empty where it was not computed."""
    rows = (folder.find_json(LOGME_FILE) or {}).get("pools", [])
    return {frozenset(row["members"]): row["logme"] for row in rows}


def is_unscored(config: SweepConfig, folder: RunFolder, trials: Iterable[Trial]) -> bool:
    """Whether there are supernets, all trained, of which some have no scores yet."""
    trials = list(trials)
    return bool(supernet_trials(config, trials)) and not load_supernets(config, folder, trials)


def _supernet(seed: int, scores: Mapping[str, Any]) -> Supernet:
    by_pool: dict[Pool, dict[str, dict[str, dict[str, float]]]] = {}
    for row in scores["pools"]:
        tasks = by_pool.setdefault(frozenset(row["members"]), {}).setdefault(row["dataset"], {})
        tasks[row["task"]] = {"score": row["score"], "samples": row["samples"]}
    tasks_of = {
        pool: joined(0, [{"source": name, "tasks": tasks, "loss": None} for name, tasks in datasets.items()]).tasks
        for pool, datasets in by_pool.items()
    }
    return Supernet(seed, tasks_of, scores["shapley"])


def one_shot_score(supernets: Sequence[Supernet], pool: Iterable[str], metric: str) -> float | None:
    """Return the mean over supernets; None if one has not scored the pool."""
    names = frozenset(pool)
    scores = [supernet.score(names, metric) for supernet in supernets]
    known = [score for score in scores if score is not None]
    return fmean(known) if known and len(known) == len(scores) else None


def ranking(space: SearchSpace, supernets: Sequence[Supernet]) -> list[tuple[list[str], float]]:
    """Return the pools of the space that were scored, best first; of equals the smaller one."""
    pools: list[list[str]] = [point[POOL_KEY] for point in space.points()]
    scored = [(pool, one_shot_score(supernets, pool, space.sweep.objective.metric)) for pool in pools]
    known = [(pool, score) for pool, score in scored if score is not None]
    return sorted(known, key=lambda row: (-row[1], len(row[0])))


def one_shot_points(space: SearchSpace, supernets: Sequence[Supernet]) -> Iterator[PointValues]:
    """Yield the supernet and, once there is a ranking, the pools to train alone: its ends, and evenly between them."""
    yield space.supernet()
    yield from ({POOL_KEY: pool} for pool, _ in spread(ranking(space, supernets), space.sweep.search.calibrate))


def spread(ranked: Sequence[Any], count: int) -> list[Any]:
    """Return so many items from the first to the last, at equal distances."""
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [ranked[i] for i in places]
