"""Charts of a study: quality against cost, and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mowe_ray.output.svg import Axis, escape, frame, line, path, plot, spread_out, stretched, tag, text, thinned
from mowe_ray.output.text import amount
from mowe_ray.sweeping.colours import Colouring
from mowe_ray.sweeping.labels import metric_label, number, plus_minus, point_label
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.statistics import Point, best, cost_of, finite, pareto_front
from mowe_ray.sweeping.trials import History, Trial, objective

_HEIGHT = 300
_CURVE_HEIGHT = 230
_ASSUMED_WIDTH = 700  # pixels, only to keep labels from each other
_MOST_LABELS = 14
_MOST_POINTS = 24  # with more, only the winner and the front have labels
_PLACES = (("start", 8, -7), ("end", -8, -7), ("start", 8, 16), ("end", -8, 16), ("start", 12, 4), ("end", -12, 4))


def quality_against_cost(config: SweepConfig, found: Sequence[Point], colours: Colouring) -> str:
    """Draw every measured point with its standard error, and the front no other point beats."""
    shown = [(p, c, p.mean) for p in found if p.mean is not None and (c := cost_of(config, p)) is not None]
    if not shown:
        return ""
    costs = [cost for _, cost, _ in shown]
    x = Axis.over(costs, log=min(costs) > 0 and max(costs) / min(costs) > 8, count=6)
    y = Axis.over(v for p, _, mean in shown for v in (mean - (p.error or 0), mean + (p.error or 0)))
    front = pareto_front(config, found)
    steps = [(cost_of(config, point) or 0.0, point.mean or 0.0) for point in front]
    corners = [corner for (a, b), (c, d) in pairwise(steps) for corner in ((a, b), (c, b), (c, d))]
    winner = best(config, found)
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
        label = _short(point_label(point.values), 44)
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


def _short(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


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

    def validated(course: History) -> list[tuple[int, float | None]]:
        return [(v.step, objective(metric, v.loss, v.tasks)) for v in course.validations]

    def trained(course: History) -> list[tuple[int, float | None]]:
        return [(step, loss) for step, loss in course.train_loss]

    named = [(f"{metric_label(metric)} on validation", validated), ("loss in training", trained)]
    charts = []
    for title, of in named:
        courses = [(trial, of(histories[trial.number])) for trial in trials if trial.number in histories]
        curves = [
            Curve(trial, thinned([(float(step), value) for step, v in course if (value := finite(v)) is not None]))
            for trial, course in courses
        ]
        curves = [curve for curve in curves if curve.points]
        if curves:
            charts.append((title, _curves(title, curves, colours, wins)))
    return charts


def _curves(title: str, curves: list[Curve], colours: Colouring, winner: Point | None) -> str:
    winners = {trial.number for trial in winner.trials} if winner else set()
    curves = sorted(curves, key=lambda curve: curve.trial.number in winners)  # the winner above the others
    values = sorted(value for curve in curves for _, value in curve.points)
    x = Axis.over([0.0, *(step for curve in curves for step, _ in curve.points)], count=4)
    y = Axis.over(values)
    lines = [
        path(
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
    places = spread_out([sum(ends[colour]) / len(ends[colour]) for colour in named], 16)
    return "".join(
        tag("text", escape(_short(colours.labels[c], 19)), x="100%", y=place + 4, dx=8, class_="label",
            style=f"fill:color-mix(in oklab, {c} 72%, var(--ink))")
        for c, place in zip(named, places, strict=True)
    )  # fmt: skip
