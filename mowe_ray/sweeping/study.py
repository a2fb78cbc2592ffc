"""The state of a study: its trials, which of them runs next, and their results.

Everything is kept in the trials' files (`trials.py`), which are written at every change. The same command therefore
resumes a study after any interruption: finished trials are not run again, others continue from their checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from mowe_ray.config import RunConfig
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.sweeping.one_shot import load_supernets
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.search import Directions, key, make_search
from mowe_ray.sweeping.search_space import PointValues, SearchSpace
from mowe_ray.sweeping.trials import (
    ModelCost,
    Trial,
    Validation,
    folder_numbers,
    load_all,
    run_folder,
    save,
    with_validation,
)

SWEEP_FILE = "sweep.json"
# What may differ when a study goes on: it may grow, and share the cluster in another way.
_FREE_TO_CHANGE = {"question", "budget", "resources", "seeds"}


class Study:
    """The trials of a study, in its folder.

    A storage that cannot be written for a while, as a full disk, ends no study: what has changed is kept and written
    later, and no trial begins before that.

    Args:
        cost: Returns what the model of a configuration costs; None if that is not known.
        log: Called with warnings: of damaged files, and of a storage that cannot be written.

    Raises:
        ValueError: The folder holds another study.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        cost: Callable[[RunConfig], ModelCost | None],
        log: Callable[[str], object] = lambda line: None,
    ):
        self.sweep, self._cost, self._log = sweep, cost, log
        self.folder = RunFolder(sweep.storage, sweep.name)
        self.space = SearchSpace(sweep)
        _claim(self.folder, sweep)
        self.trials = {trial.number: trial for trial in load_all(self.folder, log)}
        # Folders without a readable file may hold checkpoints of another configuration: their numbers are taken.
        self._next_number = max([-1, *folder_numbers(self.folder)]) + 1
        # By number: whether the trial's configuration is to be written as well.
        self._unsaved: dict[int, bool] = {}
        self._warned = False
        # By value: the search may propose a point again.
        self._points: dict[str, int] = {key(trial.values): trial.point for trial in self.trials.values()}
        self._waiting = [trial.number for trial in self.trials.values() if not trial.over]
        for number in self._waiting:  # left over from a run that was interrupted
            trial = replace(self.trials[number], status="waiting")
            self._update(trial, config=run_folder(self.folder, trial).find_json("config.json") is None)
        supernets = load_supernets(sweep, self.folder, self.trials.values())
        self._search = make_search(self.space, self.directions, supernets)
        for point in sorted(set(self._points.values())):
            self._report_to_search(point)

    @property
    def directions(self) -> Directions:
        """Directions of the objective, and of the cost that is minimised with it."""
        objective = self.sweep.objective
        return [objective.mode, "min"] if objective.against else [objective.mode]

    def ready(self) -> bool:
        """Whether the files of the next trial, if there is one, are written, and all that has changed before."""
        if not self._waiting:
            self._waiting = self._replicas() or self._new_point()
        return self.save()

    def next_trial(self) -> Trial | None:
        """Return the next trial to run, with the status `running`; None when there is none left."""
        self.ready()
        if not self._waiting:
            return None
        trial = self.trials[self._waiting.pop(0)]
        return self._update(replace(trial, status="running", attempts=trial.attempts + 1))

    def config(self, trial: Trial) -> RunConfig:
        """Return the configuration of a trial's run."""
        given: dict[str, Any] = {"name": trial.name, "storage": self.folder.url, "seed": trial.seed, "resume": True}
        base = self.space.base
        if base.tracking.wandb.group is None:
            given["tracking.wandb.group"] = self.sweep.name
        if self.sweep.resources.share_features and base.data.feature_cache is None and "://" not in self.folder.url:
            given["data.feature_cache"] = f"{self.folder.storage}/features"
        if self.sweep.scheduler.kind in ("hyperband", "pbt"):
            # Trials are paused, and copied, at validations; copies may be made of any of them.
            given |= {"training.save_every": base.training.eval_every, "training.keep_checkpoints": 1000}
        return self.space.config({**trial.values, **trial.changed}, **given)

    def validated(
        self, number: int, validation: Validation, *, percent: float, wall_s: float, changed: dict[str, Any]
    ) -> None:
        """Record a validation of a running trial.

        Args:
            number: Number of the trial.
            validation: Its scores.
            percent: Share of the run that is done.
            wall_s: Seconds since the last record of the trial.
            changed: Values that the scheduler has given to keys during the run.
        """
        trial = with_validation(self.trials[number], validation, percent)
        self._update(replace(self._spent(trial, wall_s), changed=changed))

    def again(self, number: int) -> None:
        """Record a retry of a trial that failed."""
        trial = self.trials[number]
        self._update(replace(trial, attempts=trial.attempts + 1))

    def over(
        self,
        number: int,
        status: Literal["finished", "stopped", "failed"],
        *,
        wall_s: float = 0.0,
        error: str | None = None,
    ) -> None:
        """Record the end of a trial, `wall_s` seconds after the last record of it."""
        trial = self._spent(self.trials[number], wall_s)
        self._report_to_search(self._update(replace(trial, status=status, error=error)).point)

    def interrupted(self) -> None:
        """Set the running trials back to `waiting`, for the next start of the study."""
        for trial in list(self.trials.values()):
            if trial.status == "running":
                self._update(replace(trial, status="waiting"))

    def save(self, *, insist: bool = False) -> bool:
        """Write what has changed; returns whether all of it is written, or raises OSError if told to `insist`."""
        try:
            for number, with_config in list(self._unsaved.items()):
                trial = self.trials[number]
                if with_config:  # first: a trial that has a file can be run
                    run_folder(self.folder, trial).write_json("config.json", self.config(trial).model_dump(mode="json"))
                save(self.folder, trial)
                del self._unsaved[number]
        except OSError as error:
            if insist:
                raise
            if not self._warned:
                self._log(f"warning: storage: {self.folder.url} cannot be written, new trials wait: {error}")
            self._warned = True
        else:
            self._warned = False
        return not self._unsaved

    @cached_property
    def expected_trials(self) -> int | None:
        """Number of trials the study will have; None if only the search can determine it."""
        points = self.space.expected_points
        return None if points is None else points * len(self.sweep.seeds)

    def _replicas(self) -> list[int]:
        """Add the trials that known points lack, as after a seed was added; returns their numbers."""
        seeds = {(trial.point, trial.seed) for trial in self.trials.values()}
        values = {trial.point: trial.values for trial in self.trials.values()}
        missing = [(point, seed) for point in sorted(values) for seed in self.sweep.seeds if (point, seed) not in seeds]
        return [self._add(values[point], point, seed) for point, seed in missing]

    def _new_point(self) -> list[int]:
        """Add the next point of the search; returns the numbers of its trials."""
        most = self.space.expected_points if self.sweep.search.kind == "oneshot" else self.sweep.budget.points
        while most is None or len(self._points) < most:
            values = self._search.next()
            if values is None:
                return []
            if key(values) not in self._points:  # a listed search begins from its start again
                point = self._points[key(values)] = max(self._points.values(), default=-1) + 1
                return [self._add(values, point, seed) for seed in self.sweep.seeds]
        return []

    def _add(self, values: PointValues, point: int, seed: int) -> int:
        trial = Trial(number=self._next_number, point=point, seed=seed, values=values)
        self._next_number += 1
        self._update(replace(trial, cost=self._cost(self.config(trial))), config=True)
        return trial.number

    def _spent(self, trial: Trial, wall_s: float) -> Trial:
        workers = self.space.base.compute.max_workers
        return replace(trial, wall_s=trial.wall_s + wall_s, device_s=trial.device_s + wall_s * workers)

    def _update(self, trial: Trial, *, config: bool = False) -> Trial:
        self.trials[trial.number] = trial
        self._unsaved[trial.number] = config or self._unsaved.get(trial.number, False)
        self.save()
        return trial

    def _report_to_search(self, point: int) -> None:
        """Report a point to the search once all its trials are over."""
        trials = [trial for trial in self.trials.values() if trial.point == point]
        if len(trials) < len(self.sweep.seeds) or not all(trial.over for trial in trials):
            return
        objectives = [self._objectives(trial) for trial in trials if trial.status != "failed"]
        complete = [values for values in objectives if None not in values]
        means = [sum(column) / len(column) for column in zip(*complete, strict=True)]
        self._search.tell(trials[0].values, means or None)

    def _objectives(self, trial: Trial) -> list[float | None]:
        objective = self.sweep.objective
        values = [trial.objective(objective.metric)]
        if objective.against:
            cost = trial.cost
            values.append(None if cost is None else cost.gflops if objective.against == "gflops" else cost.active)
        return values


