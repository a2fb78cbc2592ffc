"""The models of an evaluation side by side: a row per test set and metric, the terminal's table, and the headline.

A test set is a task of a dataset. A difference is one where its 95 % interval does not hold 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mowe_ray.evaluation.results import EvaluatedModel, Evaluation, GroupScore, Interval, TaskScores
from mowe_ray.output.terminal import amount, format_table

Outcome = Literal["better", "worse", ""]


@dataclass(frozen=True)
class MetricRow:
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

    def verdict(self, model: str) -> Outcome:
        """Whether a model is better or worse than the baseline; empty where its interval holds 0."""
        return verdict(gain(self.differences[model], self.better)) if model in self.differences else ""


def metric_rows(evaluation: Evaluation) -> list[MetricRow]:
    """Return every metric of every test set that some model has a score for, in the models' order."""
    differences = {(d.model, d.dataset, d.task, d.metric): d.difference for d in evaluation.differences}
    test_sets: dict[tuple[str, str], dict[str, TaskScores]] = {}
    for model in evaluation.models:
        for scores in model.scores:
            test_sets.setdefault((scores.dataset, scores.task), {})[model.name] = scores
    rows = []
    for (dataset, task), by_model in test_sets.items():
        metrics = list(dict.fromkeys(metric for scores in by_model.values() for metric in scores.scores))
        for metric in metrics:
            having = {name: scores for name, scores in by_model.items() if metric in scores.scores}
            # Title and direction belong to the metric: all models have the same.
            first = next(iter(having.values()))
            row = MetricRow(
                dataset,
                task,
                metric,
                title=first.titles[metric],
                better=first.better[metric],
                main=metric == metrics[0],
                samples={name: scores.samples for name, scores in having.items()},
                # The samples are the same for all models, and so is the most frequent answer.
                majority=next((s.majority[metric] for s in having.values() if metric in s.majority), None),
                scores={name: scores.scores[metric] for name, scores in having.items()},
                differences={
                    name: difference
                    for name in having
                    if (difference := differences.get((name, dataset, task, metric))) is not None
                    and is_finite(difference)
                },
            )
            rows.append(row)
    return rows


@dataclass(frozen=True)
class GroupRow:
    """The main metric of the samples of a test set that are alike in something.

    Attributes:
        name: Of what they are alike in, such as category; `value` of it.
        scores: By model.
    """

    dataset: str
    task: str
    title: str
    name: str
    value: str
    samples: int
    scores: dict[str, Interval]


def group_rows(evaluation: Evaluation) -> list[GroupRow]:
    """Return a row for each value of what samples are scored apart by, test set by test set."""
    found: dict[tuple[str, str, str, str, str], dict[str, GroupScore]] = {}
    for model in evaluation.models:
        for task in model.scores:
            for name, values in task.groups.items():
                for value, group in values.items():
                    place = (task.dataset, task.task, task.titles[task.main], name, value)
                    found.setdefault(place, {})[model.name] = group
    return [
        GroupRow(*place, max(group.samples for group in groups.values()), {m: g.score for m, g in groups.items()})
        for place, groups in found.items()
    ]


def compared_models(evaluation: Evaluation) -> list[EvaluatedModel]:
    """Return all models but the baseline."""
    return [model for model in evaluation.models if model.name != evaluation.baseline]


def gain(difference: Interval, better: str) -> Interval:
    """Turn a difference of a metric so that more is better."""
    return difference if better == "higher" else Interval(-difference.value, -difference.high, -difference.low)


def verdict(gained: Interval) -> Outcome:
    """Whether a gain is one; empty where the interval holds 0."""
    return "better" if gained.low > 0 else "worse" if gained.high < 0 else ""


