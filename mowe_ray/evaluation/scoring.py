"""Scores of a set of answers by task: all metrics with their intervals, or one number in 0..1 during training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from mowe_ray.evaluation.metrics.metric import Array, Metric, mean_percent
from mowe_ray.evaluation.metrics.registry import JUDGED_SCALES, DatasetMetrics, metrics_of
from mowe_ray.evaluation.predictions import Answer, by_task
from mowe_ray.evaluation.results import GroupScore, Interval, TaskScores

# One number by which a task is followed during training; the others have exact match.
_WHILE_TRAINING = {
    **{"asr": "wer", "er": "accuracy", "ac": "token_f1", "tags": "mean_average_precision"},
    **{"mcq": "choice_accuracy", "mcq_letter": "letter_accuracy"},
}
_USUAL = DatasetMetrics()


def task_scores(
    dataset: str, answers: Sequence[Answer], chosen: DatasetMetrics = _USUAL, *, seed: int
) -> list[TaskScores]:
    """Score each task of a dataset, by name of the task.

    Args:
        chosen: Its metrics. A judge gets no majority score: it would have to be judged.
        seed: Of the bootstrap.

    Raises:
        ValueError: A sample has no reference, or no metric can be computed.
    """
    for answer in answers:
        if not answer.references:
            raise ValueError(f"data.validation: sample {answer.id!r} of {dataset} has no reference answer to score by")
    return [_scores(dataset, task, rows, chosen, seed) for task, rows in by_task(answers).items()]


def _scores(dataset: str, task: str, answers: Sequence[Answer], chosen: DatasetMetrics, seed: int) -> TaskScores:
    metrics, unavailable = chosen.of(task, answers)
    if not metrics:
        reasons = "; ".join(f"{name} {why}" for name, why in unavailable.items())
        raise ValueError(
            f"data.validation.N.metrics: none is left to score {dataset}: {reasons or 'the list is empty'}"
        )
    majority = majority_answers(answers)
    statistics = {metric.name: metric.statistics(answers) for metric in metrics}
    return TaskScores(
        dataset=dataset,
        task=task,
        samples=len(answers),
        scores={metric.name: interval(metric, statistics[metric.name], seed) for metric in metrics},
        titles={metric.name: metric.title for metric in metrics},
        better={metric.name: metric.better for metric in metrics},
        majority={metric.name: metric.of(majority) for metric in metrics if metric.name not in JUDGED_SCALES},
        unavailable=unavailable,
        notes={metric.name: note for metric in metrics if (note := metric.note(answers))},
        normalisers={metric.name: metric.normaliser for metric in metrics if metric.normaliser},
        groups=_group_scores(metrics[0], statistics[metrics[0].name], answers, seed),
    )


def _group_scores(
    metric: Metric, statistics: Array, answers: Sequence[Answer], seed: int
) -> dict[str, dict[str, GroupScore]]:
    """Return the metric by name and value of what samples are scored apart by, each in alphabetical order."""
    rows: dict[str, dict[str, list[int]]] = {}
    for row, answer in enumerate(answers):
        for name, value in answer.groups.items():
            rows.setdefault(name, {}).setdefault(value, []).append(row)
    return {
        name: {
            value: GroupScore(len(places), interval(metric, statistics[places], seed))
            for value, places in sorted(values.items())
        }
        for name, values in sorted(rows.items())
    }


def majority_answers(answers: Sequence[Answer]) -> list[Answer]:
    """Answer every sample with the most frequent first reference of the set itself.

    That is at least as hard to beat as the training set's most frequent answer.
    """
    (most_frequent, _), *_ = Counter(answer.references[0] for answer in answers).most_common(1)
    return [replace(answer, answer=most_frequent) for answer in answers]


def score(task: str, answers: Sequence[Answer]) -> float:
    """Return one score of a task in 0..1, higher is better: 1 - WER (at least 0), accuracy, token F1 or exact match.

    Raises:
        ValueError: There is nothing to score.
    """
    metric = _followed(task, answers)
    value = metric.of(answers) / 100
    return max(0.0, 1 - value) if metric.better == "lower" else value


def score_statistics(task: str, answers: Sequence[Answer]) -> Array | None:
    """Return (N, 2) of N answers: the `score` of any of them is the first column's sum over the second's, at least 0.

    None for tasks whose score is no such ratio, as the mean average precision of tags.
    """
    metric = _followed(task, answers)
    if metric.value is not mean_percent:
        return None
    statistics = metric.statistics(answers)
    if metric.better == "lower":
        statistics = np.stack([statistics[:, 1] - statistics[:, 0], statistics[:, 1]], 1)
    return statistics


def _followed(task: str, answers: Sequence[Answer]) -> Metric:
    if not answers:
        raise ValueError(f"no answers to score for task {task!r}")
    (metric,), _ = metrics_of(task, answers, names=[_WHILE_TRAINING.get(task, "exact_match")])
    return metric


def majority_score(task: str, answers: Sequence[Answer]) -> float:
    """Return the `score` of always giving the most frequent answer (`majority_answers`)."""
    return score(task, majority_answers(answers))


_DRAWS = 1000
_LOW, _HIGH = 2.5, 97.5
_WEIGHTS_AT_A_TIME = 2_000_000  # 16 MB of them


def interval(metric: Metric, statistics: Array, seed: int, draws: int = _DRAWS) -> Interval:
    """Return the metric of all samples and where 95 % of its resampled values lie.

    Args:
        statistics: (N, S); at least one sample. With just one both ends are its value.
    """
    resampled = np.concatenate([metric.value(w @ statistics) for w in resamples(len(statistics), seed, draws)])
    return interval_of(metric.value(statistics.sum(0)), resampled)


def paired_difference(
    metric: Metric, statistics_a: Array, statistics_b: Array, seed: int, draws: int = _DRAWS
) -> Interval:
    """Return the metric of `a` less that of `b`, and its interval when both are resampled alike.

    Args:
        statistics_a: (N, S) of the same N samples, in the same order, as `statistics_b`.
    """
    assert statistics_a.shape == statistics_b.shape
    resampled = np.concatenate(
        [
            metric.value(w @ statistics_a) - metric.value(w @ statistics_b)
            for w in resamples(len(statistics_a), seed, draws)
        ]
    )
    return interval_of(metric.value(statistics_a.sum(0)) - metric.value(statistics_b.sum(0)), resampled)


def resamples(samples: int, seed: int, draws: int) -> Iterator[Array]:
    """Yield how often each sample is in each resample, (D, N) in portions of some draws."""
    assert samples, "nothing to resample"
    rng = np.random.default_rng(seed)
    for first in range(0, draws, portion := max(1, _WEIGHTS_AT_A_TIME // samples)):
        rows = min(portion, draws - first)
        # Each row gets its own range of numbers, so that a single `bincount` counts all rows.
        places = rng.integers(samples, size=(rows, samples)) + samples * np.arange(rows)[:, None]
        yield np.bincount(places.ravel(), minlength=rows * samples).reshape(rows, samples).astype(np.float64)


def interval_of(value: Array, resampled: Array) -> Interval:
    """Return a value and where 95 % of its resampled values lie."""
    low, high = np.percentile(resampled, [_LOW, _HIGH])
    return Interval(float(value), float(low), float(high))
