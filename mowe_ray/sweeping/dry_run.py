"""The dry run of a study: its trials, resources and estimated cost, without a cluster and without writing a file."""

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
from mowe_ray.output.terminal import amount, duration, format_table
from mowe_ray.sweeping.compute_cost import CLIP_S, ComputeCost, device
from mowe_ray.sweeping.one_shot import spread
from mowe_ray.sweeping.schema import POOL_KEY, SweepConfig
from mowe_ray.sweeping.search import random_points
from mowe_ray.sweeping.search_space import Dimension, SearchSpace
from mowe_ray.sweeping.study import Study, check_same_study
from mowe_ray.sweeping.trials import ModelCost, Trial, load_all, point_label, save

# Points whose mean cost stands for a search that has not chosen yet.
_SAMPLED = 16


def dry_run(sweep: SweepConfig, cost: Callable[[RunConfig], ModelCost | None], out: TextIO) -> dict[str, Any]:
    """Write the plan of a study to `out`; return the same facts, None where something is not known.

    Args:
        cost: Returns what the model of a configuration costs; None if that is not known.

    Raises:
        ValueError: The study could not start: its data cannot be used, or its folder holds another.
    """
    folder, space, work = RunFolder(sweep.storage, sweep.name), SearchSpace(sweep), ComputeCost(cost)
    check_same_study(folder, sweep)
    earlier = load_all(folder)
    # Optuna chooses from results, so that its points cannot be listed before there are any.
    # One-shot chooses the pools to train alone from the scores of all.
    chosen_beforehand = sweep.search.kind not in ("optuna", "oneshot")
    planned = list(_planned(sweep, work, earlier)) if chosen_beforehand else []
    points = len({trial.point for trial, _ in planned}) if chosen_beforehand else space.expected_points
    assert points is not None  # Optuna needs a number of points
    trials = len(planned) if chosen_beforehand else points * len(sweep.seeds)
    configs = [config for _, config in planned] or _sampled(space)
    facts = {
        "sweep": sweep.name,
        "question": sweep.question,
        "base": sweep.base,
        "search": sweep.search.kind,
        "one_shot": _one_shot_facts(sweep, space, points) if sweep.search.kind == "oneshot" else None,
        "scheduler": sweep.scheduler.kind,
        "objective": sweep.objective.model_dump(),
        "seeds": sweep.seeds,
        "space": {dimension.name: _values(dimension) for dimension in space.dimensions},
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


def _planned(sweep: SweepConfig, work: ComputeCost, earlier: Sequence[Trial]) -> Iterator[tuple[Trial, RunConfig]]:
    """Yield all trials that the study will have, by running through a copy of it that is kept in memory."""
    # A name of its own: fsspec's memory file system is shared by everything in the process.
    copy = sweep.model_copy(update={"storage": f"memory://dry-run-{uuid.uuid4().hex}"})
    folder = RunFolder(copy.storage, copy.name)
    try:
        for trial in earlier:
            save(folder, trial)
        study = Study(copy, work.cost)
        while study.next_trial():
            pass
        known = {trial.number: trial for trial in earlier}
        for number, trial in sorted(study.trials.items()):
            yield known.get(number, replace(trial, status="waiting", attempts=0)), study.config(trial)
    finally:
        folder.remove("")


def _sampled(space: SearchSpace) -> list[RunConfig]:
    """Return configurations for means over a space: those of one-shot's points, else of random ones."""
    if space.sweep.search.kind == "oneshot":
        alone = spread(list(space.points()), space.sweep.search.calibrate)
        return [space.config(point) for point in [space.supernet(), *alone]]
    return [space.config(point) for point in islice(random_points(space, seed=0), _SAMPLED)]


def _one_shot_facts(sweep: SweepConfig, space: SearchSpace, points: int) -> dict[str, int]:
    """Count what a one-shot search trains and evaluates."""
    members = len(space.supernet()[POOL_KEY])
    pools, seeds = 2 ** min(members, 6), len(sweep.seeds)  # of more encoders 64 pools are drawn
    return {"encoders": members, "supernets": seeds, "pools": pools, "evaluations": pools * seeds, "alone": points - 1}


def _values(dimension: Dimension) -> dict[str, Any]:
    if dimension.bounds is None:
        return {"values": list(dimension.values)}
    return {"bounds": list(dimension.bounds), "log": dimension.log}


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


def _data_facts(work: ComputeCost, base: RunConfig) -> dict[str, float] | None:
    epoch = work.epoch(base)
    return None if epoch is None else {"clips": epoch.clips, "hours": epoch.seconds / 3600}


def _cost_facts(sweep: SweepConfig, work: ComputeCost, configs: Sequence[RunConfig], trials: int) -> dict[str, Any]:
    """Return audio and operations: the mean over `configs`, and all trials' together."""
    audios = [work.audio(config) for config in configs]
    audio_s = _mean([None if audio is None else audio.seconds for audio in audios])
    pflop = _mean([work.petaflop(config) for config in configs])
    # Population-based training replaces weak trials instead of stopping them: all run to the end.
    stops_early = sweep.scheduler.kind not in ("none", "pbt")
    return {
        "at_most": stops_early or any(audio is not None and audio.at_most for audio in audios),
        "audio_h_per_trial": None if audio_s is None else audio_s / 3600,
        "pflop_per_trial": pflop,
        "pflop": None if pflop is None else pflop * trials,
    }


def _time_facts(
    work: ComputeCost, configs: Sequence[RunConfig], trials: int, earlier: Sequence[Trial], base: RunConfig
) -> dict[str, Any]:
    """Return the time that is left: measured where trials have finished, else estimated from their operations."""
    left = trials - sum(trial.over for trial in earlier)
    finished = [trial for trial in earlier if trial.status == "finished"]
    on = device(base.compute)
    pflop = _mean([work.petaflop(config) for config in configs])
    device_h = None if pflop is None or on.teraflops is None else 1e3 * pflop / on.teraflops / 3600
    # A measurement replaces the estimate from operations.
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


# Of more trials, the first and the last ones are shown.
_SHOWN = 40


def write_plan(facts: dict[str, Any], out: TextIO) -> None:
    """Write the facts that `dry_run` returns."""
    out.write(f"{facts['question']}\n")
    out.write(format_table(_setting(facts)))
    out.write("\nspace\n")
    constraints = [["only where", " and ".join(facts["constraints"])]] if facts["constraints"] else []
    out.write(format_table([[name, _entry(values)] for name, values in facts["space"].items()] + constraints))
    if facts["planned"]:
        out.write(f"\n{facts['trials']} trials: parameters, GFLOPs of a forward pass over {CLIP_S:g} s, training\n")
        header = ["", "seed", "stored", "active", "GFLOPs", "training", "", ""]
        out.write(format_table(_trials(facts["planned"]), header))
    out.write("\ncost\n")
    out.write(format_table(_costs(facts)))
    out.write(
        "  training counts as 3 forward passes; text, validation and start-up come on top, frozen parts need less\n"
    )


def _setting(facts: dict[str, Any]) -> list[list[str]]:
    resources, objective = facts["resources"], facts["objective"]
    each = f"{resources['cpus_per_worker']} CPU to train, {resources['decode_cpus_per_worker']} to decode"
    if resources["gpus_per_worker"]:
        each += f", 1 GPU ({resources['accelerator_type'] or 'any'})"
    workers, concurrent = resources["workers"], resources["concurrent"]
    against = f", against {objective['against']}" if objective["against"] else ""
    return [
        ["base", facts["base"]],
        ["search", f"{facts['search']}, {facts['points']} points"],
        *_one_shot(facts["one_shot"], facts["seeds"]),
        ["scheduler", facts["scheduler"]],
        ["objective", objective["metric"] + against],
        ["seeds", ", ".join(map(str, facts["seeds"]))],
        ["a trial", f"{workers} worker{'s' if workers > 1 else ''}, each {each}"],
        ["at a time", "as many as fit" if concurrent is None else str(concurrent)],
    ]


def _one_shot(counted: dict[str, int] | None, seeds: Sequence[int]) -> list[list[str]]:
    if counted is None:
        return []
    runs = f"{counted['supernets']} with all {counted['encoders']} encoders and pool dropout"
    alone = f"{counted['alone'] * len(seeds)} of pools alone ({counted['alone']} pools), to check the ranking"
    passes = f"{counted['evaluations']} passes over the validation data: {counted['pools']} pools with each supernet"
    return [["trainings", f"{runs}, {alone}"], ["evaluations", passes]]


def _entry(values: dict[str, Any]) -> str:
    if "bounds" in values:
        low, high = values["bounds"]
        return f"{low:g} to {high:g}{', uniform in the logarithm' if values['log'] else ''}"
    listed = values["values"]
    if any(isinstance(value, list) for value in listed):
        return f"{len(listed)} pools"
    return ", ".join(map(str, listed))


def _trials(planned: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [
        [
            trial["name"],
            str(trial["seed"]),
            amount(trial["stored"]),
            amount(trial["active"]),
            _number(trial["gflops"]),
            _operations(trial["pflop"]),
            "" if trial["status"] == "waiting" else trial["status"],
            trial["label"],
        ]
        for trial in planned
    ]
    half = _SHOWN // 2
    return rows if len(rows) <= _SHOWN else [*rows[:half], [f"... {len(rows) - _SHOWN} more ..."], *rows[-half:]]


def _costs(facts: dict[str, Any]) -> list[list[str]]:
    cost, time, data = facts["cost"], facts["time"], facts["data"]
    most = "at most " if cost["at_most"] else ""
    earlier = ", ".join(f"{count} {status}" for status, count in facts["earlier"].items())
    hours, pflop, device_h = cost["audio_h_per_trial"], cost["pflop"], time["device_h_left"]
    rows = [
        ["trials", f"{facts['trials']}{f', of them {earlier}' if earlier else ''}"],
        ["data.train", "none given" if data is None else f"{data['clips']:,.0f} clips, {data['hours']:.3g} h an epoch"],
        ["audio", _unless_unknown(hours, f"{most}{hours or 0:.3g} h a trial")],
        [
            "training",
            _unless_unknown(pflop, f"{most}{_operations(pflop)}, {_operations(cost['pflop_per_trial'])} a trial"),
        ],
    ]
    spent = f"{most}{duration(3600 * (device_h or 0))}, {duration(3600 * (time['device_h_per_trial'] or 0))} a trial"
    if time["measured_from"]:
        count = time["measured_from"]
        rows.append(
            ["time left", f"{spent}, of all workers; measured, {count} trial{'s' if count > 1 else ''} finished"]
        )
    else:
        rows.append([f"{time['device']['name']} time", _unless_unknown(device_h, spent)])
        rows.append(["", f"at {time['device']['source']}"])
    return rows


def _unless_unknown(value: float | None, written: str) -> str:
    return "unknown" if value is None else written


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _operations(pflop: float | None) -> str:
    """Write a number of operations."""
    if pflop is None:
        return "unknown"
    unit, size = next(
        ((u, s) for u, s in (("EFLOP", 1e3), ("PFLOP", 1.0), ("TFLOP", 1e-3)) if pflop >= s), ("GFLOP", 1e-6)
    )
    return f"{pflop / size:.3g} {unit}"
