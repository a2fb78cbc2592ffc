"""Ray Tune: run the trials of a study, several at a time, stop the unpromising ones, and record the results."""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import ray
import ray.tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from mowe_ray.config import RunConfig
from mowe_ray.distributed import cluster, resources
from mowe_ray.distributed.errors import cause_in
from mowe_ray.distributed.ray_train.published import publisher_of_store
from mowe_ray.distributed.ray_tune.trainable import TrialTrainable, changes_of, driver_resources
from mowe_ray.sweeping.schema import LogUniform, SchedulerSection, SweepConfig, Uniform
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import Validation, history, objective, run_folder

_TIME = "percent"
_PAUSING = ("hyperband", "pbt")
_MAX_CONCURRENT_IF_PAUSING = 20  # see `driver_resources`
# For an autoscaler of unknown maximum size, if `resources.concurrent` is not set.
_DEFAULT_CONCURRENT = 4
_TUNE_FOLDER = "tune"  # Tune's files while it runs: pointers to checkpoints; the results are in the study's own


def run_study(study: Study, log: Callable[[str], None], show: Callable[[Study], None]) -> bool:
    """Runs the remaining trials of a study; returns whether it was interrupted, by a signal or by `budget.hours`.

    Args:
        study: The study, whose files are kept up to date.
        log: Called with each line of progress.
        show: Called with the study about once a second and at every change.

    Raises:
        ValueError: The cluster can never hold a trial.
    """
    sweep, base = study.sweep, study.space.base
    concurrent = _join(sweep, base, log)
    log(f"{study.folder.url}: {concurrent} trial{'s' if concurrent > 1 else ''} at a time")
    # Tune's own log files and tables are switched off: the study has both.
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_AIR_NEW_OUTPUT="0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints the stacks of a failed trial
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "1000"  # the limit is ours, in `StudySearcher`
    study.folder.remove(_TUNE_FOLDER)
    searcher, recorder = StudySearcher(study, concurrent), TrialRecorder(study, log, show)
    pauses = sweep.scheduler.kind in _PAUSING
    limit_s = 3600.0 * (sweep.budget.trial_hours or 24.0 * 365)
    sources_of = publisher_of_store()  # named, so that it lives until the study ends
    trainable = ray.tune.with_parameters(TrialTrainable, sources_of=sources_of)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, driver_resources(concurrent if pauses else None)),
        param_space={
            "study": study.folder.url,
            "objective": sweep.objective.metric,
            "limit_s": limit_s,
            "plugins": base.plugin_sources,
        },
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler_of(study),
            num_samples=-1,  # until the searcher is finished
            trial_name_creator=searcher.trial_name_creator(),
            trial_dirname_creator=searcher.trial_name_creator(),
            time_budget_s=None if sweep.budget.hours is None else 3600.0 * sweep.budget.hours,
        ),
        run_config=ray.tune.RunConfig(
            name=_TUNE_FOLDER,
            storage_path=study.folder.url,
            failure_config=ray.tune.FailureConfig(max_failures=sweep.resources.retries),
            callbacks=[recorder],
            verbose=0,
        ),
    )
    tuner.fit()
    interrupted = any(not trial.over for trial in study.trials.values())
    study.interrupted()
    study.folder.remove(_TUNE_FOLDER)
    return interrupted


