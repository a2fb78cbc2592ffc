"""Charts of a study: quality against cost, and learning curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mowe_ray.output.charts import (
    MOST_COLOURS,
    MOST_POINTS,
    PLAIN,
    Axis,
    IntervalRow,
    chips,
    colour,
    escape,
    frame,
    interval_rows,
    line,
    path,
    plot,
    shade,
    spread_out,
    stretched,
    tag,
    text,
    thinned,
)
from mowe_ray.output.terminal import amount
from mowe_ray.sweeping.analysis.effects import Effect, Factor, Level, gap
from mowe_ray.sweeping.analysis.points import (
    Point,
    best,
    cost_of,
    finite,
    is_clear,
    metric_label,
    number,
    pareto_front,
    plus_minus,
)
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.trials import History, Trial, entry_label, objective, point_label

_HEIGHT = 300
_CURVE_HEIGHT = 230
_ASSUMED_WIDTH = 700  # pixels, only to keep labels from each other
_MOST_LABELS = 14
_MOST_POINTS_OF_CURVES = 20_000  # of all together: the report of a thousand trials opens in a browser
_MOST_POINTS = 24  # with more, only the winner and the front have labels
_PLACES = (("start", 8, -7), ("end", -8, -7), ("start", 8, 16), ("end", -8, 16), ("start", 12, 4), ("end", -12, 4))


def quality_against_cost(config: SweepConfig, measured: Sequence[Point], colours: Colouring) -> str:
    """Draw every measured point with its standard error, and the front no other point beats."""
    shown = [(p, c, p.mean) for p in measured if p.mean is not None and (c := cost_of(config, p)) is not None]
    if not shown:
        return ""
    costs = [cost for _, cost, _ in shown]
    x = Axis.over(costs, log=min(costs) > 0 and max(costs) / min(costs) > 8, count=6)
    y = Axis.over(v for p, _, mean in shown for v in (mean - (p.error or 0), mean + (p.error or 0)))
    front = pareto_front(config, measured)
    steps = [(cost_of(config, point) or 0.0, point.mean or 0.0) for point in front]
    corners = [corner for (a, b), (c, d) in pairwise(steps) for corner in ((a, b), (c, b), (c, d))]
    winner = best(config, measured)
    marks = [_point(config, p, x.across(cost), mean, y, colours, p is winner) for p, cost, mean in shown]
    labels = _labels([(p, x.at(cost), y.down(mean, _HEIGHT)) for p, cost, mean in shown], [winner, *front])
    of = "GFLOPs of a 30 s clip" if config.objective.against == "gflops" else "active parameters"
    metric = metric_label(config.objective.metric)
    return plot(
        _HEIGHT,
        frame(x, y, _HEIGHT, of),
        stretched(_HEIGHT, path(corners, x, y, _HEIGHT, class_="front")) if corners else "",
        *marks,
        labels,
        label=f"{metric} against {of}",
    )


def _point(config: SweepConfig, p: Point, x: str, mean: float, y: Axis, colours: Colouring, wins: bool) -> str:
    cost = "GFLOPs" if config.objective.against == "gflops" else "active parameters"
    tip = (
        f"{point_label(p.values)}\n{metric_label(config.objective.metric)} {plus_minus(mean, p.error)}\n"
        f"{amount(cost_of(config, p))} {cost}\n{len(p.objectives)} of {len(p.trials)} seeds finished"
    )
    top, bottom = (y.down(mean + sign * (p.error or 0), _HEIGHT) for sign in (1, -1))
    centre = y.down(mean, _HEIGHT)
    return tag(
        "g",
        line(x, top, x, bottom, class_="error") if p.error else "",
        tag("circle", cx=x, cy=centre, r=11, class_="halo") if wins else "",
        tag("circle", cx=x, cy=centre, r=6.5 if wins else 5, class_="dot" if p.complete else "dot open"),
        tag("circle", cx=x, cy=centre, r=14, class_="target"),
        style=f"--k:{colours.of(p.values)}",
        data_tip=tip,
    )


def _labels(places: Sequence[tuple[Point, float, float]], first: Sequence[Point | None]) -> str:
    """Label points where there is room: the winner and the front first, then the rest."""
    important = [point.number for point in first if point is not None]
    ordered = sorted(places, key=lambda place: (place[0].number not in important, important[:1] != [place[0].number]))
    if len(places) > _MOST_POINTS:
        ordered = [place for place in ordered if place[0].number in important]
    taken = [(at * _ASSUMED_WIDTH - 7, y - 7, at * _ASSUMED_WIDTH + 7, y + 7) for _, at, y in places]
    written: list[str] = []
    for point, at, y in ordered:
        label = point_label(point.values, 44)
        # The mean width of a character of this font in pixels; the page cannot be measured here.
        width = 6.7 * len(label)
        for anchor, dx, dy in _PLACES:
            left = at * _ASSUMED_WIDTH + dx - (width if anchor == "end" else 0)
            box = (left, y + dy - 11, left + width, y + dy + 3)
            if left < 0 or box[2] > _ASSUMED_WIDTH + 40 or box[1] < -12 or box[3] > _HEIGHT:
                continue
            if len(written) < _MOST_LABELS and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                rank = "first" if [point.number] == important[:1] else "key" if point.number in important else "minor"
                written.append(text(label, f"{100 * at:.2f}%", y + dy, dx=dx, class_=f"label {anchor} {rank}"))
                break
    return "".join(written)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass(frozen=True)
class Curve:
    """The course of a number in a trial: (step, value)."""

    trial: Trial
    points: list[tuple[float, float]]


def learning_curves(
    config: SweepConfig,
    trials: Sequence[Trial],
    histories: Mapping[int, History],
    colours: Colouring,
    wins: Point | None,
) -> list[tuple[str, str]]:
    """Draw the objective on validation and the training loss over steps: (title, chart), those that have data."""
    metric = config.objective.metric

    def validated(course: History) -> list[tuple[float, float | None]]:
        return [(v.step, objective(metric, v.loss, v.tasks)) for v in course.validations]

    def trained(course: History) -> list[tuple[float, float | None]]:
        return [(step, loss) for step, loss in course.train_loss]

    named = [(f"{metric_label(metric)} on validation", validated), ("loss in training", trained)]
    charts = []
    for title, of in named:
        courses = [(trial, of(histories[trial.number])) for trial in trials if trial.number in histories]
        most = min(_MOST_POINTS_OF_CURVES // max(1, len(courses)), MOST_POINTS)
        curves = [
            Curve(
                trial, thinned([(step, value) for step, v in course if (value := finite(v)) is not None], max(24, most))
            )
            for trial, course in courses
        ]
        curves = [curve for curve in curves if curve.points]
        if curves:
            charts.append((title, _curves(title, curves, colours, wins)))
    return charts


def _curves(title: str, curves: list[Curve], colours: Colouring, winner: Point | None) -> str:
    winners = {trial.number for trial in winner.trials} if winner else set()
    curves = sorted(curves, key=lambda curve: curve.trial.number in winners)  # the winner above the others
    # Both axes hold all curves, so that trials can be compared.
    values = sorted(value for curve in curves for _, value in curve.points)
    x = Axis.over([0.0, *(step for curve in curves for step, _ in curve.points)], count=4)
    y = Axis.over(values)
    lines = [
        path(
            # A path of one point draws nothing; from a point to itself it draws a dot.
            curve.points if len(curve.points) > 1 else curve.points * 2,
            x,
            y,
            _CURVE_HEIGHT,
            class_="curve winner" if curve.trial.number in winners else "curve",
            style=f"--k:{colours.of(curve.trial.values)}",
            data_tip=_curve_tip(curve),
        )
        for curve in curves
    ]
    ends = [_end(curve, x, y, colours) for curve in curves]
    labels = _ends_named(curves, y, colours)
    return plot(
        _CURVE_HEIGHT,
        frame(x, y, _CURVE_HEIGHT, "step"),
        stretched(_CURVE_HEIGHT, *lines),
        *ends,
        labels,
        label=f"{title}, over steps",
        kind="framed labelled" if labels else "framed",
    )


def _curve_tip(curve: Curve) -> str:
    step, value = curve.points[-1]
    trial = curve.trial
    return f"trial {trial.number}, {trial.status}\n{point_label(trial.values)}\n{number(value)} at step {step:.0f}"


def _end(curve: Curve, x: Axis, y: Axis, colours: Colouring) -> str:
    """Mark how a curve ends: a dot for a finished trial, a bar for a stopped, a cross for a failed one."""
    step, value = curve.points[-1]
    at, down = x.across(step), y.down(value, _CURVE_HEIGHT)
    shapes = {
        "finished": tag("circle", cx=at, cy=down, r=2.5, class_="dot"),
        "stopped": line(at, down - 6, at, down + 6, class_="stop"),
        "failed": text("×", at, down + 6, class_="cross mid"),
    }
    mark = shapes.get(curve.trial.status, tag("circle", cx=at, cy=down, r=2.5, class_="dot open"))
    return tag("g", mark, style=f"--k:{colours.of(curve.trial.values)}", data_tip=_curve_tip(curve))


def _ends_named(curves: Sequence[Curve], y: Axis, colours: Colouring) -> str:
    """Write each colour's label beside the mean end of its finished curves."""
    ends: dict[str, list[float]] = {}
    for curve in curves:
        if curve.trial.status == "finished":
            ends.setdefault(colours.of(curve.trial.values), []).append(y.down(curve.points[-1][1], _CURVE_HEIGHT))
    named = [colour for colour in colours.labels if colour in ends]
    if not colours.by_value:
        return ""
    # 16 pixels: the height of a line of text.
    places = spread_out([sum(ends[colour]) / len(ends[colour]) for colour in named], 16)
    return "".join(
        tag("text", escape(colours.short(c, 19)), x="100%", y=place + 4, dx=8, class_="label",
            style=f"fill:color-mix(in oklab, {c} 72%, var(--ink))")
        for c, place in zip(named, places, strict=True)
    )  # fmt: skip


