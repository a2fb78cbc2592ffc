"""Points, their uncertainty, the winner and the front, each against an independent computation."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mowe_ray.sweeping.analysis.points import (
    advantage,
    best,
    by_status,
    is_clear,
    pareto_front,
    points,
    pooled_spread,
    ranked,
    sampling_error,
)
from mowe_ray.sweeping.schema import POOL_KEY, SweepConfig
from mowe_ray.sweeping.trials import ModelCost, Trial
from tests.made_study import failed, grid, stopped, sweep, trial, trials

TOP_K = {"model.router.top_k": {"grid": [1, 2, 3]}}
DESIGN = grid(model__router__top_k=[1, 2, 3])


def top_k_study(scores: list[list[float]]) -> tuple[SweepConfig, list[Trial]]:
    """A study of top-k with the scores of each point's seeds."""
    config = sweep(TOP_K, seeds=list(range(len(scores[0]))))
    made = [
        trial(len(row) * i + j, i, j, DESIGN[i], score) for i, row in enumerate(scores) for j, score in enumerate(row)
    ]
    return config, made


def test_mean_spread_and_error_over_seeds() -> None:
    scores = np.random.default_rng(0).uniform(0.4, 0.8, (3, 4))
    config, made = top_k_study(scores.tolist())
    pooled = math.sqrt(np.mean(np.var(scores, axis=1, ddof=1)))  # equally many seeds: the mean of the variances
    for point, row in zip(points(config, made), scores, strict=True):
        assert point.mean == pytest.approx(np.mean(row))
        assert point.spread == pytest.approx(np.std(row, ddof=1))
        assert point.error == pytest.approx(pooled / 2)
        assert point.error_from == "seeds"
        assert point.complete


def test_error_over_seeds_is_the_scatter_of_repeated_studies() -> None:
    draws = np.random.default_rng(1).normal(0.6, 0.05, (400, 3, 2))
    errors, means = [], []
    for scores in draws:
        config, made = top_k_study(scores.tolist())
        found = points(config, made)
        errors.append((found[0].error or 0.0) ** 2)
        means.append(found[0].mean)
    assert math.sqrt(np.mean(errors)) == pytest.approx(np.std(means, ddof=1), rel=0.1)


def test_spread_is_pooled_by_degrees_of_freedom() -> None:
    groups = [[0.1, 0.4, 0.2], [0.9], [], [0.5, 0.7]]
    squares = sum(sum((x - np.mean(group)) ** 2 for x in group) for group in groups if group)
    assert pooled_spread(groups) == pytest.approx(math.sqrt(squares / 3))
    assert pooled_spread([[0.1], [0.2]]) is None


def test_one_seed_has_the_sampling_error_of_the_validation_set() -> None:
    config = sweep(TOP_K)
    made = trials(config, DESIGN, lambda _: {"asr": 0.3, "er": 0.9}, samples=50)
    drawn = np.random.default_rng(2).binomial(50, [0.3, 0.9], (20_000, 2)).mean(1) / 50
    point = points(config, made)[0]
    assert point.error == pytest.approx(math.sqrt(0.3 * 0.7 / 50 + 0.9 * 0.1 / 50) / 2)
    assert point.error == pytest.approx(drawn.std(), rel=0.02)
    assert (point.error_from, point.spread) == ("validation", None)


def test_sampling_error_of_one_task_takes_that_task() -> None:
    tasks = {"asr": {"score": 0.5, "samples": 100}, "er": {"score": 0.8, "samples": 25}}
    assert sampling_error("score.er", tasks) == pytest.approx(0.08)
    assert sampling_error("score.sqa", tasks) is None


def test_one_seed_of_a_loss_has_no_error() -> None:
    config = sweep(TOP_K, objective={"metric": "loss"})
    point = points(config, trials(config, DESIGN, lambda _: 0.5))[0]
    assert (point.mean, point.error, point.error_from) == (1.5, None, None)


def test_seeds_that_agree_to_the_last_digit_leave_the_sampling_error() -> None:
    config, made = top_k_study([[0.5, 0.5], [0.6, 0.6], [0.7, 0.7]])
    point = points(config, made)[0]
    assert point.error_from == "validation"
    assert point.error == pytest.approx(math.sqrt(0.25 / 400 / 3))  # three tasks; seeds share the validation set


def test_winner_has_the_best_mean_over_seeds_not_the_best_trial() -> None:
    config, made = top_k_study([[0.9, 0.1], [0.6, 0.6], [0.5, 0.6]])
    winner = best(config, points(config, made))
    assert winner is not None
    assert winner.number == 1


