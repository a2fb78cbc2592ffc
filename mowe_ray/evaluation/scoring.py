"""Scores of a set of answers by task: all metrics with their intervals, or one number in 0..1 during training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from mowe_ray.evaluation.answers import Answer, by_task
from mowe_ray.evaluation.bootstrap import interval
from mowe_ray.evaluation.metrics.choice import DatasetMetrics, metrics_of
from mowe_ray.evaluation.results import TaskScores

# One number by which a task is followed during training; the others have exact match.
_WHILE_TRAINING = {"asr": "wer", "er": "accuracy", "ac": "token_f1"}
_USUAL = DatasetMetrics()


def task_scores(
    dataset: str, answers: Sequence[Answer], chosen: DatasetMetrics = _USUAL, *, seed: int
) -> list[TaskScores]:
    """Score each task of a dataset, by name of the task.

    Args:
        chosen: What it is scored by. A judge gets no majority score: it would have to be judged.
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
    return TaskScores(
        dataset=dataset,
        task=task,
        samples=len(answers),
        scores={metric.name: interval(metric, metric.statistics(answers), seed) for metric in metrics},
        titles={metric.name: metric.title for metric in metrics},
        better={metric.name: metric.better for metric in metrics},
        majority={metric.name: metric.of(majority) for metric in metrics if metric.name not in chosen.judged},
        unavailable=unavailable,
        notes={metric.name: note for metric in metrics if (note := metric.note(answers))},
    )


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
    if not answers:
        raise ValueError(f"no answers to score for task {task!r}")
    (metric,), _ = metrics_of(task, answers, names=[_WHILE_TRAINING.get(task, "exact_match")])
    value = metric.of(answers) / 100
    return max(0.0, 1 - value) if metric.better == "lower" else value


def majority_score(task: str, answers: Sequence[Answer]) -> float:
    """Return the `score` of always giving the most frequent answer (`majority_answers`)."""
    return score(task, majority_answers(answers))