@dataclass(frozen=True)
class Colouring:
    """Colours by the value of a factor.

    Attributes:
        labels: Label of each colour, the best value first; numbers by size.
    """

    factor: Factor | None = None
    by_value: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    low: float = 0.0
    high: float = 0.0

    @property
    def title(self) -> str:
        """Name of the factor."""
        return self.factor.name if self.factor else ""

    def of(self, values: Mapping[str, Any]) -> str:
        """Return the colour of a point."""
        if self.factor is None or self.factor.entry not in values:
            return PLAIN
        value = self.factor.of(values)
        if self.factor.kind == "range":
            low, high, at = (math.log(x) if self.factor.log else x for x in (self.low, self.high, value))
            return shade((at - low) / (high - low))
        return self.by_value.get(json.dumps(value, sort_keys=True, default=str), PLAIN)

    def short(self, colour: str, most: int) -> str:
        """Return the label of a colour in so many characters: without the factor's name, if it does not fit."""
        label = self.labels[colour]
        if len(label) > most:
            label = label.removeprefix(f"{self.title} ")
        return label if len(label) <= most else label[: most - 1] + "…"

    def legend(self, narrow: bool = False) -> str:
        """Return a legend; with `narrow` it is shown only where the page is too narrow for labels at curves."""
        return chips(self.labels.items(), "chips narrow" if narrow and self.by_value else "chips")


