"""Charts as SVG: markup, axes with round ticks, plots as wide as the page, and rows of bars or intervals.

A plot is an SVG without a view box. Across, everything is in percent of its width, down in pixels, so text and dots
keep their size on any screen; only paths are stretched, with strokes that are not.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

MOST_POINTS = 200


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
        # Equal values get a range around them.
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
        if log and (decades := _decades(low, high)):
            return cls(low, high, decades, True)
        step = _round_step((high - low) / (count + 1))
        first, last = math.ceil(low / step), math.floor(high / step)
        # Rounded, or 3 * 0.1 would be labelled 0.30000000000000004.
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
    # Too many for the labels: powers of ten alone.
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
    """Put marks into a plot; `label` describes it for screen readers."""
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


def thinned(points: list[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return means of as many neighbours as leave few enough points for a curve; the last one stays where it is."""
    size = math.ceil(len(points) / most)
    if size < 2:
        return points
    # Means rather than every n-th point, which would keep or lose a spike by chance.
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(sum(a for a, _ in group) / len(group), sum(b for _, b in group) / len(group)) for group in groups]
    return [*means, points[-1]]


@dataclass(frozen=True)
class Series:
    """A number over another, in the order of that."""

    name: str
    points: list[tuple[float, float]]
    colour: str
    dashed: bool = False


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str = "step", y: Axis | None = None, height: float = 170
) -> str:
    """Draw lines over one pair of axes; the page's script tells their values where the pointer is.

    Args:
        y: Axis of the values; None takes what holds them all.
    """
    shown = [replace(one, points=thinned(one.points)) for one in series if one.points]
    if not shown:
        return ""
    x = Axis.over([0.0, *(at for one in shown for at, _ in one.points)], count=4)
    y = y or Axis.over((value for one in shown for _, value in one.points), count=4)
    lines = [
        # A path of one point draws nothing; from a point to itself it draws a dot.
        path(one.points if len(one.points) > 1 else one.points * 2, x, y, height,
             class_="front" if one.dashed else "course", style=f"--k:{one.colour}")
        for one in shown
    ]  # fmt: skip
    # Where a line ends, and all there is to see of one that has a single point.
    ends = [
        tag("circle", cx=x.across(at), cy=y.down(value, height), r=3, class_="dot", style=f"--k:{one.colour}")
        for one in shown
        if not one.dashed
        for at, value in one.points[-1:]
    ]
    curves = [[one.name, [[round(at, 1), float(f"{value:.4g}")] for at, value in one.points]] for one in shown]
    return tag(
        "svg",
        frame(x, y, height, x_label),
        stretched(height, *lines),
        *ends,
        class_="plot framed",
        height=height,
        role="img",
        aria_label=f"{title}, over {x_label}",
        data_curves=json.dumps([x_label, x.low, x.high, curves], separators=(",", ":")),
    )


