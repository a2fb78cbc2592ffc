import numpy as np
import pytest

from mowe_ray.evaluation.metrics.captions import ROUGE_L
from mowe_ray.evaluation.metrics.classification import macro_f1
from mowe_ray.evaluation.metrics.metric import mean_metric
from mowe_ray.evaluation.metrics.text_overlap import WER
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.scoring import interval, paired_difference
from tests.made_answers import LABELS, answers_of, labelled_answers

SHARE = mean_metric("share", "share (%)", lambda answer: float(answer.answer))


def scored(scores) -> np.ndarray:
    return SHARE.statistics([Answer("", "", "", str(float(score)), [""]) for score in scores])


def percentiles(values: list[float]) -> tuple[float, float]:
    """2.5 % and 97.5 %, interpolated between the two nearest ranks."""
    ordered = sorted(values)
    found = []
    for share in (0.025, 0.975):
        rank = share * (len(ordered) - 1)
        below = int(rank)
        above = min(below + 1, len(ordered) - 1)
        found.append(ordered[below] + (rank - below) * (ordered[above] - ordered[below]))
    return found[0], found[1]


@pytest.mark.parametrize(
    ("metric", "answers"),
    [(WER, answers_of("asr", 30)), (ROUGE_L, answers_of("ac", 30)), (macro_f1(LABELS), labelled_answers(30))],
    ids=["wer", "rouge_l", "macro_f1"],
)
def test_the_interval_is_that_of_scoring_resampled_answers_again(metric, answers):
    rng = np.random.default_rng(5)
    values = [metric.of([answers[i] for i in rng.integers(len(answers), size=len(answers))]) for _ in range(200)]
    found = interval(metric, metric.statistics(answers), seed=5, draws=200)
    assert (found.low, found.high) == pytest.approx(percentiles(values), abs=1e-9)
    assert found.value == metric.of(answers)
    assert found.low < found.value < found.high


def test_a_difference_is_taken_on_the_same_resamples():
    one, other = answers_of("asr", 40, seed=1), answers_of("asr", 40, seed=2)
    rng = np.random.default_rng(9)
    values = []
    for _ in range(200):
        drawn = rng.integers(40, size=40)
        values.append(WER.of([one[i] for i in drawn]) - WER.of([other[i] for i in drawn]))
    found = paired_difference(WER, WER.statistics(one), WER.statistics(other), seed=9, draws=200)
    assert (found.low, found.high) == pytest.approx(percentiles(values), abs=1e-9)
    assert found.value == pytest.approx(WER.of(one) - WER.of(other))


def test_a_constant_difference_is_certain_however_uncertain_both_are():
    scores = np.random.default_rng(0).random(50)
    found = paired_difference(SHARE, scored(scores + 0.1), scored(scores), seed=0)
    assert (found.low, found.value, found.high) == pytest.approx((10, 10, 10))
    alone = interval(SHARE, scored(scores), seed=0)
    assert alone.high - alone.low > 10
    same = paired_difference(SHARE, scored(scores), scored(scores), seed=0)
    assert (same.low, same.value, same.high) == (0, 0, 0)


def test_large_sets_are_resampled_in_portions_that_change_nothing():
    scores = np.random.default_rng(1).random(7000)  # 1000 draws of them do not fit one portion
    rng = np.random.default_rng(3)
    values = [100 * float(scores[rng.integers(7000, size=7000)].mean()) for _ in range(1000)]
    found = interval(SHARE, scored(scores), seed=3)
    assert (found.low, found.high) == pytest.approx(percentiles(values), abs=1e-9)


def test_the_seed_decides():
    statistics = scored(np.random.default_rng(2).random(30))
    assert interval(SHARE, statistics, seed=1) == interval(SHARE, statistics, seed=1)
    assert interval(SHARE, statistics, seed=1) != interval(SHARE, statistics, seed=2)


def test_one_sample_has_no_spread():
    found = interval(SHARE, scored([0.25]), seed=0)
    assert (found.low, found.value, found.high) == (25, 25, 25)
    difference = paired_difference(SHARE, scored([0.25]), scored([1.0]), seed=0)
    assert (difference.low, difference.value, difference.high) == (-75, -75, -75)


def test_19_of_20_intervals_cover_the_truth():
    rng = np.random.default_rng(11)
    covered = 0
    for seed in range(300):
        found = interval(SHARE, scored(rng.random(100) < 0.3), seed=seed, draws=400)
        covered += found.low <= 30 <= found.high
    assert 0.92 <= covered / 300 <= 0.98  # 0.95, two standard errors of 300 trials and the small-sample bias apart


def test_it_is_as_wide_as_the_standard_error_says():
    scores = np.random.default_rng(4).normal(0.5, 0.1, size=2000)
    found = interval(SHARE, scored(scores), seed=0, draws=4000)
    error = 100 * scores.std() / np.sqrt(2000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
