"""Shapley values and utilization rates against the definitions, summed by hand and by brute force."""

import math
from itertools import combinations

import numpy as np
import pytest

from mowe_ray.evaluation.metrics.metric import Metric, mean_percent
from mowe_ray.evaluation.shapley import joining_orders, shapley_values, subsets_of, utilization

MEAN = Metric("mean", "mean", "higher", lambda answers: np.zeros((0, 2)), mean_percent)


def statistics(orders: list[tuple[int, ...]], samples: int = 30) -> dict[frozenset[int], np.ndarray]:
    rng = np.random.default_rng(1)
    return {subset: np.stack([rng.random(samples), np.ones(samples)], 1) for subset in subsets_of(orders)}


@pytest.mark.parametrize("members", [1, 3, 5])
def test_values_are_those_of_the_formula_over_subsets(members: int) -> None:
    orders = joining_orders(members)
    made = statistics(orders)
    worth = {subset: float(MEAN.value(rows.sum(0))) for subset, rows in made.items()}
    expected = []
    for member in range(members):
        others = [m for m in range(members) if m != member]
        terms = [
            math.factorial(size) * math.factorial(members - size - 1) / math.factorial(members)
            * (worth[frozenset({*chosen, member})] - worth[frozenset(chosen)])
            for size in range(members)
            for chosen in combinations(others, size)
        ]  # fmt: skip
        expected.append(math.fsum(terms))
    found = shapley_values(MEAN, made, orders, seed=0, draws=50)
    assert [one.value for one in found] == pytest.approx(expected)
    assert sum(one.value for one in found) == pytest.approx(worth[frozenset(range(members))] - worth[frozenset()])
    assert all(one.low <= one.high for one in found)


def test_a_member_that_adds_the_same_everywhere_has_that_value_without_doubt() -> None:
    orders = joining_orders(3)
    base = np.random.default_rng(0).random(40)
    made = {s: np.stack([base + 0.1 * (1 in s) + 0.3 * (2 in s), np.ones(40)], 1) for s in subsets_of(orders)}
    first, second, third = shapley_values(MEAN, made, orders, seed=0, draws=20)
    assert (first.value, first.low, first.high) == pytest.approx((0, 0, 0), abs=1e-9)
    assert (second.low, second.high) == pytest.approx((10, 10))
    assert third.value == pytest.approx(30)


def test_large_pools_are_sampled_within_the_budget_and_without_bias() -> None:
    assert len(subsets_of(joining_orders(6))) == 64
    orders = joining_orders(9, seed=3)
    assert len(orders) >= 4
    assert len(subsets_of(orders)) <= 64
    assert all(order[::-1] in orders for order in orders)
    assert joining_orders(9, seed=3) == orders
    assert len(joining_orders(40)) == 2
    weights = np.arange(9) / 100  # members that do not depend on each other: every order says the same
    made = {s: np.array([[sum(weights[m] for m in s), 1.0]]) for s in subsets_of(orders)}
    assert [one.value for one in shapley_values(MEAN, made, orders, 0, 5)] == pytest.approx(list(100 * weights))


@pytest.mark.parametrize(
    ("without", "change", "better", "rate"),
    [(30.0, -30.0, "higher", 0.5), (66.0, 6.0, "higher", -0.1), (90.0, 40.0, "lower", 0.8), (120.0, 70.0, "lower", 1.0),
     (10.0, 10.0, "higher", None)],
)  # fmt: skip
def test_utilization_is_the_share_of_the_performance_that_is_lost(
    without: float, change: float, better: str, rate: float | None
) -> None:
    assert utilization(without, change, better) == (None if rate is None else pytest.approx(rate))
