"""Shapley values of pool members: what each adds to a score, averaged over the orders in which they may join.

Legend: M pool members, N samples, S statistics of each, D resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import numpy as np

from mowe_ray.evaluation.metrics.metric import Array, Metric
from mowe_ray.evaluation.results import Interval
from mowe_ray.evaluation.scoring import interval_of, resamples

Subset = frozenset[int]

_MOST_EXACT = 6  # members: 64 subsets, each of which answers all samples
_MOST_SUBSETS = 64


def joining_orders(members: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Return all orders of up to 6 members; of more, drawn ones, each with its reverse, that need 64 subsets at most.

    The mean over drawn orders is unbiased, and reverses lower its variance (Mitchell et al., JMLR 23(43), 2022).
    """
    if members <= _MOST_EXACT:
        return list(permutations(range(members)))
    random, orders, needed = np.random.default_rng(seed), list[tuple[int, ...]](), set[Subset]()
    while True:
        order = tuple(random.permutation(members).tolist())
        with_these = needed | set(subsets_of([order, order[::-1]]))
        if orders and len(with_these) > _MOST_SUBSETS:
            return orders
        orders, needed = [*orders, order, order[::-1]], with_these


def subsets_of(orders: Sequence[tuple[int, ...]]) -> list[Subset]:
    """Return the subsets of the pool that orders pass through, the smallest first."""
    found = {frozenset(order[:size]) for order in orders for size in range(len(order) + 1)}
    return sorted(found, key=lambda subset: (len(subset), sorted(subset)))


def shapley_values(
    metric: Metric, statistics: Mapping[Subset, Array], orders: Sequence[tuple[int, ...]], seed: int, draws: int = 1000
) -> list[Interval]:
    """Return how much of the metric each of the M members adds, with the interval over samples.

    Together they are the metric with the whole pool less that without any of it.

    Args:
        statistics: (N, S) of the same samples, in the same order, for each subset of members that may run.
        orders: What `joining_orders` returned for them.
        seed: Of the bootstrap, which resamples all subsets alike.
    """
    samples = len(next(iter(statistics.values())))
    weights = [np.ones((1, samples)), *resamples(samples, seed, draws)]
    values = {
        subset: np.concatenate([np.atleast_1d(metric.value(w @ rows)) for w in weights])
        for subset, rows in statistics.items()
    }
    added = np.zeros((len(orders[0]), 1 + draws))
    for order in orders:
        for place, member in enumerate(order):
            added[member] += values[frozenset(order[: place + 1])] - values[frozenset(order[:place])]
    return [interval_of(row[0], row[1:]) for row in added / len(orders)]


def utilization(without: float, change: float, better: str) -> float | None:
    """Return the conditional utilization rate of a member: the share of the performance that is lost without it.

    (P(all) - P(all but it)) / P(all), as arXiv 2507.03262 defines it for accuracies; of a metric for which lower is
    better P is 100 less it. The gap between the largest and the smallest rate of a pool is its information gap.

    Args:
        without: The metric without the member.
        change: That less the metric with all members.

    Returns:
        None where all members together perform no better than 0.
    """
    performance, whole = (value if better == "higher" else 100 - value for value in (without, without - change))
    return (whole - max(0.0, performance)) / whole if whole > 0 else None
