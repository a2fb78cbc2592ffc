"""The points of a study: what was measured at each, its standard error, which is best, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.trials import ModelCost, Trial, TrialStatus

CLEAR = 2.0  # standard errors; a difference below cannot be told from chance
STATES: tuple[TrialStatus, ...] = ("finished", "stopped", "failed", "running", "waiting")


@dataclass(frozen=True)
class Point:
    """Trials that differ in their seed only.

    Attributes:
        objectives: Of its finished trials.
        mean: Of the objectives; None without any.
        spread: Their standard deviation; None for fewer than two.
        error: Standard error of the mean; None if it cannot be estimated.
        error_from: What it is taken from: `seeds` or the finite `validation` set.
        complete: Whether every seed finished with an objective: only such points can win.
    """

    number: int
    values: dict[str, Any]
    trials: tuple[Trial, ...]
    objectives: tuple[float, ...]
    mean: float | None
    spread: float | None
    error: float | None
    error_from: Literal["seeds", "validation"] | None
    complete: bool
    cost: ModelCost | None

    @property
    def active(self) -> float:
        """Active parameters, infinite when unknown."""
        return self.cost.active if self.cost else math.inf


def majority(point: Point, metric: str) -> float | None:
    """Return the score of always giving the most frequent answer; None if the metric is no score."""
    kind, _, wanted = metric.partition(".")
    tasks = [values for trial in point.trials for name, values in trial.tasks.items() if wanted in ("", name)]
    return sum(values["majority"] for values in tasks) / len(tasks) if tasks and kind == "score" else None


def finite(value: float | None) -> float | None:
    """Return `value`, or None if it is not a finite number."""
    return value if value is not None and math.isfinite(value) else None


def by_status(trials: Iterable[Trial]) -> dict[str, int]:
    """Count the trials in each state."""
    states = [trial.status for trial in trials]
    return {state: states.count(state) for state in STATES}


def points(config: SweepConfig, trials: Sequence[Trial], metric: str | None = None) -> list[Point]:
    """Group trials by point, in order of their number, and measure each by `metric` (default: the objective).

    With replicas the error is the spread between seeds over sqrt(n). That spread is pooled over all points: two or
    three seeds say little about one point. Where no two seeds differ it is the validation set's sampling error.
    """
    metric = metric or config.objective.metric
    groups: dict[int, list[Trial]] = {}
    # A supernet has trained on parts of its pool, and is compared with nothing.
    alone = [trial for trial in trials if not config.is_supernet(trial.values)]
    for trial in sorted(alone, key=lambda trial: trial.number):
        groups.setdefault(trial.point, []).append(trial)
    measured = [_measured(number, group, metric, config.seeds) for number, group in sorted(groups.items())]
    between_seeds = pooled_spread([point.objectives for point in measured])
    return [_with_error(point, metric, between_seeds) for point in measured]


def _measured(number: int, trials: list[Trial], metric: str, seeds: Sequence[int]) -> Point:
    finished = [(t.seed, finite(t.objective(metric))) for t in trials if t.status == "finished"]
    values = {seed: value for seed, value in finished if value is not None}
    objectives = tuple(values.values())
    mean = sum(objectives) / len(objectives) if objectives else None
    complete = set(seeds) <= set(values)
    costs = [trial.cost for trial in trials if trial.cost]
    return Point(
        number, trials[0].values, tuple(trials), objectives, mean, pooled_spread([objectives]), None, None,
        complete, costs[0] if costs else None,
    )  # fmt: skip


def pooled_spread(groups: Iterable[Sequence[float]]) -> float | None:
    """Return the standard deviation within groups, all together; None if none has two members."""
    squares, freedom = 0.0, 0
    for group in groups:
        if group:
            mean = sum(group) / len(group)
            squares, freedom = squares + sum((x - mean) ** 2 for x in group), freedom + len(group) - 1
    return math.sqrt(squares / freedom) if freedom else None


def _with_error(point: Point, metric: str, between_seeds: float | None) -> Point:
    if not point.objectives:
        return point
    if between_seeds:
        return replace(point, error=between_seeds / math.sqrt(len(point.objectives)), error_from="seeds")
    errors = [sampling_error(metric, t.tasks) for t in point.trials if t.status == "finished"]
    known = [error for error in errors if error is not None]
    # An error that is unknown for one trial is unknown for the mean.
    if len(known) < len(errors):
        return point
    # Seeds share one validation set, so their number does not make this error smaller.
    return replace(point, error=sum(known) / len(known), error_from="validation")


def sampling_error(metric: str, tasks: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return the standard error of a score that is due to the finite validation set; None for a loss.

    A task's score p over n samples is taken as binomial: variance p (1 - p) / n.
    """
    _, _, task = metric.partition(".")
    chosen = [values for name, values in tasks.items() if task in ("", name)]
    if metric == "loss" or not chosen or any(finite(v["score"]) is None or not v["samples"] for v in chosen):
        return None
    variances = [v["score"] * (1 - v["score"]) / v["samples"] for v in chosen]
    return math.sqrt(sum(variances)) / len(variances)


