"""Charts that compare the models of an evaluation: differences to the baseline, and quality against cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mowe_ray.evaluation.comparison import Line, gain, is_finite, others
from mowe_ray.evaluation.labels import WORDS, bounds, score, signed, test_set_names, typeset
from mowe_ray.evaluation.results import EvaluatedModel, Evaluation, Interval
from mowe_ray.output.colours import chips, colour
from mowe_ray.output.rows import IntervalRow, interval_rows
from mowe_ray.output.svg import Axis, escape, frame, line, plot, tag
from mowe_ray.output.text import amount

_HEIGHT = 170
_MOST_FIGURES = 8
_COSTS: dict[str, Callable[[EvaluatedModel], float | None]] = {
    "active parameters": lambda model: model.active,
    "GFLOPs of a 30 s clip": lambda model: model.gflops,
}


def model_colours(evaluation: Evaluation) -> dict[str, str]:
    """Return each model's colour, by name."""
    return {model.name: colour(i) for i, model in enumerate(evaluation.models)}


def legend(evaluation: Evaluation) -> str:
    """Say which colour is which model, where there are several."""
    colours = model_colours(evaluation)
    return chips((c, name) for name, c in colours.items()) if len(colours) > 1 else ""


def difference_chart(evaluation: Evaluation, found: Sequence[Line]) -> str:
    """Draw every model's gain over the baseline on each test set's main metric, so that right is better."""
    compared, colours = [model.name for model in others(evaluation)], model_colours(evaluation)
    names = test_set_names(one.test_set for one in found)
    rows = [
        _row(one, name, names[one.test_set] + (f", {name}" if len(compared) > 1 else ""), colours[name])
        for one in found
        if one.main
        for name in compared
        if name in one.differences
    ]
    if not rows:
        return ""
    axis = Axis.over([0.0, *(value for row in rows for value in (row.low, row.high))])
    return interval_rows(rows, axis, zero=True, ends=("worse", "better"))


def _row(one: Line, model: str, label: str, fill: str) -> IntervalRow:
    difference, verdict = one.differences[model], one.verdict(model)
    gained = gain(difference, one.better)
    written = f"{signed(difference.value)} {bounds(difference)}"
    tip = f"{label}\n{one.title} {typeset(written)}, {WORDS[one.better]}\n{verdict or 'cannot be told apart'}"
    return IntervalRow(
        label,
        gained.value,
        gained.low,
        gained.high,
        written=typeset(signed(difference.value)),
        more=typeset(bounds(difference)),
        tip=tip,
        colour=fill,
        strong=bool(verdict),
        hollow=not verdict,
    )


def quality_charts(evaluation: Evaluation, found: Sequence[Line]) -> str:
    """Draw each test set's main metric against what a clip costs, for models that differ in cost."""
    names, colours = test_set_names(one.test_set for one in found), model_colours(evaluation)
    costs = {
        title: {model.name: float(cost) for model in evaluation.models if (cost := of(model)) is not None}
        for title, of in _COSTS.items()
    }
    figures = [
        _figure(one, names[one.test_set], title, by_model, evaluation, colours)
        for one in found
        if one.main
        for title, by_model in costs.items()
        if len({by_model[name] for name in one.scores if name in by_model}) > 1
    ]
    shown = tag("div", *figures[:_MOST_FIGURES], class_="two") if figures else ""
    if len(figures) > _MOST_FIGURES:
        rest = tag("div", *figures[_MOST_FIGURES:], class_="two")
        shown += tag("details", tag("summary", f"{len(figures) - _MOST_FIGURES} more charts"), rest)
    return shown


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
    x = Axis.over(prices, log=min(prices, default=0) > 0 and max(prices) / min(prices) > 8, count=4)
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
