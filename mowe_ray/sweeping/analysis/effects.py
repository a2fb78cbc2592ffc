"""Main effects of a study: how each factor changes the objective, averaged over the others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mowe_ray.sweeping.analysis.points import Point, is_clear, joint_error, points
from mowe_ray.sweeping.schema import POOL_KEY, IntRange, LogUniform, SweepConfig, Uniform
from mowe_ray.sweeping.trials import Trial, entry_label, entry_name

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Factor:
    """A factor of the experiment: something that differs between points.

    Attributes:
        entry: The key of the space it comes from.
        of: Its value at a point.
        rest: What must be equal for two points to be compared pairwise; None where they never are.
        kind: `values`, `range` of numbers, `encoder` (with and without it), or `pool` (its size, its kind).
    """

    name: str
    entry: str
    of: Callable[[Values], Any]
    rest: Callable[[Values], Any] | None
    kind: str
    log: bool = False


@dataclass(frozen=True)
class Level:
    """One value of a factor: the mean over the points that have it, with its standard error."""

    label: str
    value: Any
    mean: float
    error: float | None
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Trend:
    """How the objective goes with a number.

    Attributes:
        correlation: Spearman's, of the ranks.
        slope, intercept: Of the least-squares line, over log10 of the number where it is drawn that way.
    """

    correlation: float
    slope: float
    intercept: float
    points: int

    @property
    def clear(self) -> bool:
        """Whether so much correlation is unlikely without any relation; its standard error is 1/sqrt(n - 1) then."""
        return is_clear(self.correlation, 1 / math.sqrt(self.points - 1))


@dataclass(frozen=True)
class Effect:
    """The effect of a factor.

    Attributes:
        levels: Its values; thirds of a range.
        paired: Whether levels are compared over equal settings of everything else.
        importance: Share of the variance between points that the levels explain (eta squared).
        chance: The share that as many levels of a factor without any effect would explain.
        trend: For ranges.
    """

    factor: Factor
    levels: tuple[Level, ...]
    paired: bool
    importance: float
    chance: float
    trend: Trend | None = None

    @property
    def weight(self) -> float:
        """Importance beyond chance, by which factors are ordered."""
        return (self.importance - self.chance) / (1 - self.chance) if self.chance < 1 else 0.0


def gap(a: Level, b: Level) -> tuple[float, float | None]:
    """Return mean of `a` minus mean of `b`, and its standard error."""
    return a.mean - b.mean, joint_error(a.error, b.error)


def effects(config: SweepConfig, trials: Sequence[Trial], metric: str | None = None) -> list[Effect]:
    """Return the effects of all factors with at least two values, the most important first."""
    usable = [point for point in points(config, trials, metric) if point.mean is not None]
    result = [effect for factor in factors(config, usable) if (effect := _effect(factor, usable)) is not None]
    return sorted(result, key=lambda effect: -effect.weight)


def factors(config: SweepConfig, usable: Sequence[Point]) -> list[Factor]:
    """Return the entries of the space, and of pools: presence of each encoder, size, and kind."""
    result = [_entry(config, name) for name in config.space]
    if POOL_KEY in config.space:
        names = {name: None for point in usable for name in point.values.get(POOL_KEY, [])}
        result += [_presence(name) for name in names]
        result.append(Factor("pool size", POOL_KEY, lambda v: len(v[POOL_KEY]), None, "pool"))
        result.append(Factor("kind of pool", POOL_KEY, lambda v: pool_kind(v[POOL_KEY]), None, "pool"))
    return result


def pool_kind(names: Sequence[str]) -> str:
    """Return `none`, `single`, `uniform` (one encoder repeated) or `diverse`."""
    if len(names) < 2:
        return "single" if names else "none"
    return "uniform" if len(set(names)) == 1 else "diverse"


def _without(values: Values, name: str) -> Values:
    return {key: value for key, value in values.items() if key != name}


def _entry(config: SweepConfig, name: str) -> Factor:
    entry = config.space[name]
    kind = "range" if isinstance(entry, Uniform | LogUniform | IntRange) else "values"
    log = isinstance(entry, LogUniform)
    return Factor(entry_name(name), name, lambda values: values[name], lambda v: _without(v, name), kind, log)


def _presence(name: str) -> Factor:
    return Factor(
        name,
        POOL_KEY,
        lambda values: f"with {name}" if name in values[POOL_KEY] else f"without {name}",
        lambda values: {**values, POOL_KEY: sorted(other for other in values[POOL_KEY] if other != name)},
        "encoder",
    )


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _effect(factor: Factor, usable: Sequence[Point]) -> Effect | None:
    having = [point for point in usable if factor.entry in point.values]
    values = {_key(value): value for point in having for value in [factor.of(point.values)]}
    if len(values) < 2:
        return None
    if factor.kind == "range":
        return _range_effect(factor, having)
    groups = {key: [p for p in having if _key(factor.of(p.values)) == key] for key in _in_order(values)}
    importance, chance = explained(list(groups.values()))
    paired = _paired(factor, groups)
    levels = paired or _unpaired({key: (entry_label(values[key]), values[key]) for key in groups}, groups)
    named = [replace(level, label=entry_label(values[key]), value=values[key])
             for key, level in zip(groups, levels, strict=True)]  # fmt: skip
    return Effect(factor, tuple(named), paired is not None, importance, chance)


def _in_order(values: dict[str, Any]) -> list[str]:
    """Numbers by size, everything else as it came."""
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values.values())
    return sorted(values, key=lambda key: values[key]) if numeric else list(values)


def explained(groups: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """Return eta squared, the share of the variance of the points' means that lies between groups, and chance's."""
    means = [np.array([point.mean for point in group], dtype=float) for group in groups]
    everything = np.concatenate(means)
    total = float(((everything - everything.mean()) ** 2).sum())
    between = float(sum(len(m) * (m.mean() - everything.mean()) ** 2 for m in means))
    return (between / total if total > 0 else 0.0), (len(groups) - 1) / (len(everything) - 1)


def _mean(group: Sequence[Point]) -> float:
    return float(np.array([point.mean for point in group], dtype=float).mean())


def _propagated(group: Sequence[Point]) -> float | None:
    errors = [point.error for point in group]
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(e * e for e in known)) / len(known) if len(known) == len(errors) else None


def _larger(*errors: float | None) -> float | None:
    return max((error for error in errors if error is not None), default=None)


def _unpaired(labels: Mapping[str, tuple[str, Any]], groups: Mapping[str, Sequence[Point]]) -> list[Level]:
    """Means of groups; the error is the spread within groups, pooled, but no less than that of the points."""
    means = {key: np.array([p.mean for p in group], dtype=float) for key, group in groups.items()}
    freedom = sum(map(len, means.values())) - len(means)
    squares = sum(float(((m - m.mean()) ** 2).sum()) for m in means.values())
    spread = math.sqrt(squares / freedom) if freedom else None
    return [
        Level(
            *labels[key],
            float(means[key].mean()),
            _larger(None if spread is None else spread / math.sqrt(len(group)), _propagated(group)),
            tuple(group),
        )
        for key, group in groups.items()
    ]


def _paired(factor: Factor, groups: Mapping[str, Sequence[Point]]) -> list[Level] | None:
    """Means over the settings of everything else that every value was tried with; None if that is not half of them.

    What these settings do themselves cancels out. The error is the residual of value + setting, but no less than
    that of the points.
    """
    if factor.rest is None:
        return None
    cells: dict[str, dict[str, list[Point]]] = {}
    for key, group in groups.items():
        for point in group:
            cells.setdefault(_key(factor.rest(point.values)), {}).setdefault(key, []).append(point)
    blocks = [cell for cell in cells.values() if len(cell) == len(groups)]
    used = sum(len(group) for block in blocks for group in block.values())
    # Of less than half of the points, a paired mean would speak for a corner of the space.
    if len(blocks) < 2 or 2 * used < sum(map(len, groups.values())):
        return None
    table = np.array([[_mean(block[key]) for key in groups] for block in blocks])
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    # Two-way layout without replication: blocks and groups have taken their degrees of freedom.
    spread = math.sqrt(float((residual**2).sum()) / ((len(blocks) - 1) * (len(groups) - 1)))
    members = {key: tuple(point for block in blocks for point in block[key]) for key in groups}
    return [
        Level("", None, float(table[:, i].mean()), _larger(spread / math.sqrt(len(blocks)), _propagated(members[key])),
              members[key])
        for i, key in enumerate(groups)
    ]  # fmt: skip


def _range_effect(factor: Factor, having: Sequence[Point]) -> Effect:
    ordered = sorted(having, key=lambda point: factor.of(point.values))
    thirds = [list(part) for part in np.array_split(np.array(ordered, dtype=object), min(3, len(ordered)))]
    groups = {str(i): part for i, part in enumerate(thirds)}
    importance, chance = explained(thirds)
    labels = {key: (f"{entry_label(factor.of(part[0].values))} to {entry_label(factor.of(part[-1].values))}", None)
              for key, part in groups.items()}  # fmt: skip
    return Effect(factor, tuple(_unpaired(labels, groups)), False, importance, chance, _trend(factor, ordered))


def _trend(factor: Factor, having: Sequence[Point]) -> Trend:
    numbers = np.array([factor.of(point.values) for point in having], dtype=float)
    means = np.array([point.mean for point in having], dtype=float)
    x = np.log10(numbers) if factor.log else numbers
    slope = float(((x - x.mean()) * (means - means.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return Trend(spearman(numbers, means), slope, float(means.mean() - slope * x.mean()), len(having))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation of two (N,) arrays, ties sharing their mean rank; 0 if one is constant."""
    # Mean rank of equal values; quadratic, but a study has at most hundreds of points.
    ranks = [np.array([(x < y).sum() + ((x == y).sum() - 1) / 2 for y in x]) for x in (a, b)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale else 0.0


def distinct(found: Sequence[Effect]) -> Iterator[Effect]:
    """Leave out effects whose levels divide the points as those of an earlier one do."""
    seen = set()
    for effect in found:
        division = frozenset(frozenset(point.number for point in level.points) for level in effect.levels)
        if effect.trend or division not in seen:
            seen.add(division)
            yield effect