def colouring(effects: Sequence[Effect], better_is_more: bool) -> Colouring:
    """Choose the most important factor, of those with few enough values for distinct colours."""
    chosen = next((e for e in effects if e.trend or len(e.levels) <= MOST_COLOURS), None)
    if chosen is None:
        return Colouring()
    if chosen.trend:
        numbers = [chosen.factor.of(point.values) for level in chosen.levels for point in level.points]
        low, high = min(numbers), max(numbers)
        name = chosen.factor.name
        ends = {shade(0): f"{name} {entry_label(low)}", shade(1): entry_label(high)}
        return Colouring(chosen.factor, {}, ends, low, high)
    numeric = all(isinstance(level.value, int | float) and not isinstance(level.value, bool) for level in chosen.levels)
    levels = list(chosen.levels)
    # Numbers keep their order, and get shades of one colour; other values get colours from best to worst.
    if not numeric:
        levels.sort(key=lambda level: level.mean, reverse=better_is_more)
    shades = [shade(i / (len(levels) - 1)) if numeric else colour(i) for i in range(len(levels))]
    keys = [json.dumps(level.value, sort_keys=True, default=str) for level in levels]
    prefix = "" if chosen.factor.kind == "encoder" else f"{chosen.factor.name} "
    labels = {c: prefix + level.label for c, level in zip(shades, levels, strict=True)}
    return Colouring(chosen.factor, dict(zip(keys, shades, strict=True)), labels)


_SCATTER = 190
_MOST_LEVELS = 16


