"""Charts that compare the models of an evaluation: differences to the baseline, and quality against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mowe_ray.evaluation.report.summary import (
    WORDS,
    MetricRow,
    bounds,
    compared_models,
    gain,
    is_finite,
    score,
    signed,
    test_set_names,
    typeset,
)
from mowe_ray.evaluation.results import EvaluatedModel, Evaluation, Interval
from mowe_ray.output.charts import Axis, IntervalRow, chips, colour, escape, frame, interval_rows, line, plot, tag
from mowe_ray.output.html_page import folded
from mowe_ray.output.terminal import amount

_HEIGHT = 150
_MOST_FIGURES = 6


def model_colours(evaluation: Evaluation) -> dict[str, str]:
    """Return each model's colour, by name."""
    return {model.name: colour(i) for i, model in enumerate(evaluation.models)}


def legend(evaluation: Evaluation) -> str:
    """Return a legend of the models' colours, empty for a single model."""
    colours = model_colours(evaluation)
    return chips((c, name) for name, c in colours.items()) if len(colours) > 1 else ""


def difference_chart(evaluation: Evaluation, metrics: Sequence[MetricRow]) -> str:
    """Draw every model's gain over the baseline on each test set's main metric, so that right is better."""
    compared, colours = [model.name for model in compared_models(evaluation)], model_colours(evaluation)
    names = test_set_names(metric.test_set for metric in metrics)
    rows = [
        _row(metric, names[metric.test_set], name, colours[name], len(compared) > 1)
        for metric in metrics
        if metric.main
        for name in compared
        if name in metric.differences
    ]
    if not rows:
        return ""
    axis = Axis.over([0.0, *(value for row in rows for value in (row.low, row.high))])
    return interval_rows(rows, axis, zero=True, ends=("← worse", "better →"))


def _row(metric: MetricRow, test_set: str, model: str, fill: str, several: bool) -> IntervalRow:
    difference, verdict = metric.differences[model], metric.verdict(model)
    gained = gain(difference, metric.better)
    written = f"{signed(difference.value)} {bounds(difference)}"
    title = f"{metric.title} {typeset(written)}, {WORDS[metric.better]}"
    tip = f"{model}, {test_set}\n{title}\n{verdict or 'cannot be told apart'}"
    return IntervalRow(
        model if several else test_set,
        gained.value,
        gained.low,
        gained.high,
        written=typeset(signed(difference.value)),
        more=typeset(bounds(difference)),
        tip=tip,
        colour=fill,
        strong=bool(verdict),
        hollow=not verdict,
        group=test_set if several else "",
    )


def quality_charts(evaluation: Evaluation, metrics: Sequence[MetricRow]) -> str:
    """Draw each test set's main metric against active parameters, and folded away against GFLOPs."""
    sizes = {m.name: m.active for m in evaluation.models if m.active is not None}
    by_size = _figures(evaluation, metrics, "active parameters", sizes)
    works = {m.name: m.gflops for m in evaluation.models if m.gflops is not None}
    by_work = _figures(evaluation, metrics, "GFLOPs of a 30 s clip", works)
    more = tag("details", tag("summary", "The same against GFLOPs"), by_work) if by_work else ""
    return by_size + more


def _figures(evaluation: Evaluation, metrics: Sequence[MetricRow], title: str, costs: Mapping[str, float]) -> str:
    names, colours = test_set_names(metric.test_set for metric in metrics), model_colours(evaluation)
    figures = [
        _figure(metric, names[metric.test_set], title, costs, evaluation, colours)
        for metric in metrics
        if metric.main and len({costs[name] for name in metric.scores if name in costs}) > 1
    ]
    return folded(figures, _MOST_FIGURES, "three")


def _figure(
    metric: MetricRow,
    name: str,
    cost: str,
    by_model: Mapping[str, float],
    evaluation: Evaluation,
    colours: Mapping[str, str],
) -> str:
    shown = [
        m
        for m in evaluation.models
        if m.name in by_model and m.name in metric.scores and is_finite(metric.scores[m.name])
    ]
    prices = [by_model[model.name] for model in shown]
    x = Axis.over(prices, log=min(prices, default=0) > 0 and max(prices) / min(prices) > 8, count=3)
    y = Axis.over((v for m in shown for v in (metric.scores[m.name].low, metric.scores[m.name].high)), count=3)
    dots = [_dot(metric, model, by_model[model.name], x, y, colours[model.name]) for model in shown]
    label = f"{metric.title} of {name} against {cost}"
    chart = plot(_HEIGHT, frame(x, y, _HEIGHT, cost), *dots, label=label)
    return tag(
        "figure",
        tag("h3", escape(name)),
        tag("p", escape(f"{metric.title}, {WORDS[metric.better]}"), class_="note"),
        chart,
    )


def _dot(metric: MetricRow, model: EvaluatedModel, cost: float, x: Axis, y: Axis, fill: str) -> str:
    interval: Interval = metric.scores[model.name]
    at, centre = x.across(cost), y.down(interval.value, _HEIGHT)
    work = "" if model.gflops is None else f", {model.gflops:.3g} GFLOPs a clip"
    tip = (
        f"{model.name}\n{metric.title} {typeset(f'{score(interval.value)} {bounds(interval)}')}\n"
        f"{amount(model.active)} active parameters{work}"
    )
    return tag(
        "g",
        line(at, y.down(interval.high, _HEIGHT), at, y.down(interval.low, _HEIGHT), class_="error"),
        tag("circle", cx=at, cy=centre, r=5, class_="dot"),
        tag("circle", cx=at, cy=centre, r=14, class_="target"),
        style=f"--k:{fill}",
        data_tip=tip,
    )