def test_lower_loss_wins() -> None:
    config = sweep(TOP_K, objective={"metric": "loss"})
    made = trials(config, DESIGN, lambda values: 0.1 * values["model.router.top_k"])
    assert [point.number for point in ranked(config, points(config, made))] == [2, 1, 0]


@pytest.mark.parametrize("end", [stopped, failed, lambda one: replace(one, status="running")])
def test_point_with_a_seed_that_did_not_finish_cannot_win(end) -> None:
    config, made = top_k_study([[0.9, 0.9], [0.6, 0.6], [0.5, 0.5]])
    made[1] = end(made[1])
    found = points(config, made)
    winner = best(config, found)
    assert winner is not None
    assert winner.number == 1
    assert (found[0].complete, found[0].mean, found[0].objectives) == (False, 0.9, (0.9,))


def test_point_whose_second_seed_was_never_begun_cannot_win() -> None:
    config, made = top_k_study([[0.9, 0.9], [0.6, 0.6], [0.5, 0.5]])
    winner = best(config, points(config, made[:1] + made[2:]))
    assert winner is not None
    assert winner.number == 1


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_finished_without_a_finite_objective_cannot_win(loss: float | None) -> None:
    config = sweep(TOP_K, objective={"metric": "loss"})
    made = [replace(one, loss=loss) for one in trials(config, DESIGN, lambda _: 0.5)]
    found = points(config, made)
    assert best(config, found) is None
    assert found[0].mean is None


def test_of_equal_points_the_one_with_fewer_active_parameters_wins() -> None:
    config = sweep({POOL_KEY: {"subsets": {"sizes": [0, 1, 2]}}})
    made = trials(config, grid(pool=[["hubert", "whisper"], ["hubert"], []]), lambda _: 0.5)
    costs = [3e6, 1e6, 2e6]
    made = [replace(one, cost=ModelCost(9e6, cost, 1.0)) for one, cost in zip(made, costs, strict=True)]
    assert [point.number for point in ranked(config, points(config, made))] == [1, 2, 0]


@pytest.mark.parametrize("against", ["active_parameters", "gflops"])
def test_front_is_what_nothing_dominates(against: str) -> None:
    draw = np.random.default_rng(3)
    scores, costs = draw.integers(1, 9, 40) / 10, draw.integers(1, 9, 40).astype(float)  # many ties
    config = sweep({"training.weight_decay": {"choice": list(range(40))}}, objective={"against": against})
    made = [trial(i, i, 0, {"training.weight_decay": i}, float(score)) for i, score in enumerate(scores)]
    active = against == "active_parameters"
    made = [
        replace(one, cost=ModelCost(1.0, cost, -cost) if active else ModelCost(1.0, 50 - cost, cost))
        for one, cost in zip(made, costs, strict=True)
    ]
    dominated = {
        i
        for i in range(40)
        for j in range(40)
        if scores[j] >= scores[i] and costs[j] <= costs[i] and (scores[j] > scores[i] or costs[j] < costs[i])
    }
    front = pareto_front(config, points(config, made))
    assert {point.number for point in front} == set(range(40)) - dominated
    assert [costs[point.number] for point in front] == sorted(costs[point.number] for point in front)


def test_advantage_is_positive_for_the_better_whatever_the_mode() -> None:
    for metric in ("score", "loss"):
        config, made = top_k_study([[0.5, 0.52], [0.6, 0.62], [0.5, 0.5]])
        config = config.model_copy(update={"objective": config.objective.model_copy(update={"metric": metric})})
        found = points(config, made)
        difference, error = advantage(config, found[1], found[0])
        assert difference == pytest.approx(0.1)
        assert error == pytest.approx(math.hypot(found[0].error or 0, found[1].error or 0))


def test_clear_from_two_standard_errors_on() -> None:
    assert is_clear(-0.2, 0.1)
    assert not is_clear(0.19, 0.1)
    assert not is_clear(0.5, None)
    assert not is_clear(0.0, 0.0)


def test_trials_are_counted_by_state() -> None:
    _, made = top_k_study([[0.5, 0.5]] * 3)
    made[0], made[1], made[2] = failed(made[0]), stopped(made[1]), replace(made[2], status="waiting")
    assert by_status(made) == {"finished": 3, "stopped": 1, "failed": 1, "running": 0, "waiting": 1}
