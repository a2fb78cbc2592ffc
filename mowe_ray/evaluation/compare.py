"""Score the answers of one or several models, compare the models, and write the results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mowe_ray.evaluation.metrics.classification import confusion
from mowe_ray.evaluation.metrics.metric import Metric
from mowe_ray.evaluation.metrics.registry import DatasetMetrics
from mowe_ray.evaluation.model_card import CARD, CardScore, with_scores
from mowe_ray.evaluation.predictions import Answer, by_task
from mowe_ray.evaluation.report.page import report
from mowe_ray.evaluation.results import (
    Ablation,
    Confusion,
    Difference,
    EvaluatedModel,
    Evaluation,
    Interval,
    ModelFacts,
    PoolScore,
    Shapley,
)
from mowe_ray.evaluation.routing import router_report, routing_of, write_router_report
from mowe_ray.evaluation.samples import shown_samples
from mowe_ray.evaluation.scoring import paired_difference, score, task_scores
from mowe_ray.evaluation.shapley import Subset, joining_orders, shapley_values, utilization
from mowe_ray.evaluation.targets import Target, evaluation_folder, folder_at, report_folder

MOST_SHOWN = 500
DatasetAnswers = Mapping[str, Sequence[Answer]]


@dataclass(frozen=True)
class AnsweredModel(ModelFacts):
    """A model and its answers.

    Attributes:
        history: Its training records with `step` and `routing`, oldest first.
        answers: With all pool members.
        without: With one pool member excluded, by the member's name.
        bad: Samples that could not be used, by dataset and cause.
        subsets: With only some of the pool members, by their numbers; those that Shapley values need, if any.
    """

    history: Sequence[Mapping[str, Any]]
    answers: DatasetAnswers
    without: Mapping[str, DatasetAnswers]
    bad: dict[str, dict[str, int]]
    subsets: Mapping[Subset, DatasetAnswers] = field(default_factory=dict)


def compare(
    models: Sequence[AnsweredModel],
    *,
    metrics: Mapping[str, DatasetMetrics],
    baseline: str | None,
    seed: int,
    device: str,
    shown: int | None = MOST_SHOWN,
) -> Evaluation:
    """Score all models, and compare them on the samples that they all answered.

    Args:
        models: With distinct names.
        metrics: Metrics of each dataset.
        baseline: Name of the model that the others are compared with; None takes the first without a pool, else the
            first.
        seed: Of the bootstrap.
        device: Name of the hardware they ran on.
        shown: Samples to show at most; None shows all.

    Raises:
        ValueError: There is nothing to score by.
    """
    # The natural baseline: what the pool adds is the question.
    poolless = next((model for model in models if not model.members and model.stored is not None), models[0])
    reference = next((model for model in models if model.name == baseline), poolless)
    differences = [
        Difference(model.name, pair.dataset, pair.task, pair.metric.name, pair.interval, len(pair.ours))
        for model in models
        if model is not reference
        for pair in _differences(model.answers, reference.answers, metrics, seed)
    ]
    samples = shown_samples(
        {model.name: model.answers for model in models}, {model.name: model.members for model in models}, metrics, shown
    )
    return Evaluation(
        [_evaluated(model, metrics, seed) for model in models], reference.name, differences, device, samples
    )


def _evaluated(model: AnsweredModel, metrics: Mapping[str, DatasetMetrics], seed: int) -> EvaluatedModel:
    ablation = [
        _ablation(member, pair)
        for member, answers in model.without.items()
        for pair in _differences(answers, model.answers, metrics, seed)
    ]
    pools = list(_answered_by_pools(model, metrics))
    routers = None
    if model.members:
        routing = {dataset: sums for dataset, answers in model.answers.items() if (sums := routing_of(answers))}
        routers = router_report(model.members, routing, model.history)
    return EvaluatedModel(
        **{field.name: getattr(model, field.name) for field in fields(ModelFacts)},
        scores=[
            scores
            for dataset, answers in model.answers.items()
            for scores in task_scores(dataset, answers, metrics[dataset], seed=seed)
        ],
        bad=model.bad,
        ablation=ablation,
        router_report=routers,
        confusions=list(_confusions(model.answers, metrics)),
        shapley=list(_shapley(model, pools, seed)),
        pools=list(_pool_scores(model, pools)),
    )


def _ablation(member: str, pair: _Paired) -> Ablation:
    metric, score = pair.metric, pair.metric.of(pair.ours)
    rate = utilization(score, pair.interval.value, metric.better)
    return Ablation(member, pair.dataset, pair.task, metric.name, score, pair.interval, len(pair.ours), rate)


@dataclass(frozen=True)
class _SubsetAnswers:
    """The answers of each subset of a pool to the samples of a task that all subsets answered, in the same order."""

    dataset: str
    task: str
    metric: Metric
    answers: dict[Subset, list[Answer]]


def _answered_by_pools(model: AnsweredModel, metrics: Mapping[str, DatasetMetrics]) -> Iterator[_SubsetAnswers]:
    if not model.subsets:
        return
    running = {**model.subsets, frozenset(range(len(model.members))): model.answers}
    for dataset, answers in model.answers.items():
        answered = {subset: by_task(found[dataset]) for subset, found in running.items()}
        for task, rows in by_task(answers).items():
            known = {subset: {a.id: a for a in tasks.get(task, ())} for subset, tasks in answered.items()}
            ids = [answer.id for answer in rows if all(answer.id in found for found in known.values())]
            if ids:
                shared = {subset: [found[name] for name in ids] for subset, found in known.items()}
                yield _SubsetAnswers(dataset, task, metrics[dataset].of(task, rows)[0][0], shared)


def _shapley(model: AnsweredModel, pools: Sequence[_SubsetAnswers], seed: int) -> Iterator[Shapley]:
    orders = joining_orders(len(model.members), seed) if pools else []
    for one in pools:
        statistics = {subset: one.metric.statistics(answers) for subset, answers in one.answers.items()}
        samples, subsets = len(next(iter(one.answers.values()))), len(one.answers)
        exact = subsets == 2 ** len(model.members)
        for member, value in zip(model.members, shapley_values(one.metric, statistics, orders, seed), strict=True):
            yield Shapley(member, one.dataset, one.task, one.metric.name, value, samples, subsets, exact)


def _pool_scores(model: AnsweredModel, pools: Sequence[_SubsetAnswers]) -> Iterator[PoolScore]:
    for one in pools:
        for subset, answers in one.answers.items():
            members = [model.members[i] for i in sorted(subset)]
            yield PoolScore(members, one.dataset, one.task, score(one.task, answers), len(answers))


def _confusions(answers: DatasetAnswers, metrics: Mapping[str, DatasetMetrics]) -> Iterator[Confusion]:
    for dataset, found in answers.items():
        for task, rows in by_task(found).items():
            if any(metric.name == "accuracy" for metric in metrics[dataset].of(task, rows)[0]):
                labels = metrics[dataset].closed_list(rows)
                yield Confusion(dataset, task, labels, confusion(rows, labels))


@dataclass(frozen=True)
class _Paired:
    """The main metric of a task on the samples that two sets of answers share: its difference, ours less theirs."""

    dataset: str
    task: str
    metric: Metric
    interval: Interval
    ours: list[Answer]


def _differences(
    ours: DatasetAnswers, theirs: DatasetAnswers, metrics: Mapping[str, DatasetMetrics], seed: int
) -> Iterator[_Paired]:
    for dataset in ours:
        other_tasks = by_task(theirs.get(dataset, ()))
        for task, answers in by_task(ours[dataset]).items():
            known = {answer.id: answer for answer in other_tasks.get(task, ())}
            pairs = [(answer, known[answer.id]) for answer in answers if answer.id in known]
            if not pairs:
                continue
            a, b = [own for own, _ in pairs], [other for _, other in pairs]
            # Made for the complete set: how rare a word is should not depend on which samples are compared.
            metric = metrics[dataset].of(task, other_tasks[task])[0][0]
            interval = paired_difference(metric, metric.statistics(a), metric.statistics(b), seed)
            yield _Paired(dataset, task, metric, interval, a)


def write_results(evaluation: Evaluation, targets: Sequence[Target], out: str | None) -> dict[str, Any]:
    """Write scores.json and the router report of each model, and report.html over all of them.

    Args:
        evaluation: What `compare` returned.
        targets: The models, in the same order.
        out: The configuration's `out`.

    Returns:
        The result of the command.
    """
    result: dict[str, Any] = {"report": "", "baseline": evaluation.baseline, "models": {}}
    for model, target in zip(evaluation.models, targets, strict=True):
        folder = evaluation_folder(target, out)
        differences = [d for d in evaluation.differences if d.model == model.name]
        content = asdict(model) | {"baseline": evaluation.baseline, "differences": [asdict(d) for d in differences]}
        routing = content.pop("router_report")
        folder.write_json("scores.json", content)
        if routing is not None:
            write_router_report(folder, routing)
        _put_on_card(model, target)
        result["models"][model.name] = {"evaluation": folder.url, "scores": _main_scores(model)}
    folder = report_folder(targets, out)
    folder.write_text("report.html", report(evaluation))
    return {**result, "report": folder.path("report.html")}


def _put_on_card(model: EvaluatedModel, target: Target) -> None:
    """Put the main scores on the model card of an export of ours that has one; a folder nobody may write to stays."""
    if target.served_as is None and (export := folder_at(target.export)).exists(CARD):
        card = with_scores(export.read_text(CARD), [CardScore.of(scores) for scores in model.scores])
        with contextlib.suppress(PermissionError):
            export.write_text(CARD, card)


def _main_scores(model: EvaluatedModel) -> dict[str, dict[str, float]]:
    """Return the main score by DATASET/TASK."""
    return {f"{task.dataset}/{task.task}": {task.main: round(task.scores[task.main].value, 2)} for task in model.scores}