def against_majority(row: MetricRow, model: str) -> Outcome:
    """Whether a model is better than the most frequent answer; empty where the interval holds that."""
    if row.majority is None or model not in row.scores:
        return ""
    interval = row.scores[model]
    above = Interval(*(value - row.majority for value in (interval.value, interval.low, interval.high)))
    return verdict(gain(above, row.better))


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
    """Return which metrics could not be computed and which samples not used, and why; once if all models are alike."""
    models_by_reason: dict[str, list[str]] = {}
    for model in evaluation.models:
        for task in model.scores:
            for metric, why in task.unavailable.items():
                models_by_reason.setdefault(f"no {metric} for {task.dataset} {task.task}: {why}", []).append(model.name)
        for dataset, causes in model.bad.items():
            if causes:
                counted = ", ".join(f"{count} {cause}" for cause, count in causes.items())
                models_by_reason.setdefault(f"samples of {dataset} that could not be used: {counted}", []).append(
                    model.name
                )
    return [text + _model_names(names, evaluation.models) for text, names in models_by_reason.items()]


def score_notes(evaluation: Evaluation) -> list[str]:
    """Return what a reader of the main scores should know; once if all models are alike."""
    found: dict[str, list[str]] = {}
    for model in evaluation.models:
        for task in model.scores:
            if task.scores and (note := task.notes.get(task.main)):
                found.setdefault(f"{task.main} of {task.dataset} {task.task}: {note}", []).append(model.name)
    return [text + _model_names(names, evaluation.models) for text, names in found.items()]


def _model_names(names: Sequence[str], models: Sequence[EvaluatedModel]) -> str:
    return "" if len(set(names)) == len(models) else f" ({', '.join(dict.fromkeys(names))})"


def table(evaluation: Evaluation) -> str:
    """Return the main metric of each dataset and task, models side by side; what is missing or wrong below."""
    main = [row for row in metric_rows(evaluation) if row.main]
    models, compared = (
        [model.name for model in evaluation.models],
        [model.name for model in compared_models(evaluation)],
    )
    head = ["dataset", "task", "metric", "better", "samples", "majority", *models]
    head += [f"{name} - {evaluation.baseline}" for name in compared]
    scores, notes = "", ["nothing was scored"]
    if main:
        scores = format_table((_table_row(row, models, compared) for row in main), head)
        notes = ["[low, high]: 95 % interval over samples; majority: always the most frequent answer"]
    notes += [f"warning: {warning}" for warning in alarms(evaluation)]
    notes += [f"note: {note}" for note in (*not_computed(evaluation), *score_notes(evaluation))]
    return scores + "".join(f"  {note}\n" for note in notes)


def _table_row(row: MetricRow, models: list[str], compared: list[str]) -> list[str]:
    scores = [
        f"{score(row.scores[name].value)} {bounds(row.scores[name])}" if name in row.scores else "-" for name in models
    ]
    gains = [
        f"{signed(row.differences[name].value)} {bounds(row.differences[name])} {row.verdict(name)}".rstrip()
        if name in row.differences
        else "-"
        for name in compared
    ]
    counts = sorted(set(row.samples.values()))
    samples = "-".join(map(str, [counts[0], *counts[1:][-1:]]))
    return [row.dataset, row.task, row.title, row.better, samples, score(row.majority), *scores, *gains]


_LONG = 60  # letters of a list of names
_MOST_SCORES = 8  # in words; the table has all of them

Names = dict[tuple[str, str], str]


def headline(evaluation: Evaluation) -> list[str]:
    """Return sentences, the most important first: each model against the baseline, or one against the majority."""
    main = [row for row in metric_rows(evaluation) if row.main]
    names = test_set_names(row.test_set for row in main)
    compared = compared_models(evaluation)
    if not compared:
        return _alone(main, names, evaluation.models[0].name)
    base = next(model for model in evaluation.models if model.name == evaluation.baseline)
    ordered = sorted(compared, key=lambda model: -_won(main, model.name))
    sentences = [_against(main, names, model.name, base.name) for model in ordered]
    return [*sentences, *filter(None, (_cost(model, base) for model in ordered))]


def _won(main: Sequence[MetricRow], model: str) -> int:
    return sum({"better": 1, "worse": -1, "": 0}[row.verdict(model)] for row in main)


def _against(main: Sequence[MetricRow], names: Names, model: str, base: str) -> str:
    verdicts = [(names[row.test_set], row.verdict(model)) for row in main if model in row.differences]
    return _sentence(model, base, verdicts) or f"{model} and {base} have no scored samples in common."


