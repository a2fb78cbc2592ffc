"""How far the ranking of a one-shot search can be trusted: how well it agrees with pools that were trained alone.

Legend: N pools that were trained alone, D resamples of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from mowe_ray.evaluation.results import Interval
from mowe_ray.sweeping.analysis.points import Point, number, points
from mowe_ray.sweeping.one_shot import Pool, Supernet, one_shot_score, ranking
from mowe_ray.sweeping.schema import POOL_KEY
from mowe_ray.sweeping.search_space import SearchSpace
from mowe_ray.sweeping.trials import Trial, pool_label

# Four pools fall into any given order by chance once in 24 times, so no agreement of theirs is significant.
FEWEST_POOLS = 5
_DRAWS = 2000


@dataclass(frozen=True)
class RankedPool:
    """A pool in the one-shot ranking.

    Attributes:
        score: Mean over supernets; `by_supernet` has each.
        alone: Mean over the seeds of its own trainings; None without any.
        error: Standard error of that, if known.
    """

    pool: list[str]
    score: float
    by_supernet: list[float]
    alone: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The ranking of a one-shot search, and its agreement with pools trained alone: Kendall's tau-b, up to 1.

    Attributes:
        pools: Best first.
        tau: With its 95 % bootstrap interval over pools; None with fewer than two pools, or equal scores.
        ceiling: Agreement of two seeds of the pools trained alone, mean over pairs; None with one seed.
        between_supernets: Agreement of two supernets on all pools, mean over pairs; None with one.
        baselines: Agreement of rankings that need no supernet, or no more than single encoders of it, by name.
        shapley: Of each encoder and task, mean over supernets, in points of the task's metric.
    """

    pools: list[RankedPool]
    tau: Interval | None
    ceiling: float | None
    between_supernets: float | None
    baselines: dict[str, Interval]
    shapley: dict[str, dict[str, float]]

    @property
    def calibrated(self) -> list[RankedPool]:
        """The pools that were trained alone."""
        return [pool for pool in self.pools if pool.alone is not None]

    @property
    def doubts(self) -> str | None:
        """Why the ranking is not to be trusted; None if it is."""
        count = len(self.calibrated)
        if count < FEWEST_POOLS:
            return f"only {count} pools were trained alone, and fewer than {FEWEST_POOLS} can agree by chance"
        if self.tau is None:
            return "all pools that were trained alone have the same score"
        if self.tau.high < 0:
            return "pools trained alone come in the opposite order"
        return None if self.tau.low > 0 else "the interval of its agreement with pools trained alone includes 0"


def calibration(
    space: SearchSpace,
    trials: Sequence[Trial],
    supernets: Sequence[Supernet],
    logme: Mapping[Pool, float] | None = None,
) -> Calibration | None:
    """Return how the one-shot ranking agrees with the trials; None before there is one.

    Args:
        logme: Of the pools, as a baseline.
    """
    if not supernets:
        return None
    metric = space.sweep.objective.metric
    measured = [point for point in points(space.sweep, trials) if point.complete and point.mean is not None]
    alone = {frozenset(point.values[POOL_KEY]): point for point in measured}
    pools = []
    for pool, score in ranking(space, supernets):
        by_supernet = [supernet.score(pool, metric) or 0.0 for supernet in supernets]
        own = alone.get(frozenset(pool))
        mean, error = (own.mean, own.error) if own else (None, None)
        pools.append(RankedPool(pool, score, by_supernet, mean, error))
    known = [pool for pool in pools if pool.alone is not None]
    scores = [pool.score for pool in known]
    means = [pool.alone for pool in known if pool.alone is not None]
    trained = [alone[frozenset(pool.pool)] for pool in known]
    return Calibration(
        pools,
        tau_interval(scores, means),
        _between([point.objectives for point in trained]),
        _between([pool.by_supernet for pool in pools]),
        _baselines(known, trained, means, supernets, metric) | _logme_baseline(known, means, logme or {}),
        _shapley(supernets),
    )


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Kendall's tau-b of two rankings of the same N things; None where one of them has only ties."""
    return _taus(np.ones((1, len(a))), a, b)[0] if len(a) > 1 else None


def tau_interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Interval | None:
    """Return Kendall's tau-b with its 95 % percentile interval over resamples of the N things."""
    value = kendall_tau(a, b)
    if value is None:
        return None
    n = len(a)
    drawn = _taus(np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _DRAWS), a, b)
    low, high = np.percentile([tau for tau in drawn if tau is not None], (2.5, 97.5))
    return Interval(value, float(low), float(high))


