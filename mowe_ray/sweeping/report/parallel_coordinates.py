"""Parallel coordinates: an axis for every entry of the space, for cost and objective, and a line for every point."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mowe_ray.output.charts import Axis, escape, line, plot, stretched, tag, text, tick_label
from mowe_ray.output.terminal import amount
from mowe_ray.sweeping.analysis.points import Point, best, cost_of, metric_label, number
from mowe_ray.sweeping.report.charts import Colouring
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.trials import entry_label, entry_name, point_label

_HEIGHT = 230
_LEAST_WIDTH = 118  # pixels of an axis, so that its labels have room; the chart scrolls where the page has less


@dataclass(frozen=True)
class _Coordinate:
    """One axis.

    Attributes:
        at: Takes a point, returns where it crosses, from 0 (below) to 1; None where it does not.
        ticks: Places and their labels.
    """

    title: str
    at: Callable[[Point], float | None]
    ticks: list[tuple[float, str]]


def parallel_coordinates(config: SweepConfig, measured: Sequence[Point], colours: Colouring) -> str:
    """Draw every measured point as a line across its values, its cost and its objective; empty for a single entry."""
    shown = [point for point in measured if point.mean is not None]
    axes = [axis for name in config.space if (axis := _entry(name, shown)) is not None]
    if len(axes) < 2 or len(shown) < 2:
        return ""
    if any(cost_of(config, point) is not None for point in shown):
        of = "GFLOPs" if config.objective.against == "gflops" else "active parameters"
        axes.append(_numbers(of, shown, lambda point: cost_of(config, point), amount))
    axes.append(_numbers(metric_label(config.objective.metric), shown, lambda point: point.mean, number))
    winner = best(config, measured)
    ordered = sorted(shown, key=lambda point: point is winner)  # the winner above the others
    places = [1000 * i / (len(axes) - 1) for i in range(len(axes))]
    lines = [_line(point, axes, places, colours, point is winner) for point in ordered]
    drawn = [
        _axis(axis, place / 10, i == len(axes) - 1) for i, (axis, place) in enumerate(zip(axes, places, strict=True))
    ]
    chart = plot(
        _HEIGHT, stretched(_HEIGHT, *lines), *drawn, label=f"All points across {len(axes)} axes", kind="framed parallel"
    )
    return tag("div", tag("div", chart, style=f"min-width:{_LEAST_WIDTH * len(axes)}px"), class_="wide")


def _entry(name: str, points: Sequence[Point]) -> _Coordinate | None:
    """Return the axis of an entry: by size if its values are many numbers, else evenly spaced; None for one value."""
    values = [point.values[name] for point in points if name in point.values]
    different = {json.dumps(value, sort_keys=True, default=str): value for value in values}
    if len(different) < 2:
        return None
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numeric and len(different) > 6:
        positive = min(values) > 0 and max(values) / min(values) > 50
        return _numbers(entry_name(name), points, lambda point: point.values.get(name), tick_label, log=positive)
    ordered = dict(sorted(different.items(), key=lambda item: item[1])) if numeric else different
    place = {key: (i + 0.5) / len(ordered) for i, key in enumerate(ordered)}

    def at(point: Point) -> float | None:
        return place[json.dumps(point.values[name], sort_keys=True, default=str)] if name in point.values else None

    return _Coordinate(entry_name(name), at, [(place[key], entry_label(value)) for key, value in ordered.items()])


def _numbers(
    title: str, points: Sequence[Point], of: Callable[[Point], Any], label: Callable[[Any], str], log: bool = False
) -> _Coordinate:
    axis = Axis.over((value for point in points if (value := of(point)) is not None), log=log, count=4)

    def at(point: Point) -> float | None:
        value = of(point)
        return None if value is None else axis.at(value)

    return _Coordinate(title, at, [(axis.at(tick), label(tick)) for tick in axis.ticks])


def _line(point: Point, axes: Sequence[_Coordinate], places: Sequence[float], colours: Colouring, wins: bool) -> str:
    crossings = [(place, at) for axis, place in zip(axes, places, strict=True) if (at := axis.at(point)) is not None]
    way = "L".join(f"{place:.1f} {_HEIGHT * (1 - at):.1f}" for place, at in crossings)
    tip = f"{point_label(point.values)}\n{number(point.mean)}, {len(point.objectives)} of {len(point.trials)} seeds"
    kind = "way winner" if wins else "way"
    return tag("path", d=f"M{way}", class_=kind, style=f"--k:{colours.of(point.values)}", data_tip=tip)


def _axis(axis: _Coordinate, place: float, last: bool) -> str:
    side = {"class_": "label minor-axis end", "dx": -7} if last else {"class_": "label minor-axis", "dx": 7}
    ticks = [text(_short(label), f"{place:.2f}%", round(_HEIGHT * (1 - at) + 4, 1), **side) for at, label in axis.ticks]
    anchor = "end" if last else "mid" if place else ""
    title = tag(
        "text", escape(_short(axis.title, 20)), x=f"{place:.2f}%", y=_HEIGHT + 20, class_=f"tick {anchor}".strip()
    )
    return line(f"{place:.2f}%", 0, f"{place:.2f}%", _HEIGHT, class_="axis") + "".join(ticks) + title


def _short(label: str, most: int = 17) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