def ranked(config: SweepConfig, found: Sequence[Point]) -> list[Point]:
    """Return the complete points, best first; of equals the one with fewer active parameters."""
    # Sorted ascending: the best point comes first under either mode.
    sign = -1.0 if config.objective.mode == "max" else 1.0
    measured = [(sign * point.mean, point.active, point.number, point) for point in found
                if point.complete and point.mean is not None]  # fmt: skip
    return [point for *_, point in sorted(measured, key=lambda row: row[:3])]


def best(config: SweepConfig, found: Sequence[Point]) -> Point | None:
    """Return the winner; None before any point has all its seeds finished."""
    return next(iter(ranked(config, found)), None)


def advantage(config: SweepConfig, a: Point, b: Point) -> tuple[float, float | None]:
    """Return how much better `a` is than `b`, and the standard error of that; None when unknown."""
    assert a.mean is not None
    assert b.mean is not None
    difference = a.mean - b.mean if config.objective.mode == "max" else b.mean - a.mean
    return difference, joint_error(a.error, b.error)


def joint_error(a: float | None, b: float | None) -> float | None:
    """Return the standard error of a difference of two independent numbers."""
    return None if a is None or b is None else math.hypot(a, b)


def is_clear(difference: float, error: float | None) -> bool:
    """Whether a difference is more than chance: at least `CLEAR` standard errors, and not nothing."""
    return error is not None and difference != 0 and abs(difference) >= CLEAR * error


def cost_of(config: SweepConfig, point: Point) -> float | None:
    """Return the cost of a point: active parameters, or GFLOPs with `objective.against: gflops`."""
    if point.cost is None:
        return None
    return point.cost.gflops if config.objective.against == "gflops" else point.cost.active


def pareto_front(config: SweepConfig, found: Sequence[Point]) -> list[Point]:
    """Return the complete points that no other beats in objective or cost without being worse in the other.

    Cheapest first.
    """
    priced = [(point, cost) for point in ranked(config, found) if (cost := cost_of(config, point)) is not None]

    def beaten(point: Point, cost: float) -> bool:
        return any(
            price <= cost and (gain := advantage(config, other, point)[0]) >= 0 and (price < cost or gain > 0)
            for other, price in priced
        )

    kept = [(point, cost) for point, cost in priced if not beaten(point, cost)]
    return [point for point, _ in sorted(kept, key=lambda pair: pair[1])]


def metric_label(metric: str) -> str:
    """Write an objective: "score", "loss", "score on er"."""
    return metric.replace("score.", "score on ", 1)


def number(value: float | None) -> str:
    """Write a score or loss."""
    return "–" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def plus_minus(value: float | None, error: float | None) -> str:
    """Write a number with its standard error, if there is one."""
    if error is None or value is None:
        return number(value)
    return f"{number(value)} ± {f'{error:.1g}' if 0 < error < 0.0005 else number(error)}"


def counts(numbers: Mapping[str, int]) -> str:
    """Write how many trials are in which state: "9 finished, 2 stopped early, 1 failed"."""
    words = {"stopped": "stopped early"}
    return ", ".join(f"{count} {words.get(status, status)}" for status, count in numbers.items() if count)