def spread_out(places: Sequence[float], distance: float) -> list[float]:
    """Move places apart, as little as needed for each to be `distance` after the one before, in their order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + distance)
    if order:
        # The loop has moved places only down: half of it is given back, so that labels lie around their points.
        excess = (moved[order[-1]] - places[order[-1]]) / 2
        moved = [place - excess for place in moved]
    return moved


_BAR = 18
_ROW = 26


@dataclass(frozen=True)
class BarSegment:
    """A part of a bar: `size` against those of the other parts."""

    name: str
    size: float
    colour: str
    tip: str


def stacked_bar(parts: Sequence[BarSegment], label: str) -> str:
    """Draw parts side by side over the full width; `label` describes it for screen readers."""
    total = sum(part.size for part in parts)
    drawn, before = [], 0.0
    for part in parts:
        width = 100 * part.size / total
        drawn.append(
            tag(
                "svg",
                tag("rect", width="100%", height=_BAR, style=f"fill:{part.colour}", class_="segment"),
                text(part.name, 5, 13, class_="inside") if width > 12 else "",
                x=f"{before:.2f}%",
                width=f"{width:.2f}%",
                height=_BAR,
                data_tip=part.tip,
            )
        )
        before += width
    return plot(_BAR, *drawn, label=label, kind="bar")


@dataclass(frozen=True)
class IntervalRow:
    """A number with its interval.

    Attributes:
        written: The number as text, at the end of the row; `more` follows where there is room.
        strong: Whether its name stands out.
        hollow: Whether its dot is.
        faint: Single numbers behind it, with a tip each.
        group: A heading above all neighbours that have the same.
    """

    name: str
    value: float
    low: float
    high: float
    written: str
    tip: str
    colour: str
    more: str = ""
    strong: bool = False
    hollow: bool = False
    faint: Sequence[tuple[float, str]] = ()
    group: str = ""


def interval_rows(rows: Sequence[IntervalRow], axis: Axis, zero: bool = False, ends: tuple[str, str] = ("", "")) -> str:
    """Draw rows over one axis.

    Args:
        zero: Whether to mark where 0 is.
        ends: What the left and the right end of the axis mean.
    """
    drawn: list[str] = []
    for before, row in zip([None, *rows], rows, strict=False):
        if row.group and (before is None or before.group != row.group):
            drawn.append(tag("span", escape(row.group), class_="group"))
        drawn += _interval_row(row, axis, zero)
    ticks = [text(tick_label(tick), axis.across(tick), 14, class_="tick mid") for tick in axis.ticks]
    left, right = ends
    labels = [text(left, 0, 30, class_="tick"), text(right, "100%", 30, class_="tick end")] if left or right else []
    height = 36 if labels else 20
    foot = [tag("span"), tag("svg", *ticks, *labels, class_="plot row", height=height, aria_hidden="true"), tag("span")]
    return tag("div", *drawn, *foot, class_="rows long" if any(row.more for row in rows) else "rows")


def _interval_row(row: IntervalRow, axis: Axis, zero: bool) -> list[str]:
    middle = _ROW / 2
    grid = [line(axis.across(tick), 0, axis.across(tick), _ROW, class_="grid") for tick in axis.ticks]
    base = [line(axis.across(0), 0, axis.across(0), _ROW, class_="axis")] if zero else []
    faint = [
        tag("circle", cx=axis.across(value), cy=middle, r=3, class_="faint", data_tip=tip) for value, tip in row.faint
    ]
    mark = tag(
        "g",
        line(axis.across(row.low), middle, axis.across(row.high), middle, class_="interval"),
        tag("circle", cx=axis.across(row.value), cy=middle, r=5, class_="dot open" if row.hollow else "dot"),
        style=f"--k:{row.colour}",
        data_tip=row.tip,
    )
    return [
        tag("span", escape(row.name), class_="name best" if row.strong else "name", title=row.name),
        plot(_ROW, *grid, *base, *faint, mark, label=row.tip, kind="row"),
        tag("span", escape(row.written), tag("small", escape(f" {row.more}")) if row.more else "", class_="value"),
    ]


# Those of Okabe and Ito, which people with any colour vision tell apart.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#a89b00")
MOST_COLOURS = len(PALETTE)
PLAIN = "var(--muted)"


def colour(i: int) -> str:
    """Return the i-th colour of a palette for all kinds of colour vision; grey after the last."""
    return f"var(--c{i})" if i < MOST_COLOURS else PLAIN


def shade(share: float) -> str:
    """Return a colour between the pale and the strong end of a scale, for a share of 0 to 1."""
    return f"color-mix(in oklab, var(--strong) {100 * share:.0f}%, var(--pale))"


def chips(labels: Iterable[tuple[str, str]], kind: str = "chips") -> str:
    """Write a legend of (colour, label)."""
    marks = [tag("span", tag("i", style=f"background:{c}"), escape(label)) for c, label in labels]
    return tag("p", *marks, class_=kind) if marks else ""
