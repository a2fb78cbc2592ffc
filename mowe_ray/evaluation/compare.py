"""From the answers of one or several models to everything a report shows: scores, differences, ablations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mowe_ray.evaluation.metrics.metric import Metric
from mowe_ray.evaluation.metrics.registry import DatasetMetrics
from mowe_ray.evaluation.predictions import Answer, by_task
from mowe_ray.evaluation.results import Ablation, Difference, EvaluatedModel, Evaluation, Interval, ModelFacts
from mowe_ray.evaluation.routing.report import router_report
from mowe_ray.evaluation.routing.stats import routing_of
from mowe_ray.evaluation.scoring import paired_difference, task_scores

Answers = Mapping[str, Sequence[Answer]]
"""By dataset."""


@dataclass(frozen=True)
class AnsweredModel(ModelFacts):
    """What a model answered.

    Attributes:
        history: Its training records with `step` and `routing`, oldest first.
        without: What it answered without each pool member, by the member's name.
        bad: Samples that could not be used, by dataset and cause.
    """

    history: Sequence[Mapping[str, Any]]
    answers: Answers
    without: Mapping[str, Answers]
    bad: dict[str, dict[str, int]]


def compare(
    models: Sequence[AnsweredModel],
    *,
    metrics: Mapping[str, DatasetMetrics],
    baseline: str | None,
    seed: int,
    device: str,
) -> Evaluation:
    """Score all models, and compare them on the samples that they all answered.

    Args:
        models: With distinct names.
        metrics: What each dataset is scored by.
        baseline: Name of the model that the others are compared with; None takes the first without a pool, else the
            first.
        seed: Of the bootstrap.
        device: What they ran on, in words.

    Raises:
        ValueError: There is nothing to score by.
    """
    poolless = next((model for model in models if not model.members), models[0])
    reference = next((model for model in models if model.name == baseline), poolless)
    differences = [
        Difference(model.name, one.dataset, one.task, one.metric.name, one.interval, len(one.ours))
        for model in models
        if model is not reference
        for one in _differences(model.answers, reference.answers, metrics, seed)
    ]
    return Evaluation([_evaluated(model, metrics, seed) for model in models], reference.name, differences, device)


def _evaluated(model: AnsweredModel, metrics: Mapping[str, DatasetMetrics], seed: int) -> EvaluatedModel:
    ablation = [
        Ablation(member, one.dataset, one.task, one.metric.name, one.metric.of(one.ours), one.interval, len(one.ours))
        for member, answers in model.without.items()
        for one in _differences(answers, model.answers, metrics, seed)
    ]
    report = None
    if model.members:
        routing = {dataset: found for dataset, answers in model.answers.items() if (found := routing_of(answers))}
        report = router_report(model.members, routing, model.history)
    return EvaluatedModel(
        **{one.name: getattr(model, one.name) for one in fields(ModelFacts)},
        scores=[
            scores
            for dataset, answers in model.answers.items()
            for scores in task_scores(dataset, answers, metrics[dataset], seed=seed)
        ],
        bad=model.bad,
        ablation=ablation,
        router_report=report,
    )


@dataclass(frozen=True)
class _Paired:
    """The main metric of a task on the samples that two sets of answers share: its difference, ours less theirs."""

    dataset: str
    task: str
    metric: Metric
    interval: Interval
    ours: list[Answer]


def _differences(ours: Answers, theirs: Answers, metrics: Mapping[str, DatasetMetrics], seed: int) -> Iterator[_Paired]:
    for dataset in ours:
        other_tasks = by_task(theirs.get(dataset, ()))
        for task, answers in by_task(ours[dataset]).items():
            known = {answer.id: answer for answer in other_tasks.get(task, ())}
            pairs = [(answer, known[answer.id]) for answer in answers if answer.id in known]
            if not pairs:
                continue
            a, b = [one for one, _ in pairs], [other for _, other in pairs]
            # Made for all of the set: how rare a word is should not depend on which samples are compared.
            metric = metrics[dataset].of(task, other_tasks[task])[0][0]
            interval = paired_difference(metric, metric.statistics(a), metric.statistics(b), seed)
            yield _Paired(dataset, task, metric, interval, a)
