"""Charts of what each factor does: a dot and an interval per value, or a scatter with its trend."""

from __future__ import annotations

from collections.abc import Sequence

from mowe_ray.output.rows import IntervalRow, interval_rows
from mowe_ray.output.svg import Axis, escape, frame, path, plot, stretched, tag
from mowe_ray.sweeping.effects import Effect, Level, gap
from mowe_ray.sweeping.labels import entry_label, number, plus_minus, point_label
from mowe_ray.sweeping.statistics import Point, is_clear

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
    said = "A clear trend" if trend.clear else "No clear trend"
    thirds = "; ".join(f"{level.label}: {number(level.mean)}" for level in effect.levels)
    caption = (
        f"{said}: rank correlation {trend.correlation:+.2f} over {trend.points} points. Means of thirds: {thirds}."
    )
    chart = plot(_SCATTER, frame(x, y, _SCATTER, factor.name), drawn, *marks, label=f"{metric} over {factor.name}")
    return chart + tag("p", escape(caption), class_="note")
