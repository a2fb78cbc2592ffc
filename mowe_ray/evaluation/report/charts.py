"""Charts that compare the models of an evaluation: differences to the baseline, and quality against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mowe_ray.evaluation.report.summary import (
    WORDS,
    Line,
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
    """Say which colour is which model, where there are several."""
    colours = model_colours(evaluation)
    return chips((c, name) for name, c in colours.items()) if len(colours) > 1 else ""


def difference_chart(evaluation: Evaluation, found: Sequence[Line]) -> str:
    """Draw every model's gain over the baseline on each test set's main metric, so that right is better."""
    compared, colours = [model.name for model in compared_models(evaluation)], model_colours(evaluation)
    names = test_set_names(one.test_set for one in found)
    rows = [
        _row(one, names[one.test_set], name, colours[name], len(compared) > 1)
        for one in found
        if one.main
        for name in compared
        if name in one.differences
    ]
    if not rows:
        return ""
    axis = Axis.over([0.0, *(value for row in rows for value in (row.low, row.high))])
    return interval_rows(rows, axis, zero=True, ends=("← worse", "better →"))


def _row(one: Line, test_set: str, model: str, fill: str, several: bool) -> IntervalRow:
    difference, verdict = one.differences[model], one.verdict(model)
    gained = gain(difference, one.better)
    written = f"{signed(difference.value)} {bounds(difference)}"
    tip = (
        f"{model}, {test_set}\n{one.title} {typeset(written)}, {WORDS[one.better]}\n{verdict or 'cannot be told apart'}"
    )
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


def quality_charts(evaluation: Evaluation, found: Sequence[Line]) -> str:
    """Draw each test set's main metric against active parameters, and folded away against GFLOPs."""
    by_size = _figures(evaluation, found, "active parameters", {m.name: m.active for m in evaluation.models})
    works = {m.name: m.gflops for m in evaluation.models if m.gflops is not None}
    by_work = _figures(evaluation, found, "GFLOPs of a 30 s clip", works)
    more = tag("details", tag("summary", "The same against GFLOPs"), by_work) if by_work else ""
    return by_size + more


def _figures(evaluation: Evaluation, found: Sequence[Line], title: str, costs: Mapping[str, float]) -> str:
    names, colours = test_set_names(one.test_set for one in found), model_colours(evaluation)
    figures = [
        _figure(one, names[one.test_set], title, costs, evaluation, colours)
        for one in found
        if one.main and len({costs[name] for name in one.scores if name in costs}) > 1
    ]
    return folded(figures, _MOST_FIGURES, "three")


def _figure(
    one: Line,
    name: str,
    cost: str,
    by_model: Mapping[str, float],
    evaluation: Evaluation,
    colours: Mapping[str, str],
) -> str:
    shown = [
        m for m in evaluation.models if m.name in by_model and m.name in one.scores and is_finite(one.scores[m.name])
    ]
    prices = [by_model[model.name] for model in shown]
    x = Axis.over(prices, log=min(prices, default=0) > 0 and max(prices) / min(prices) > 8, count=3)
    y = Axis.over((v for m in shown for v in (one.scores[m.name].low, one.scores[m.name].high)), count=3)
    dots = [_dot(one, model, by_model[model.name], x, y, colours[model.name]) for model in shown]
    label = f"{one.title} of {name} against {cost}"
    chart = plot(_HEIGHT, frame(x, y, _HEIGHT, cost), *dots, label=label)
    return tag(
        "figure", tag("h3", escape(name)), tag("p", escape(f"{one.title}, {WORDS[one.better]}"), class_="note"), chart
    )


def _dot(one: Line, model: EvaluatedModel, cost: float, x: Axis, y: Axis, fill: str) -> str:
    found: Interval = one.scores[model.name]
    at, centre = x.across(cost), y.down(found.value, _HEIGHT)
    work = "" if model.gflops is None else f", {model.gflops:.3g} GFLOPs a clip"
    tip = (
        f"{model.name}\n{one.title} {typeset(f'{score(found.value)} {bounds(found)}')}\n"
        f"{amount(model.active)} active parameters{work}"
    )
    return tag(
        "g",
        line(at, y.down(found.high, _HEIGHT), at, y.down(found.low, _HEIGHT), class_="error"),
        tag("circle", cx=at, cy=centre, r=5, class_="dot"),
        tag("circle", cx=at, cy=centre, r=14, class_="target"),
        style=f"--k:{fill}",
        data_tip=tip,
    )
