"""What a study would train and what that costs, told without a cluster and without writing anything."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from statistics import fmean
from typing import Any, TextIO

from mowe_ray.config import RunConfig
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.sweeping.dry_run_text import write_plan
from mowe_ray.sweeping.labels import point_label
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.search import random_points
from mowe_ray.sweeping.space import Factor, Space
from mowe_ray.sweeping.study import Study, refuse_another
from mowe_ray.sweeping.trials import Cost, Trial, load_all, save
from mowe_ray.sweeping.work import Work, device

# Points whose mean cost stands for a search that has not chosen yet.
_SAMPLED = 16


def dry_run(sweep: SweepConfig, cost: Callable[[RunConfig], Cost | None], out: TextIO) -> dict[str, Any]:
    """Write the plan of a study to `out`; return the same facts, None where something is not known.

    Args:
        cost: Returns what the model of a configuration costs; None if that is not known.

    Raises:
        ValueError: The study could not start: its data cannot be used, or its folder holds another.
    """
    folder, space, work = RunFolder(sweep.storage, sweep.name), Space(sweep), Work(cost)
    refuse_another(folder, sweep)
    earlier = load_all(folder)
    chosen_beforehand = sweep.search.kind != "optuna"
    planned = list(_planned(sweep, work, earlier)) if chosen_beforehand else []
    points = len({trial.point for trial, _ in planned}) if chosen_beforehand else sweep.budget.points
    assert points is not None  # Optuna needs a number of points
    trials = len(planned) if chosen_beforehand else points * len(sweep.seeds)
    configs = [config for _, config in planned] or _sampled(space)
    facts = {
        "sweep": sweep.name,
        "question": sweep.question,
        "base": sweep.base,
        "search": sweep.search.kind,
        "scheduler": sweep.scheduler.kind,
        "objective": sweep.objective.model_dump(),
        "seeds": sweep.seeds,
        "space": {factor.name: _values(factor) for factor in space.factors},
        "constraints": sweep.constraints,
        "points": points,
        "trials": trials,
        "planned": [_trial_facts(trial, work.petaflop(config)) for trial, config in planned],
        "earlier": dict(Counter(trial.status for trial in earlier)),
        "resources": _resources(sweep, space.base),
        "data": _data_facts(work, space.base),
        "cost": _cost_facts(sweep, work, configs, trials),
        "time": _time_facts(work, configs, trials, earlier, space.base),
    }
    write_plan(facts, out)
    return facts


def _planned(sweep: SweepConfig, work: Work, earlier: Sequence[Trial]) -> Iterator[tuple[Trial, RunConfig]]:
    """Yield the trials that the study's own books hold in the end: a copy of them, kept in memory, tells."""
    books = sweep.model_copy(update={"storage": f"memory://dry-run-{uuid.uuid4().hex}"})
    folder = RunFolder(books.storage, books.name)
    try:
        for trial in earlier:
            save(folder, trial)
        study = Study(books, work.cost)
        while study.next_trial():
            pass
        known = {trial.number: trial for trial in earlier}
        for number, trial in sorted(study.trials.items()):
            yield known.get(number, replace(trial, status="waiting", attempts=0)), study.config(trial)
    finally:
        folder.remove("")


def _sampled(space: Space) -> list[RunConfig]:
    """Return configurations of random points, for means over a space."""
    return [space.config(point) for point in islice(random_points(space, seed=0), _SAMPLED)]


def _values(factor: Factor) -> dict[str, Any]:
    if factor.bounds is None:
        return {"values": list(factor.values)}
    return {"bounds": list(factor.bounds), "log": factor.log}


def _trial_facts(trial: Trial, petaflop: float | None) -> dict[str, Any]:
    return {
        "number": trial.number,
        "name": trial.name,
        "point": trial.point,
        "seed": trial.seed,
        "values": trial.values,
        "label": point_label(trial.values),
        "status": trial.status,
        "stored": trial.cost and trial.cost.stored,
        "active": trial.cost and trial.cost.active,
        "gflops": trial.cost and trial.cost.gflops,
        "pflop": petaflop,
    }


def _resources(sweep: SweepConfig, base: RunConfig) -> dict[str, Any]:
    compute = base.compute
    return {
        "workers": compute.max_workers,
        "cpus_per_worker": compute.cpus_per_worker,
        "decode_cpus_per_worker": base.data.decode_cpus,
        "gpus_per_worker": compute.gpus_per_worker,
        "accelerator_type": compute.accelerator_type,
        "concurrent": sweep.resources.concurrent,
    }


def _data_facts(work: Work, base: RunConfig) -> dict[str, float] | None:
    epoch = work.epoch(base)
    return None if epoch is None else {"clips": epoch.clips, "hours": epoch.seconds / 3600}


def _cost_facts(sweep: SweepConfig, work: Work, configs: Sequence[RunConfig], trials: int) -> dict[str, Any]:
    """Return audio and operations: the mean over `configs`, and all trials' together."""
    heard = [work.audio(config) for config in configs]
    audio_s = _mean([None if audio is None else audio.seconds for audio in heard])
    pflop = _mean([work.petaflop(config) for config in configs])
    stops_early = sweep.scheduler.kind not in ("none", "pbt")
    return {
        "at_most": stops_early or any(audio is not None and audio.at_most for audio in heard),
        "audio_h_per_trial": None if audio_s is None else audio_s / 3600,
        "pflop_per_trial": pflop,
        "pflop": None if pflop is None else pflop * trials,
    }


def _time_facts(
    work: Work, configs: Sequence[RunConfig], trials: int, earlier: Sequence[Trial], base: RunConfig
) -> dict[str, Any]:
    """Return the time that is left: measured where trials have finished, else estimated from their operations."""
    left = trials - sum(trial.over for trial in earlier)
    finished = [trial for trial in earlier if trial.status == "finished"]
    on = device(base.compute)
    pflop = _mean([work.petaflop(config) for config in configs])
    device_h = None if pflop is None or on.teraflops is None else 1e3 * pflop / on.teraflops / 3600
    if finished:
        device_h = fmean(trial.device_s for trial in finished) / 3600
    return {
        "trials_left": left,
        "measured_from": len(finished),
        "device": asdict(on),
        "wall_h_per_trial": fmean(trial.wall_s for trial in finished) / 3600 if finished else None,
        "device_h_per_trial": device_h,
        "device_h_left": None if device_h is None else device_h * left,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, None if a value is not known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