@dataclass(frozen=True)
class KeptStudy:
    """A study as its folder holds it, for results only: nothing of it is run or written."""

    sweep: SweepConfig
    space: SearchSpace
    folder: RunFolder
    trials: Mapping[int, Trial]

    @classmethod
    def load(cls, folder: RunFolder, log: Callable[[str], object] = lambda line: None) -> KeptStudy:
        """Read a folder, which may have been moved.

        Raises:
            ValueError: It holds no study, or its base configuration is not found.
        """
        sweep = SweepConfig.model_validate(folder.read_json(SWEEP_FILE))
        trials = {trial.number: trial for trial in load_all(folder, log)}
        return cls(sweep, SearchSpace(sweep), folder, trials)


def best_config(space: SearchSpace, best: Trial) -> RunConfig:
    """Return the configuration that trains the point of a trial again, as a run of its own beside the study."""
    given = {"name": f"{space.sweep.name}-best", "storage": space.sweep.storage, "seed": best.seed}
    return space.config({**best.values, **best.changed}, **given)


def check_same_study(folder: RunFolder, sweep: SweepConfig) -> None:
    """Raise ValueError if the folder holds a study that `sweep` cannot go on with."""
    if not folder.exists(SWEEP_FILE):
        return
    try:
        old, new = folder.read_json(SWEEP_FILE), sweep.model_dump(mode="json", by_alias=True)
        differing = [name for name in new if name not in _FREE_TO_CHANGE and old.get(name) != new[name]]
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{error}: remove the file if the folder holds this study, or choose another name (name=...)"
        ) from error
    if differing:
        raise ValueError(
            f"{folder.url} holds a study with another {differing[0]}: choose another name (name=...), "
            "or go back to its value"
        )


def _claim(folder: RunFolder, sweep: SweepConfig) -> None:
    """Write the study's configuration into its folder, which must be new or of this study."""
    check_same_study(folder, sweep)
    folder.write_json(SWEEP_FILE, sweep.model_dump(mode="json", by_alias=True))
