"""What factors do, against plain averages, least squares and simulated studies."""

import math
from itertools import product

import numpy as np
import pytest

from mowe_ray.sweeping.analysis.effects import Effect, distinct, effects, gap, pool_kind, spearman
from mowe_ray.sweeping.schema import POOL_KEY, SweepConfig
from mowe_ray.sweeping.trials import Trial
from tests.made_study import ENCODERS, failed, grid, planted, planted_study, subsets, sweep, trial, trials

SPACE = {"model.router.top_k": {"grid": [1, 2, 3]}, "training.mowe_loss.kind": {"grid": ["a", "b", "c", "d"]}}
DESIGN = grid(model__router__top_k=[1, 2, 3], training__mowe_loss__kind=["a", "b", "c", "d"])


def named(config: SweepConfig, made: list[Trial], name: str) -> Effect:
    """The effect of one factor."""
    return next(effect for effect in effects(config, made) if effect.factor.name == name)


def grid_study(table: np.ndarray, samples: int = 10**9) -> tuple[SweepConfig, list[Trial]]:
    """A full grid of 3 by 4 with the scores of `table`; the validation set adds no error."""
    made = [
        trial(i, i, 0, values, float(score), samples=samples)
        for i, (values, score) in enumerate(zip(DESIGN, table.flat, strict=True))
    ]
    return sweep(SPACE), made


def test_full_grid_is_paired_with_the_error_of_the_additive_model() -> None:
    table = np.random.default_rng(0).uniform(0.3, 0.7, (3, 4))
    effect = named(*grid_study(table), "router.top_k")
    assert effect.paired
    assert [level.mean for level in effect.levels] == pytest.approx(table.mean(1))
    # Least squares with one column per value and per setting.
    rows = list(product(range(3), range(4)))
    columns = np.array([[float(i == k) for k in range(3)] + [float(j == k) for k in range(1, 4)] for i, j in rows])
    fitted, *_ = np.linalg.lstsq(columns, table.ravel(), rcond=None)
    variance = ((table.ravel() - columns @ fitted) ** 2).sum() / (12 - 6)
    covariance = variance * np.linalg.inv(columns.T @ columns)
    difference, error = gap(effect.levels[0], effect.levels[2])
    assert difference == pytest.approx(fitted[0] - fitted[2])
    assert error == pytest.approx(math.sqrt(covariance[0, 0] + covariance[2, 2] - 2 * covariance[0, 2]))


def test_pairing_takes_out_what_the_other_factor_does() -> None:
    table = np.array([[0.02 * i + 0.2 * j for j in range(4)] for i in range(3)])
    table += np.random.default_rng(1).normal(0, 0.001, table.shape)
    effect = named(*grid_study(table), "router.top_k")
    difference, error = gap(effect.levels[1], effect.levels[0])
    assert difference == pytest.approx(0.02, abs=0.002)
    assert error is not None
    assert error < 0.002


def test_settings_that_not_every_value_has_are_left_out_of_pairs() -> None:
    table = np.random.default_rng(2).uniform(0.3, 0.7, (3, 4))
    config, made = grid_study(table)
    made[0] = failed(made[0])
    effect = named(config, made, "router.top_k")
    assert effect.paired
    assert [level.mean for level in effect.levels] == pytest.approx(table[:, 1:].mean(1))


def test_few_complete_settings_among_many_are_no_pairs() -> None:
    entries = {"model.router.top_k": {"choice": [1, 2]}, "training.weight_decay": {"choice": list(range(9))}}
    config = sweep(entries, search={"kind": "random"}, budget={"points": 11})
    pairs = [(1, 0), (2, 0), (1, 1), (2, 1), *((1 + i % 2, i) for i in range(2, 9))]
    made = [
        trial(i, i, 0, {"model.router.top_k": k, "training.weight_decay": decay}, 0.3 + 0.02 * i)
        for i, (k, decay) in enumerate(pairs)
    ]
    effect = named(config, made, "router.top_k")
    assert not effect.paired
    assert sum(len(level.points) for level in effect.levels) == 11


def test_random_design_is_not_paired_and_errs_by_the_spread_within_values() -> None:
    draw = np.random.default_rng(3)
    groups = {1: draw.uniform(0.3, 0.5, 4), 2: draw.uniform(0.4, 0.9, 6)}
    space = {"model.router.top_k": {"choice": [1, 2]}, "training.weight_decay": {"uniform": [0, 1]}}
    values = [(k, float(score)) for k, scores in groups.items() for score in scores]
    made = [
        trial(i, i, 0, {"model.router.top_k": k, "training.weight_decay": 0.01 * i}, score, samples=10**9)
        for i, (k, score) in enumerate(values)
    ]
    config = sweep(space, search={"kind": "random"}, budget={"points": 10})
    effect = named(config, made, "router.top_k")
    within = math.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups.values()) / 8)
    assert not effect.paired
    assert [level.error for level in effect.levels] == pytest.approx([within / 2, within / math.sqrt(6)])


def test_error_is_never_below_that_of_the_points() -> None:
    config, made = grid_study(np.full((3, 4), 0.5), samples=100)  # no spread at all, but a small validation set
    level = named(config, made, "router.top_k").levels[0]
    assert level.error == pytest.approx(math.sqrt(0.25 / 100 / 3) / 2)  # three tasks, four points


@pytest.mark.slow
def test_importance_is_eta_squared_and_chance_what_a_null_factor_gets() -> None:
    table = np.random.default_rng(4).uniform(0.3, 0.7, (3, 4))
    effect = named(*grid_study(table), "router.top_k")
    assert effect.importance == pytest.approx(
        4 * ((table.mean(1) - table.mean()) ** 2).sum() / ((table - table.mean()) ** 2).sum()
    )
    null = [
        named(*grid_study(np.random.default_rng(i).normal(0.5, 0.1, (3, 4))), "router.top_k").importance
        for i in range(300)
    ]
    assert np.mean(null) == pytest.approx(effect.chance, abs=0.03)