def _alone(main: Sequence[MetricRow], names: Names, model: str) -> list[str]:
    verdicts = [(names[row.test_set], against_majority(row, model)) for row in main if row.majority is not None]
    sentences = [_sentence(model, "the most frequent answer", verdicts)]
    sentences += [_score(row, names[row.test_set], row.scores[model]) for row in main[:_MOST_SCORES]]
    return [sentence for sentence in sentences if sentence] or [f"Nothing of {model} was scored."]


def _score(row: MetricRow, name: str, interval: Interval) -> str:
    majority = "" if row.majority is None else f", the most frequent answer {score(row.majority)}"
    return f"{name}: {row.title} {score(interval.value)} {bounds(interval)}{majority}; {WORDS[row.better]}."


def _sentence(model: str, base: str, verdicts: Sequence[tuple[str, Outcome]]) -> str:
    """Write "pool beats no-pool on 2 of 5 tasks (asr and er) and is worse on 1 (aqa); on the other 2 ..."."""
    better, worse, open_ = ([name for name, found in verdicts if found == v] for v in ("better", "worse", ""))
    count, sets = len(verdicts), "test sets" if any(" · " in name for name, _ in verdicts) else "tasks"
    if not count:
        return ""
    if len(open_) == count:
        return f"{model} cannot be told from {base} on {f'any of {count} {sets}' if count > 1 else open_[0]}."
    won = f"beats {base} {_where(better, count, sets)}" if better else ""
    lost = (
        f"is worse{'' if better else f' than {base}'} {_where(worse, count, '' if better else sets)}" if worse else ""
    )
    both = " and ".join(filter(None, (won, lost)))
    others = f"on the other {len(open_)}" if len(open_) > 1 else "on the other"
    return f"{model} {both}{f'; {others} they cannot be told apart' if open_ else ''}."


def _where(names: Sequence[str], count: int, sets: str) -> str:
    if count == 1:
        return f"on {names[0]}"
    if len(names) == count:
        return f"on all {count} {sets}"
    of = f" of {count} {sets}" if sets else ""
    return f"on {len(names)}{of} ({listed(names, 3 if len(' '.join(names)) > _LONG else 5)})"


def _cost(model: EvaluatedModel, base: EvaluatedModel) -> str:
    if model.active is None or not base.active or f"{model.active / base.active:.3g}" == "1":
        return ""
    work = "" if model.gflops is None or not base.gflops else f" and {model.gflops / base.gflops:.3g} times its GFLOPs"
    return (
        f"A clip runs {amount(model.active)} parameters of {model.name}, {model.active / base.active:.3g} times those "
        f"of {base.name}{work}."
    )


MINUS = "\u2212"
WORDS = {"lower": "lower is better", "higher": "higher is better"}


def score(value: float | None) -> str:
    """Write a score or a difference: 63.20."""
    if value is None or not math.isfinite(value):
        return "–"
    written = f"{value:.2f}"
    return written.lstrip("-") if float(written) == 0 else written


def signed(value: float) -> str:
    """Write a difference with its sign: +1.20."""
    written = score(value)
    return f"+{written}" if value > 0 and float(written) else written


def bounds(interval: Interval) -> str:
    """Write the 95 % interval: [60.10, 66.30]."""
    return f"[{score(interval.low)}, {score(interval.high)}]"


def typeset(number: str) -> str:
    """Give a written number the minus of print."""
    return number.replace("-", MINUS)


def listed(names: Sequence[str], most: int) -> str:
    """Write a list: "a, b and c", "a, b and 7 more"."""
    shown = [*names[: most - 1], f"{len(names) - most + 1} more"] if len(names) > most else list(names)
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def test_set_names(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Name each (dataset, task) as briefly as is clear: by its task where there is one dataset only."""
    unique = list(dict.fromkeys(pairs))
    one = len({dataset for dataset, _ in unique}) == 1
    return {pair: pair[1] if one else " · ".join(dict.fromkeys(pair)) for pair in unique}
