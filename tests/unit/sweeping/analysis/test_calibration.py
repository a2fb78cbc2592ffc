"""Agreement of rankings against the definitions by brute force, and what is said of a ranking with known faults."""

import itertools
import math

import numpy as np
import pytest

from mowe_ray.sweeping.analysis.calibration import (
    Calibration,
    calibration,
    kendall_tau,
    random_interval,
    sentences,
    tau_interval,
)
from mowe_ray.sweeping.one_shot import Supernet
from mowe_ray.sweeping.schema import POOL_KEY, SUPERNET_KEY
from mowe_ray.sweeping.search_space import SearchSpace
from tests import made_study

OF = {"subsets": {"of": list(made_study.ENCODERS), "sizes": [1, 2, 3]}}


def brute_force_tau_b(a, b) -> float:
    """(P - Q) / sqrt((P + Q + ties of a only) (P + Q + ties of b only)), Kendall 1945, pair by pair."""
    agree = disagree = a_only = b_only = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        if a[i] == a[j] and b[i] == b[j]:
            continue
        if a[i] == a[j]:
            a_only += 1
        elif b[i] == b[j]:
            b_only += 1
        elif (a[i] < a[j]) == (b[i] < b[j]):
            agree += 1
        else:
            disagree += 1
    untied = agree + disagree
    return (agree - disagree) / math.sqrt((untied + a_only) * (untied + b_only))


@pytest.mark.parametrize("seed", range(20))
def test_tau_is_that_of_all_pairs_with_ties(seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.integers(0, 5, (2, 11)).astype(float)
    assert kendall_tau(list(a), list(b)) == pytest.approx(brute_force_tau_b(a, b))


def test_tau_of_what_has_no_order() -> None:
    assert kendall_tau([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert kendall_tau([1.0], [1.0]) is None
    assert tau_interval([2.0, 2.0], [0.0, 1.0]) is None


def test_the_interval_is_that_of_lists_drawn_with_replacement() -> None:
    a, b = [0.1, 0.5, 0.4, 0.9, 0.7, 0.5], [0.2, 0.3, 0.6, 0.8, 0.9, 0.1]
    drawn = []
    for row in np.random.default_rng(3).integers(0, 6, (4000, 6)):
        if len({a[i] for i in row}) > 1 and len({b[i] for i in row}) > 1:
            drawn.append(brute_force_tau_b([a[i] for i in row], [b[i] for i in row]))
    found = tau_interval(a, b)
    assert found is not None
    assert found.value == pytest.approx(brute_force_tau_b(a, b))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=0.06)


def test_random_orders_reach_what_all_permutations_reach() -> None:
    b = [1.0, 2.0, 3.0, 4.0, 5.0]
    every = [brute_force_tau_b(order, b) for order in itertools.permutations(range(5))]
    found = random_interval(b)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(every, (2.5, 97.5))), abs=0.21)


def made(truth, one_shot, *, alone: int = 7, seeds=(0, 1), noise: float = 0.0, logme=None) -> Calibration:
    """A study of all pools: `truth` and `one_shot` give the score of a pool."""
    sweep = made_study.sweep({POOL_KEY: OF}, search={"kind": "oneshot"}, seeds=list(seeds))
    pools = made_study.subsets(range(1, 4))
    trained = made_study.trials(
        sweep, [{POOL_KEY: pool} for pool in pools[:alone]], lambda v: truth(v[POOL_KEY]), noise
    )
    own = made_study.trial(99, 99, 0, {POOL_KEY: pools[-1], SUPERNET_KEY: True}, 0.99)
    scores = {frozenset(pool): {"asr": {"score": one_shot(pool), "samples": 9}} for pool in [[], *pools]}
    shapley = [{"member": "hubert", "dataset": "d", "task": "asr", "metric": "wer", "value": {"value": 4.0}}]
    supernets = [Supernet(seed, scores, shapley) for seed in seeds]
    found = calibration(SearchSpace(sweep), [own, *trained], supernets, logme)
    assert found is not None
    return found


def weigh(pool) -> float:
    return sum({"hubert": 0.4, "whisper": 0.2, "wavlm": 0.1}[name] for name in pool)


def test_a_ranking_that_the_trainings_repeat_is_trusted() -> None:
    found = made(weigh, lambda pool: weigh(pool) / 2)
    assert [one.pool for one in found.pools][:2] == [["hubert", "whisper", "wavlm"], ["hubert", "whisper"]]
    assert found.doubts is None
    assert found.tau is not None
    assert (found.tau.value, found.ceiling, found.between_supernets) == (1.0, 1.0, 1.0)
    assert found.baselines["the sum of the single encoders' scores"].value == 1.0
    assert found.baselines["the number of parameters"].value == pytest.approx(
        brute_force_tau_b([1, 1, 1, 2, 2, 2, 3], [weigh(pool) for pool in made_study.subsets(range(1, 4))])
    )
    assert found.shapley == {"hubert": {"asr (wer, d)": 4.0}}
    first, *_ = sentences(found)
    assert first.startswith(
        "One-shot search ranks hubert + whisper + wavlm first of 7 pools (0.350, mean over 2 supernets)"
    )


@pytest.mark.parametrize(
    ("one_shot", "alone", "why"),
    [
        (lambda pool: -weigh(pool), 7, "opposite order"),
        (lambda pool: float("whisper" in pool), 7, "includes 0"),
        (weigh, 4, "only 4 pools"),
    ],
)
def test_a_ranking_that_says_little_is_called_so_first(one_shot, alone: int, why: str) -> None:
    found = made(weigh, one_shot, alone=alone)
    first, *_ = sentences(found)
    assert first.startswith("The one-shot ranking is not to be trusted: ")
    assert why in first


def test_scores_without_any_difference_are_no_agreement() -> None:
    found = made(lambda pool: 0.5, weigh)
    assert found.tau is None
    assert "the same score" in str(found.doubts)


def test_with_one_seed_there_is_no_ceiling() -> None:
    found = made(weigh, weigh, seeds=(0,))
    assert (found.ceiling, found.between_supernets) == (None, None)
    assert any("takes a second one" in sentence for sentence in sentences(found))


def test_the_ceiling_is_what_two_seeds_of_a_training_agree_by() -> None:
    found = made(weigh, weigh, noise=0.06)
    assert found.ceiling is not None
    assert 0 < found.ceiling < 1


def test_what_was_not_scored_is_not_ranked() -> None:
    sweep = made_study.sweep({POOL_KEY: OF}, search={"kind": "oneshot"})
    assert calibration(SearchSpace(sweep), [], []) is None
    scores = {frozenset({"hubert"}): {"asr": {"score": 0.4, "samples": 9}}}
    found = calibration(SearchSpace(sweep), [], [Supernet(0, scores)])
    assert found is not None
    assert [one.pool for one in found.pools] == [["hubert"]]


def test_logme_is_a_baseline_once_all_pools_that_were_trained_alone_have_it() -> None:
    name = "LogME of the untrained encoders"
    known = {frozenset(pool): -weigh(pool) for pool in made_study.subsets(range(1, 4))}
    assert made(weigh, weigh, logme=known).baselines[name].value == -1.0
    assert name not in made(weigh, weigh).baselines
    known.popitem()
    assert name not in made(weigh, weigh, logme=known).baselines