def test_most_important_factor_comes_first() -> None:
    table = np.array([[0.1 * i + 0.01 * j for j in range(4)] for i in range(3)])
    assert [effect.factor.name for effect in effects(*grid_study(table))] == ["router.top_k", "mowe_loss.kind"]


def test_pools_give_presence_size_and_kind() -> None:
    pools = [*subsets([0, 1, 2]), ["whisper"] * 3]
    config = sweep({POOL_KEY: {"subsets": {"sizes": [0, 1, 2]}, "repeats": {"times": [3]}}})
    found = {effect.factor.name: effect for effect in effects(config, trials(config, grid(pool=pools), planted))}
    assert set(found) == {"pool", *ENCODERS, "pool size", "kind of pool"}
    assert [level.label for level in found["pool size"].levels] == ["0", "1", "2", "3"]
    assert {level.label: len(level.points) for level in found["kind of pool"].levels} == {
        "none": 1,
        "single": 3,
        "diverse": 3,
        "uniform": 1,
    }


def test_presence_is_paired_with_the_pool_without_the_encoder() -> None:
    config = sweep({POOL_KEY: {"subsets": {"sizes": [0, 1, 2, 3]}}})
    made = trials(config, grid(pool=subsets()), planted, samples=10**9)
    effect = named(config, made, "hubert")
    by_label = {level.label: level for level in effect.levels}
    scores = {frozenset(one.values[POOL_KEY]): one.objective("score") for one in made}
    pairs = [scores[pool | {"hubert"}] - scores[pool] for pool in scores if "hubert" not in pool]
    difference, error = gap(by_label["with hubert"], by_label["without hubert"])
    assert effect.paired
    assert difference == pytest.approx(np.mean(pairs))
    assert error == pytest.approx(np.std(pairs, ddof=1) / math.sqrt(len(pairs)), abs=1e-5)


def test_kinds_of_pools() -> None:
    assert [pool_kind(pool) for pool in ([], ["a"], ["a", "a"], ["a", "b", "a"])] == [
        "none",
        "single",
        "uniform",
        "diverse",
    ]


def test_range_has_a_trend() -> None:
    draw = np.random.default_rng(5)
    rates = 10 ** draw.uniform(-5, -2, 30)
    scores = 0.5 + 0.1 * np.log10(rates / 1e-5) / 3 + draw.normal(0, 0.01, 30)
    config = sweep(
        {"training.learning_rate": {"loguniform": [1e-5, 1e-2]}}, search={"kind": "random"}, budget={"points": 30}
    )
    made = [
        trial(i, i, 0, {"training.learning_rate": float(rate)}, float(score))
        for i, (rate, score) in enumerate(zip(rates, scores, strict=True))
    ]
    effect = named(config, made, "learning_rate")
    assert effect.trend is not None
    assert [effect.trend.slope, effect.trend.intercept] == pytest.approx(np.polyfit(np.log10(rates), scores, 1))
    assert effect.trend.clear
    order = np.argsort(rates)
    assert [level.mean for level in effect.levels] == pytest.approx(
        [scores[part].mean() for part in np.split(order, 3)]
    )


def test_spearman_is_the_correlation_of_ranks() -> None:
    draw = np.random.default_rng(6)
    a, b = draw.permutation(20).astype(float), draw.permutation(20).astype(float)
    assert spearman(a, b) == pytest.approx(1 - 6 * ((a - b) ** 2).sum() / (20 * (400 - 1)))  # without ties
    assert spearman(np.exp(a), b**3) == pytest.approx(spearman(a, b))
    tied = np.corrcoef([2, 2, 2, 4, 5], [1, 2, 3, 4, 5])[0, 1]  # the first three share the mean of their ranks
    assert spearman(np.array([7.0, 7, 7, 8, 9]), np.array([1.0, 2, 3, 4, 5])) == pytest.approx(tied)
    assert spearman(np.ones(4), np.arange(4.0)) == 0.0


@pytest.mark.slow
def test_a_trend_of_noise_is_rarely_clear() -> None:
    config = sweep({"training.weight_decay": {"uniform": [0, 1]}}, search={"kind": "random"}, budget={"points": 20})
    clear = 0
    for study in range(200):
        draw = np.random.default_rng(study)
        made = [
            trial(i, i, 0, {"training.weight_decay": float(draw.uniform())}, float(draw.uniform())) for i in range(20)
        ]
        trend = named(config, made, "weight_decay").trend
        clear += trend is not None and trend.clear
    assert clear <= 18  # 5 % of 200, and three standard deviations


def test_factors_that_divide_points_alike_are_shown_once() -> None:
    config = sweep({POOL_KEY: {"pools": [[], ["hubert"]]}})
    found = effects(config, trials(config, grid(pool=[[], ["hubert"]]), planted))
    assert len(found) == 4
    assert len(list(distinct(found))) == 1


def test_entry_with_one_value_has_no_effect() -> None:
    config = sweep({"model.router.top_k": {"grid": [1]}, "training.weight_decay": {"grid": [0, 1]}})
    made = trials(config, grid(model__router__top_k=[1], training__weight_decay=[0, 1]), lambda _: 0.5)
    assert [effect.factor.name for effect in effects(config, made)] == ["weight_decay"]


def test_planted_encoder_explains_most() -> None:
    assert effects(*planted_study())[0].factor.name == "hubert"