def _join(sweep: SweepConfig, base: RunConfig, log: Callable[[str], None]) -> int:
    """Connects to Ray; returns how many trials run at a time."""
    workers, asked = base.compute.max_workers, sweep.resources.concurrent
    need = resources.total_resources(base.compute, base.data.decode_cpus, workers)
    cores = os.cpu_count() or 1
    # A local Ray has as many CPUs as its trials ask for: decoding shares the cores with training.
    local = asked or max(1, cores // (workers * base.compute.cpus_per_worker))
    cluster.join(need["CPU"] * local, log)
    if waits := resources.check_resources(need):
        log(waits)
    held = resources.times_that_fit(need, resources.maximum_resources())
    fit = int(held) if math.isfinite(held) else asked or _DEFAULT_CONCURRENT
    if asked is not None and asked > fit:
        raise ValueError(f"resources.concurrent: the cluster holds {fit} trials at a time, not {asked}")
    if sweep.scheduler.kind in _PAUSING:
        fit = min(fit, _MAX_CONCURRENT_IF_PAUSING)
    return min(asked or fit, fit)


class StudySearcher(Searcher):
    """Suggests the next trial of the study whenever Tune asks for one.

    A trial's name, which is also its run folder's, reaches Tune through `trial_name_creator`. It is no part of the
    suggested configuration, because population based training gives a trial the complete configuration of another.
    """

    def __init__(self, study: Study, concurrent: int):
        super().__init__()
        self._study, self._concurrent = study, concurrent
        self._running: set[str] = set()
        self._names: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Returns no state: Tune pickles its parts to restore them, and a study resumes from its own files."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Returns the keys that the scheduler may change in the next trial; None to wait, FINISHED without a trial."""
        # A scheduler that pauses compares trials in groups, and needs to know all of them.
        if len(self._running) >= self._concurrent and self._study.sweep.scheduler.kind not in _PAUSING:
            return None
        if not self._study.ready():  # the disk is full, and a run could not read its configuration
            return None
        trial = self._study.next_trial()
        if trial is None:
            return str(Searcher.FINISHED)
        self._running.add(trial_id)
        self._names[trial_id] = trial.name
        values = {**trial.values, **trial.changed}
        return {name: values[name] for name in self._mutable_keys()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Makes room for another trial; Tune calls it at the end of a trial, but not before a retry."""
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Saves nothing, for the same reason as `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """Restores nothing."""

    def trial_name_creator(self) -> Callable[[TuneTrial], str]:
        """Returns the function that gives Tune the name of a trial; without the searcher, so that Tune can copy it."""
        names = self._names
        return lambda trial: names[trial.trial_id]

    def _mutable_keys(self) -> list[str]:
        sweep = self._study.sweep
        return sweep.mutable if sweep.scheduler.kind == "pbt" else []


class TrialRecorder(ray.tune.Callback):
    """Records the progress and the end of each trial in the study."""

    def __init__(self, study: Study, log: Callable[[str], None], show: Callable[[Study], None]):
        self._study, self._log, self._show = study, log, show
        self._last_event: dict[int, float] = {}
        self._shown = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Returns no state, like `StudySearcher`."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Starts the clock of the trial."""
        self._wall(trial)

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Records a validation."""
        self._study.validated(
            _number(trial),
            Validation(result["step"], result["loss"], result["tasks"]),
            percent=result["percent"],
            wall_s=self._wall(trial),
            changed=changes_of(trial.config),
        )
        self._show_now()

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Records the end of a trial that was finished or stopped."""
        ended = run_folder(self._study.folder, self._study.trials[_number(trial)]).exists("result.json")
        self._study.over(_number(trial), "finished" if ended else "stopped", wall_s=self._wall(trial))
        self._show_now()

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Records that a failed trial is tried again."""
        self._wall(trial)
        self._study.again(_number(trial))
        self._log(f"warning: {trial} failed and is tried again: {_cause(trial)}")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Records a trial that has failed for good."""
        self._study.over(_number(trial), "failed", wall_s=self._wall(trial), error=_cause(trial))
        self._log(f"warning: {trial} failed: {_cause(trial)}")
        self._show_now()

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Refreshes the display."""
        if time.monotonic() - self._shown > 1.0:
            self._show_now()

    def _wall(self, trial: TuneTrial) -> float:
        """Returns the seconds since the last event of the trial; 0 if it has just started."""
        now = time.monotonic()
        before, self._last_event[_number(trial)] = self._last_event.get(_number(trial), now), now
        return now - before

    def _show_now(self) -> None:
        self._shown = time.monotonic()
        self._show(self._study)


def _number(trial: TuneTrial) -> int:
    return int(str(trial).rpartition("-")[2])


def _cause(trial: TuneTrial) -> str:
    """Returns the cause of the last failure of a trial."""
    file = Path(trial.error_file) if trial.error_file else None
    if file is None or not file.exists():
        return "its process died"
    # Tune appends the error of every attempt, after a line of its own.
    return cause_in(file.read_text().rpartition("Failure # ")[2].partition("\n")[2])


def scheduler_of(study: Study) -> TrialScheduler:
    """Returns the scheduler of a study, with the results of its earlier trials."""
    scheduler = _scheduler(study.sweep)
    scheduler.set_search_properties("objective", study.sweep.objective.mode)
    _replay(scheduler, study)
    return scheduler


def _scheduler(sweep: SweepConfig) -> TrialScheduler:
    scheduler = sweep.scheduler
    match scheduler.kind:
        case "none":
            return FIFOScheduler()
        case "asha":
            return AsyncHyperBandScheduler(
                time_attr=_TIME,
                grace_period=scheduler.grace_percent,
                max_t=100,
                reduction_factor=scheduler.reduction_factor,
            )
        case "hyperband":
            return HyperBandScheduler(time_attr=_TIME, max_t=100, reduction_factor=scheduler.reduction_factor)
        case "median":
            return MedianStoppingRule(
                time_attr=_TIME,
                grace_period=scheduler.grace_percent,
                min_samples_required=3,
                min_time_slice=math.inf,  # or it pauses trials to let others begin; they have slots of their own
            )
        case "pbt":
            random.seed(sweep.search.seed)  # Ray's PBT draws from the global generator
            return _population(sweep, scheduler)


def _population(sweep: SweepConfig, scheduler: SchedulerSection) -> PopulationBasedTraining:
    return PopulationBasedTraining(
        time_attr=_TIME,
        perturbation_interval=scheduler.interval_percent,
        hyperparam_mutations={name: _domain(sweep.space[name]) for name in sweep.mutable},
        quantile_fraction=scheduler.quantile,
        resample_probability=scheduler.resample_probability,
        log_config=False,
    )


def _domain(entry: object) -> Any:
    match entry:
        case Uniform(uniform=bounds):
            return ray.tune.uniform(*bounds)
        case LogUniform(loguniform=bounds):
            return ray.tune.loguniform(*bounds)
    return list(cast("Iterable[Any]", getattr(entry, "choice", None) or getattr(entry, "grid", None)))


def _replay(scheduler: TrialScheduler, study: Study) -> None:
    """Reports the results of earlier trials to a scheduler that compares trials with earlier ones."""
    if study.sweep.scheduler.kind not in ("asha", "median"):
        return
    metric = study.sweep.objective.metric
    for trial in study.trials.values():
        if trial.status not in ("finished", "stopped"):
            continue
        stub = TuneTrial("replayed", stub=True, trial_id=trial.name)
        scheduler.on_trial_add(None, stub)
        for validation in history(run_folder(study.folder, trial)).validations:
            value = objective(metric, validation.loss, validation.tasks)
            percent = trial.percent * validation.step / max(1, trial.step)
            scheduler.on_trial_result(None, stub, {_TIME: percent, "objective": value})
