"""The table of all trials in a study's report."""

from __future__ import annotations

from collections.abc import Sequence

from mowe_ray.output.svg import escape, tag
from mowe_ray.output.text import amount, duration
from mowe_ray.sweeping.labels import entry_label, entry_name, metric_label, number
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.statistics import Point, finite
from mowe_ray.sweeping.trials import Trial


def trial_table(config: SweepConfig, trials: Sequence[Trial], winner: Point | None) -> str:
    """Return the table, the winner's rows marked; headings are buttons for the page's script."""
    metric = config.objective.metric
    tasks = sorted({task for trial in trials for task in trial.tasks})
    extra = ["loss"] if metric != "loss" else []
    heads = [
        ("trial", True), *((entry_name(name), False) for name in config.space), ("seed", True), ("state", False),
        (metric_label(metric), True), *((task, True) for task in tasks), *((name, True) for name in extra),
        ("active", True), ("steps", True), ("time", True),
    ]  # fmt: skip
    head = tag("tr", *(tag("th", tag("button", escape(name)), class_="n" if n else None) for name, n in heads))
    won = {trial.number for trial in winner.trials} if winner else set()
    rows = [_row(config, trial, tasks, trial.number in won) for trial in trials]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="wide")


def _row(config: SweepConfig, trial: Trial, tasks: Sequence[str], won: bool) -> str:
    metric = config.objective.metric
    active = trial.cost.active if trial.cost else None
    values = [entry_label(trial.values[name]) if name in trial.values else "" for name in config.space]
    cells = [
        _number(trial.number, str(trial.number)),
        *(tag("td", escape(value)) for value in values),
        _number(trial.seed, str(trial.seed)),
        tag("td", escape(trial.status), class_=trial.status),
        _measure(trial.objective(metric)),
        *(_measure(trial.tasks.get(task, {}).get("score")) for task in tasks),
        *([_measure(trial.loss)] if metric != "loss" else []),
        _number(active, amount(active)),
        _number(trial.step, str(trial.step)),
        _number(trial.wall_s, duration(trial.wall_s)),
    ]
    return tag("tr", *cells, class_="won" if won else None)


def _measure(value: float | None) -> str:
    return _number(finite(value), number(finite(value)))


def _number(value: float | None, written: str) -> str:
    return tag("td", escape(written), class_="n", data_v="" if value is None else value)
