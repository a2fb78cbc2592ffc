"""Scores of a set of answers by task: all metrics with their intervals, or one number in 0..1 during training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from mowe_ray.evaluation.answers import Answer, by_task
from mowe_ray.evaluation.bootstrap import interval
from mowe_ray.evaluation.metrics.choice import metrics_of
from mowe_ray.evaluation.metrics.metric import Metric
from mowe_ray.evaluation.results import TaskScores

# One number by which a task is followed during training; the others have exact match.
_WHILE_TRAINING = {"asr": "wer", "er": "accuracy", "ac": "token_f1"}


def task_scores(
    dataset: str,
    answers: Sequence[Answer],
    *,
    labels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    extra: Sequence[Metric] = (),
    seed: int,
) -> list[TaskScores]:
    """Score each task of a dataset, by name of the task.

    Args:
        labels, names: `labels` and `metrics` of the dataset's `data.validation` entry.
        extra: Metrics that were made elsewhere (judges). They get no majority score: it would have to be judged.
        seed: Of the bootstrap.

    Raises:
        ValueError: A sample has no reference, or no metric can be computed.
    """
    for answer in answers:
        if not answer.references:
            raise ValueError(f"data.validation: sample {answer.id!r} of {dataset} has no reference answer to score by")
    return [_scores(dataset, task, rows, labels, names, extra, seed) for task, rows in by_task(answers).items()]


def _scores(
    dataset: str,
    task: str,
    answers: Sequence[Answer],
    labels: Sequence[str] | None,
    names: Sequence[str] | None,
    extra: Sequence[Metric],
    seed: int,
) -> TaskScores:
    metrics, unavailable = metrics_of(task, answers, labels, names, extra)
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
        majority={metric.name: metric.of(majority) for metric in metrics if metric not in extra},
        unavailable=unavailable,
    )


def majority_answers(answers: Sequence[Answer]) -> list[Answer]:
    """Answer every sample with the most frequent first reference of the set itself.

    That is at least as hard to beat as the training set's most frequent answer.
    """
    (most_frequent, _), *_ = Counter(answer.references[0] for answer in answers).most_common(1)
    return [replace(answer, answer=most_frequent) for answer in answers]


def score(task: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return one score of a task in 0..1, higher is better: 1 - WER (at least 0), accuracy, token F1 or exact match.

    Args:
        references: The right answers of each sample.

    Raises:
        ValueError: There is nothing to score.
    """
    return _score(task, _rows(task, answers, references))


def majority_score(task: str, references: Sequence[Sequence[str]]) -> float:
    """Return the `score` of always giving the most frequent answer (`majority_answers`)."""
    return _score(task, majority_answers(_rows(task, [""] * len(references), references)))


def _rows(task: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[Answer]:
    if not references:
        raise ValueError(f"no references to score for task {task!r}")
    return [
        Answer(id=str(i), task=task, instruction="", answer=answer, references=list(right))
        for i, (answer, right) in enumerate(zip(answers, references, strict=True))
    ]


def _score(task: str, answers: Sequence[Answer]) -> float:
    (metric,), _ = metrics_of(task, answers, names=[_WHILE_TRAINING.get(task, "exact_match")])
    value = metric.of(answers) / 100
    return max(0.0, 1 - value) if metric.better == "lower" else value
