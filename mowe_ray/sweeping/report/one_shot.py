"""One-shot search in a study's report: the ranking, the pools trained alone beside it, and how well the two agree."""

from __future__ import annotations

from mowe_ray.output.charts import Axis, IntervalRow, colour, escape, frame, interval_rows, line, plot, tag
from mowe_ray.output.html_page import section
from mowe_ray.sweeping.analysis.calibration import Calibration, RankedPool
from mowe_ray.sweeping.analysis.points import number, plus_minus
from mowe_ray.sweeping.trials import pool_label

_HEIGHT = 300
_MOST_ROWS = 64


def one_shot_sections(found: Calibration | None, metric: str) -> list[str]:
    """Return the sections of a one-shot search; none before there is a ranking.

    Args:
        metric: The objective in words.
    """
    if found is None or not found.pools:
        return []
    return [
        section(
            "One-shot ranking",
            _ranking(found),
            f"{escape(metric.capitalize())} of each pool with the weights of the supernets: the dot is their mean, the "
            "bar spans them. A faint dot is the pool trained alone, where it was.",
        ),
        section(
            "Can the ranking be trusted?",
            _against_alone(found, metric) + _agreement(found),
            "A dot is a pool that was also trained alone, with its standard error: were the ranking perfect, they "
            "would rise from left to right. Kendall's tau is 1 for equal orders, 0 for unrelated ones, with a "
            "bootstrap interval over pools.",
        ),
        section(
            "What each encoder adds",
            _shapley(found),
            "Shapley values, mean over supernets: what an encoder adds to the metric, averaged over the orders in "
            "which encoders may join.",
        ),
    ]


def _ranking(found: Calibration) -> str:
    shown = found.pools[:_MOST_ROWS]
    alone = [one.alone for one in shown if one.alone is not None]
    axis = Axis.over([*(score for one in shown for score in one.by_supernet), *alone])
    return interval_rows([_row(one, i == 0) for i, one in enumerate(shown)], axis)


def _row(one: RankedPool, first: bool) -> IntervalRow:
    alone = "" if one.alone is None else f"alone {plus_minus(one.alone, one.error)}"
    return IntervalRow(
        name=pool_label(one.pool),
        value=one.score,
        low=min(one.by_supernet),
        high=max(one.by_supernet),
        written=number(one.score),
        more=alone,
        tip=f"{pool_label(one.pool)}\none-shot {number(one.score)}\n{alone or 'not trained alone'}",
        colour=colour(0),
        strong=first,
        faint=() if one.alone is None else ((one.alone, alone),),
    )


def _against_alone(found: Calibration, metric: str) -> str:
    shown = [(one, one.alone) for one in found.calibrated if one.alone is not None]
    if not shown:
        return ""
    x = Axis.over(one.score for one, _ in shown)
    y = Axis.over(alone + sign * (one.error or 0) for one, alone in shown for sign in (-1, 1))
    marks = []
    for one, alone in shown:
        at, top, bottom = x.across(one.score), *(y.down(alone + sign * (one.error or 0), _HEIGHT) for sign in (1, -1))
        dot = tag("circle", cx=at, cy=y.down(alone, _HEIGHT), r=5, class_="dot")
        tip = f"{pool_label(one.pool)}\none-shot {number(one.score)}\nalone {plus_minus(alone, one.error)}"
        bar = line(at, top, at, bottom, class_="error") if one.error else ""
        marks.append(tag("g", bar, dot, style=f"--k:{colour(0)}", data_tip=tip))
    across = f"one-shot {metric} (up: trained alone)"
    label = f"{metric} trained alone against one-shot {metric}"
    return plot(_HEIGHT, frame(x, y, _HEIGHT, across), *marks, label=label)


def _agreement(found: Calibration) -> str:
    intervals = {"the one-shot ranking": found.tau, **found.baselines}
    rows = [
        [name, number(one.value), f"{number(one.low)} to {number(one.high)}"] for name, one in intervals.items() if one
    ]
    rows += [
        [name, number(value), ""]
        for name, value in (
            ("another seed of the pools trained alone: the most to be expected", found.ceiling),
            ("another supernet, over all pools", found.between_supernets),
        )
        if value is not None
    ]
    return _table(["agreement of pools trained alone with", "Kendall's tau", "95 % interval"], rows) if rows else ""


def _shapley(found: Calibration) -> str:
    tasks = sorted({task for values in found.shapley.values() for task in values})
    rows = [
        [member, *(f"{values[task]:+.1f}" if task in values else "" for task in tasks)]
        for member, values in found.shapley.items()
    ]
    return _table(["encoder", *tasks], rows) if tasks else ""


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = tag("tr", *(tag("th", escape(name), class_="n" if i else None) for i, name in enumerate(heads)))
    body = [[tag("td", escape(cell), class_="n" if i else None) for i, cell in enumerate(row)] for row in rows]
    lines = [tag("tr", *cells) for cells in body]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *lines)), class_="wide")
