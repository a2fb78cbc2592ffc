"""All models of an evaluation side by side, a line per test set and metric, and what can be told apart.

A test set is a task of a dataset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mowe_ray.evaluation.results import EvaluatedModel, Evaluation, Interval, TaskScores

Verdict = Literal["better", "worse", ""]


@dataclass(frozen=True)
class Line:
    """One metric of one test set.

    Attributes:
        title: Of the metric, with its unit.
        better: `lower` or `higher`.
        main: Whether the metric is the test set's main one.
        samples: By model, as all that follows; models without the metric are missing.
        majority: What the most frequent answer would score, if known.
        differences: To the baseline, in the metric's own direction.
    """

    dataset: str
    task: str
    metric: str
    title: str
    better: str
    main: bool
    samples: dict[str, int]
    majority: float | None
    scores: dict[str, Interval]
    differences: dict[str, Interval]

    @property
    def test_set(self) -> tuple[str, str]:
        """Dataset and task."""
        return self.dataset, self.task

    def verdict(self, model: str) -> Verdict:
        """Whether a model is better or worse than the baseline; empty where its interval holds 0."""
        return verdict(gain(self.differences[model], self.better)) if model in self.differences else ""


def lines(evaluation: Evaluation) -> list[Line]:
    """Return every metric of every test set that some model has a score for, in the models' order."""
    differences = {(d.model, d.dataset, d.task, d.metric): d.difference for d in evaluation.differences}
    found: dict[tuple[str, str], dict[str, TaskScores]] = {}
    for model in evaluation.models:
        for scores in model.scores:
            found.setdefault((scores.dataset, scores.task), {})[model.name] = scores
    written = []
    for (dataset, task), by_model in found.items():
        metrics = list(dict.fromkeys(metric for scores in by_model.values() for metric in scores.scores))
        for metric in metrics:
            having = {name: scores for name, scores in by_model.items() if metric in scores.scores}
            first = next(iter(having.values()))
            line = Line(
                dataset,
                task,
                metric,
                title=first.titles[metric],
                better=first.better[metric],
                main=metric == metrics[0],
                samples={name: scores.samples for name, scores in having.items()},
                majority=next((s.majority[metric] for s in having.values() if metric in s.majority), None),
                scores={name: scores.scores[metric] for name, scores in having.items()},
                differences={
                    name: difference
                    for name in having
                    if (difference := differences.get((name, dataset, task, metric))) is not None
                    and is_finite(difference)
                },
            )
            written.append(line)
    return written


def others(evaluation: Evaluation) -> list[EvaluatedModel]:
    """Return all models but the baseline."""
    return [model for model in evaluation.models if model.name != evaluation.baseline]


def gain(difference: Interval, better: str) -> Interval:
    """Turn a difference of a metric so that more is better."""
    return difference if better == "higher" else Interval(-difference.value, -difference.high, -difference.low)


def verdict(gained: Interval) -> Verdict:
    """Whether a gain is one; empty where the interval holds 0."""
    return "better" if gained.low > 0 else "worse" if gained.high < 0 else ""


def against_majority(line: Line, model: str) -> Verdict:
    """Whether a model is better than the most frequent answer; empty where the interval holds that."""
    if line.majority is None or model not in line.scores:
        return ""
    found = line.scores[model]
    above = Interval(*(value - line.majority for value in (found.value, found.low, found.high)))
    return verdict(gain(above, line.better))


def is_finite(interval: Interval) -> bool:
    """Whether all of an interval is a number."""
    return all(map(math.isfinite, (interval.value, interval.low, interval.high)))


def alarms(evaluation: Evaluation) -> list[str]:
    """Return what is wrong with the models' routers, each with the model's name where there are several."""
    return [
        f"{model.name}: {alarm}" if len(evaluation.models) > 1 else alarm
        for model in evaluation.models
        if model.router_report
        for alarm in model.router_report["alarms"]
    ]


def not_computed(evaluation: Evaluation) -> list[str]:
    """Say which metrics could not be computed and which samples not used, and why, once for all models alike."""
    found: dict[str, list[str]] = {}
    for model in evaluation.models:
        for task in model.scores:
            for metric, why in task.unavailable.items():
                found.setdefault(f"no {metric} for {task.dataset} {task.task}: {why}", []).append(model.name)
        for dataset, causes in model.bad.items():
            if causes:
                counted = ", ".join(f"{count} {cause}" for cause, count in causes.items())
                found.setdefault(f"samples of {dataset} that could not be used: {counted}", []).append(model.name)
    return [text + _of(names, evaluation.models) for text, names in found.items()]


def _of(names: Sequence[str], models: Sequence[EvaluatedModel]) -> str:
    return "" if len(set(names)) == len(models) else f" ({', '.join(dict.fromkeys(names))})"