def _taus(weights: np.ndarray, a: Sequence[float], b: Sequence[float]) -> list[float | None]:
    """Return tau-b of each resample, in which things stand as often as `weights` (D, N) says.

    A thing and its copy are tied in both rankings: such pairs count nowhere, like those on the diagonal here.
    """
    x, y = (np.sign(np.subtract.outer(scores, scores)) for scores in (a, b))
    agreeing, x_untied, y_untied = (
        np.einsum("di,ij,dj->d", weights, pairs, weights) for pairs in (x * y, np.abs(x), np.abs(y))
    )
    scale = np.sqrt(x_untied * y_untied)
    return [float(s / of) if of else None for s, of in zip(agreeing, scale, strict=True)]


def random_interval(b: Sequence[float], seed: int = 0) -> Interval:
    """Return what rankings in random order reach: their mean agreement with `b`, and where 95 % of them lie."""
    generator = np.random.default_rng(seed)
    orders = [list(generator.permutation(len(b)).astype(float)) for _ in range(_DRAWS // 4)]
    taus = [kendall_tau(order, b) or 0.0 for order in orders]
    low, high = np.percentile(taus, (2.5, 97.5))
    return Interval(0.0, float(low), float(high))


def _between(scores: Sequence[Sequence[float]]) -> float | None:
    """Return the mean agreement of two columns of (N, seeds)."""
    taus = [kendall_tau(a, b) for a, b in combinations(list(zip(*scores, strict=True)), 2)]
    known = [tau for tau in taus if tau is not None]
    return fmean(known) if known else None


def _baselines(
    known: Sequence[RankedPool],
    trained: Sequence[Point],
    means: Sequence[float],
    supernets: Sequence[Supernet],
    metric: str,
) -> dict[str, Interval]:
    if len(known) < 2:
        return {}
    singles = [[one_shot_score(supernets, [name], metric) for name in pool.pool] for pool in known]
    sums = [sum(score for score in scores if score is not None) for scores in singles]
    all_scored = all(score is not None for scores in singles for score in scores)
    found = {
        "a random order": random_interval(means),
        "the sum of the single encoders' scores": tau_interval(sums, means) if all_scored else None,
        "the number of parameters": tau_interval([point.cost.stored for point in trained if point.cost], means)
        if all(point.cost for point in trained)
        else None,
    }
    return {name: interval for name, interval in found.items() if interval is not None}


def _logme_baseline(
    known: Sequence[RankedPool], means: Sequence[float], logme: Mapping[Pool, float]
) -> dict[str, Interval]:
    found = [logme.get(frozenset(pool.pool)) for pool in known]
    values = [value for value in found if value is not None]
    interval = tau_interval(values, means) if len(values) == len(known) > 1 else None
    return {"LogME of the untrained encoders": interval} if interval else {}


def _shapley(supernets: Sequence[Supernet]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, list[float]]] = {}
    for row in (row for supernet in supernets for row in supernet.shapley):
        found.setdefault(row["member"], {}).setdefault(_task(row), []).append(row["value"]["value"])
    return {member: {task: fmean(values) for task, values in tasks.items()} for member, tasks in found.items()}


def _task(row: Mapping[str, Any]) -> str:
    return f"{row['task']} ({row['metric']}, {row['dataset']})"


def sentences(found: Calibration) -> Iterator[str]:
    """Describe the ranking and whether to trust it; the most important sentence comes first."""
    if not found.pools:
        yield "One-shot search has ranked no pool: those of the space were not among the ones scored."
        return
    best, doubts = found.pools[0], found.doubts
    seeds = f"mean over {len(best.by_supernet)} supernets" if len(best.by_supernet) > 1 else "one supernet"
    if doubts:
        yield f"The one-shot ranking is not to be trusted: {doubts}."
    name, count = pool_label(best.pool), len(found.pools)
    yield f"One-shot search ranks {name} first of {count} pools ({number(best.score)}, {seeds})."
    if found.tau is not None:
        yield (
            f"Over {len(found.calibrated)} pools that were also trained alone, it agrees with them by Kendall's tau "
            f"{in_words(found.tau)}; {_ceiling(found)}."
        )
    if found.baselines:
        others = ", ".join(f"{name} {number(interval.value)}" for name, interval in found.baselines.items())
        yield f"Without it, agreement would be: {others}."


def _ceiling(found: Calibration) -> str:
    if found.ceiling is None:
        return "how far two seeds of them agree, the most to be expected, takes a second one of seeds"
    return f"two seeds of them agree by {number(found.ceiling)}, and no more is to be expected"


def in_words(interval: Interval) -> str:
    """Write a tau with its interval."""
    return f"{number(interval.value)} (95 % interval {number(interval.low)} to {number(interval.high)})"
