"""What a study found as a CSV file, as a table for the terminal, and as one JSON object."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from mowe_ray.output.terminal import format_table
from mowe_ray.output.text import amount
from mowe_ray.sweeping.analysis.conclusions import answer
from mowe_ray.sweeping.analysis.points import Point, best, by_status, finite, pareto_front, points, ranked
from mowe_ray.sweeping.labels import counts, entry_label, entry_name, metric_label, number, plus_minus
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.trials import Trial


def results_csv(config: SweepConfig, trials: Sequence[Trial]) -> str:
    """Return one row a trial, with a header; what is unknown is empty."""
    tasks = sorted({task for trial in trials for task in trial.tasks})
    rows = [_row(config, trial, tasks) for trial in sorted(trials, key=lambda trial: trial.number)]
    buffer = io.StringIO()
    header = _row(config, Trial(0, 0, 0, {}), tasks)
    writer = csv.DictWriter(buffer, list(header), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _row(config: SweepConfig, trial: Trial, tasks: Sequence[str]) -> dict[str, Any]:
    cost = trial.cost
    return {
        "number": trial.number,
        "point": trial.point,
        "seed": trial.seed,
        "status": trial.status,
        **{name: _exact(trial.values.get(name)) for name in config.space},
        "objective": finite(trial.objective(config.objective.metric)),
        "loss": finite(trial.loss),
        **{f"score.{task}": finite(trial.tasks.get(task, {}).get("score")) for task in tasks},
        **{f"majority.{task}": finite(trial.tasks.get(task, {}).get("majority")) for task in tasks},
        "stored_parameters": cost and cost.stored,
        "active_parameters": cost and cost.active,
        "gflops": cost and cost.gflops,
        "steps": trial.step,
        "percent": trial.percent,
        "attempts": trial.attempts,
        "wall_s": round(trial.wall_s, 1),
        "device_s": round(trial.device_s, 1),
        "error": " ".join(trial.error.split()) if trial.error else None,
    }


def _exact(value: Any) -> Any:
    return value if value is None or isinstance(value, float) else entry_label(value)


def table(config: SweepConfig, trials: Sequence[Trial], width: int | None = None) -> str:
    """Return the points as lines, the best first, then those that are not complete; see `format_table`."""
    found = points(config, trials)
    names = list(config.space)
    header = ["point", *map(entry_name, names), metric_label(config.objective.metric), "spread", "active", "trials"]
    rows = [_cells(config, point) for point in [*ranked(config, found), *(p for p in found if not p.complete)]]
    return format_table(rows, header, right={0, len(header) - 3, len(header) - 2}, width=width)


def _cells(config: SweepConfig, point: Point) -> list[str]:
    values = [entry_label(point.values[name]) if name in point.values else "–" for name in config.space]
    mean, spread = plus_minus(point.mean, point.error), number(point.spread)
    active = amount(point.cost.active if point.cost else None)
    return [str(point.number), *values, mean, spread, active, counts(by_status(point.trials))]


def summary(config: SweepConfig, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the result of a study as plain values, ready for JSON."""
    found = points(config, trials)
    winner = best(config, found)
    return {
        "metric": config.objective.metric,
        "best": winner and _described(winner),
        "front": [_described(point) for point in pareto_front(config, found)] if config.objective.against else None,
        "points": len(found),
        "trials": by_status(trials),
        "answer": answer(config, trials),
    }


def _described(point: Point) -> dict[str, Any]:
    return {
        "point": point.number,
        "values": point.values,
        "mean": point.mean,
        "stderr": point.error,
        "stderr_from": point.error_from,
        "spread": point.spread,
        "seeds": [trial.seed for trial in point.trials],
        "trials": [trial.name for trial in point.trials],
        "active_parameters": point.cost.active if point.cost else None,
        "gflops": point.cost.gflops if point.cost else None,
    }
