"""The pieces charts are made of: markup, axes with round ticks, and plots as wide as the page.

A plot is an SVG without a view box. Across, everything is in percent of its width, down in pixels, so text and dots
keep their size on any screen; only paths are stretched, with strokes that are not.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

_MOST_POINTS = 200


def escape(text: object) -> str:
    """Write text so that it is never read as markup."""
    return html.escape(str(text))


def tag(element: str, *children: str, **attributes: object) -> str:
    """Write an element; children are markup, attributes are escaped, `class_` and `stroke_width` lose their `_`."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{element}{written}>{''.join(children)}</{element}>"


@dataclass(frozen=True)
class Axis:
    """A range of numbers, with round ticks.

    Attributes:
        log: Whether equal factors, not equal differences, are equally far apart.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], log: bool = False, count: int = 5) -> Axis:
        """Return an axis that holds all values, with a little room around them."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
        scaled = [math.log10(value) if log else value for value in known]
        low, high = min(scaled), max(scaled)
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
        if log and (decades := _decades(low, high)):
            return cls(low, high, decades, True)
        step = _round_step((high - low) / (count + 1))
        first, last = math.ceil(low / step), math.floor(high / step)
        ticks = [round(i * step, 12) for i in range(first, last + 1)]
        return cls(low, high, tuple(10**tick if log else tick for tick in ticks), log)

    def at(self, value: float) -> float:
        """Where a value is, from 0 to 1."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def across(self, value: float) -> str:
        """Where a value is across a plot."""
        return f"{100 * self.at(value):.2f}%"

    def down(self, value: float, height: float) -> float:
        """Where a value is down a plot of so many pixels."""
        return round(height * (1 - self.at(value)), 1)


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _decades(low: float, high: float) -> tuple[float, ...]:
    marks = [m * 10.0**d for d in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    inside = [mark for mark in marks if low <= math.log10(mark) <= high]
    if len(inside) > 6:
        inside = [mark for mark in inside if math.isclose(math.log10(mark) % 1, 0, abs_tol=1e-9)]
    return tuple(inside) if len(inside) >= 2 else ()


def tick_label(value: float) -> str:
    """Write a tick: 0.05, 1.2 M, 1e-05."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g} {unit}"
    return f"{value:.4g}".replace("-", "\u2212")


def text(content: object, x: object, y: object, **attributes: object) -> str:
    """Write text at a place."""
    return tag("text", escape(content), x=x, y=y, **attributes)


def line(x1: object, y1: object, x2: object, y2: object, **attributes: object) -> str:
    """Draw a straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def frame(x: Axis, y: Axis, height: float, x_label: str) -> str:
    """Draw grid, ticks and the label of the axis below."""
    rows = [
        line(0, y.down(tick, height), "100%", y.down(tick, height), class_="grid")
        + text(tick_label(tick), -8, y.down(tick, height) + 4, class_="tick end")
        for tick in y.ticks
    ]
    columns = [
        line(x.across(tick), height, x.across(tick), height + 4, class_="axis")
        + text(tick_label(tick), x.across(tick), height + 18, class_="tick mid")
        for tick in x.ticks
    ]
    base = line(0, height, "100%", height, class_="axis")
    return "".join([*rows, *columns, base, text(x_label, "50%", height + 36, class_="tick mid")])


def plot(height: float, *marks: str, label: str, kind: str = "framed") -> str:
    """Put marks into a plot; `label` says what it shows to those who do not see it."""
    return tag("svg", *marks, class_=f"plot {kind}", height=height, role="img", aria_label=label)


def stretched(height: float, *paths: str) -> str:
    """Put paths, across in thousandths of the width, into a plot."""
    return tag(
        "svg", *paths, viewBox=f"0 0 1000 {height:g}", preserveAspectRatio="none", width="100%", height=height,
        class_="stretched",
    )  # fmt: skip


def path(points: Sequence[tuple[float, float]], x: Axis, y: Axis, height: float, **attributes: object) -> str:
    """Draw a line through points, for `stretched`."""
    places = [f"{1000 * x.at(a):.1f} {y.down(b, height):g}" for a, b in points]
    return tag("path", d="M" + "L".join(places), **attributes)


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return means of as many neighbours as leave few enough points for a curve; the last one stays where it is."""
    size = math.ceil(len(points) / _MOST_POINTS)
    if size < 2:
        return points
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(sum(a for a, _ in group) / len(group), sum(b for _, b in group) / len(group)) for group in groups]
    return [*means, points[-1]]


def spread_out(places: Sequence[float], distance: float) -> list[float]:
    """Move places apart, as little as needed for each to be `distance` after the one before, in their order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + distance)
    if order:
        excess = (moved[order[-1]] - places[order[-1]]) / 2
        moved = [place - excess for place in moved]
    return moved
