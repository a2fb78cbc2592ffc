"""Charts that are rows: a bar of parts, or a dot with its interval, each beside its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mowe_ray.output.svg import Axis, escape, line, plot, tag, text, tick_label

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
    """Draw parts side by side over the whole width; `label` says what they are parts of."""
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
    said = [text(left, 0, 30, class_="tick"), text(right, "100%", 30, class_="tick end")] if left or right else []
    height = 36 if said else 20
    foot = [tag("span"), tag("svg", *ticks, *said, class_="plot row", height=height, aria_hidden="true"), tag("span")]
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


MOST_COLOURS = 7
PLAIN = "var(--muted)"


def colour(i: int) -> str:
    """Return the i-th of the colours that all readers can tell apart; grey after the last."""
    return f"var(--c{i})" if i < MOST_COLOURS else PLAIN


def shade(share: float) -> str:
    """Return a colour between the pale and the strong end of a scale, for a share of 0 to 1."""
    return f"color-mix(in oklab, var(--strong) {100 * share:.0f}%, var(--pale))"


def chips(labels: Iterable[tuple[str, str]], kind: str = "chips") -> str:
    """Write a legend of (colour, label)."""
    marks = [tag("span", tag("i", style=f"background:{c}"), escape(label)) for c, label in labels]
    return tag("p", *marks, class_=kind) if marks else ""