def effect_charts(effects: Sequence[Effect], metric: str, better_is_more: bool) -> list[str]:
    """Draw each effect, all over the same axis of the objective."""
    if not effects:
        return []
    measured = {point.number: point for effect in effects for level in effect.levels for point in level.points}
    values = [v for p in measured.values() if p.mean is not None for v in (p.mean,)]
    reach = [v for e in effects for level in e.levels for v in _interval(level)]
    axis = Axis.over([*values, *reach], count=4)
    return [_effect(effect, axis, metric, better_is_more) for effect in effects]


def _interval(level: Level) -> tuple[float, float]:
    return level.mean - (level.error or 0), level.mean + (level.error or 0)


def _effect(effect: Effect, axis: Axis, metric: str, better_is_more: bool) -> str:
    name = effect.factor.name
    title = f"{name} in the pool" if effect.factor.kind == "encoder" else name
    body = _scatter(effect, metric) if effect.trend else _rows(effect, axis, metric, better_is_more)
    share = f"explains {100 * effect.importance:.0f} % of the variance (chance: {100 * effect.chance:.0f} %)"
    note = ("each value at one point" if effect.chance == 1 else share) + (", paired" if effect.paired else "")
    return tag("figure", tag("h3", escape(title)), tag("p", escape(note), class_="note"), body, class_="effect")


def _rows(effect: Effect, axis: Axis, metric: str, better_is_more: bool) -> str:
    numeric = all(isinstance(level.value, int | float) for level in effect.levels)
    ordered = sorted(effect.levels, key=lambda level: level.mean, reverse=better_is_more)
    best = ordered[0] if is_clear(*gap(ordered[0], ordered[-1])) else None
    shown = list(effect.levels) if numeric else ordered[:_MOST_LEVELS]
    rows = [_row(level, metric, level is best) for level in shown]
    left_out = len(effect.levels) - len(shown)
    more = tag("p", f"The best {len(shown)} of {len(effect.levels)} values.", class_="note") if left_out > 0 else ""
    return interval_rows(rows, axis) + more


def _row(level: Level, metric: str, is_best: bool) -> IntervalRow:
    low, high = _interval(level)
    return IntervalRow(
        level.label,
        level.mean,
        low,
        high,
        written=plus_minus(level.mean, level.error),
        tip=f"{level.label}\n{metric} {plus_minus(level.mean, level.error)}\n{_points(level)}",
        colour="var(--accent)" if is_best else "var(--muted)",
        strong=is_best,
        faint=[(point.mean, _tip(point)) for point in level.points if point.mean is not None],
    )


def _points(level: Level) -> str:
    return "1 point" if len(level.points) == 1 else f"mean over {len(level.points)} points"


def _tip(point: Point) -> str:
    return f"{point_label(point.values)}\n{plus_minus(point.mean, point.error)}"


def _scatter(effect: Effect, metric: str) -> str:
    assert effect.trend
    factor, trend = effect.factor, effect.trend
    dots = [(factor.of(p.values), p.mean, p) for level in effect.levels for p in level.points if p.mean is not None]
    x = Axis.over((at for at, _, _ in dots), log=factor.log)
    y = Axis.over((mean for _, mean, _ in dots), count=4)
    ends = [at if not factor.log else 10**at for at in (x.low, x.high)]
    fitted = [(end, trend.intercept + trend.slope * at) for end, at in zip(ends, (x.low, x.high), strict=True)]
    marks = [
        tag("circle", cx=x.across(at), cy=y.down(mean, _SCATTER), r=4.5, class_="dot",
            style="--k:var(--accent)", data_tip=f"{factor.name} = {entry_label(at)}\n{_tip(point)}")
        for at, mean, point in dots
    ]  # fmt: skip
    drawn = tag("svg", stretched(_SCATTER, path(fitted, x, y, _SCATTER, class_="front")), width="100%", height=_SCATTER)
    verdict = "A clear trend" if trend.clear else "No clear trend"
    thirds = "; ".join(f"{level.label}: {number(level.mean)}" for level in effect.levels)
    caption = (
        f"{verdict}: rank correlation {trend.correlation:+.2f} over {trend.points} points. Means of thirds: {thirds}."
    )
    chart = plot(_SCATTER, frame(x, y, _SCATTER, factor.name), drawn, *marks, label=f"{metric} over {factor.name}")
    return chart + tag("p", escape(caption), class_="note")
