from copy import deepcopy

import numpy as np
import pytest

from mowe_ray.training.monitor import SpikeDetector

SEEDS = range(8)


def spikes_of(losses) -> dict[int, float]:
    """Steps that were called spikes, with the loss that was expected."""
    detector = SpikeDetector()
    found = [(step, detector.expected_if_spike(float(loss))) for step, loss in enumerate(losses)]
    return {step: expected for step, expected in found if expected is not None}


def decaying(seed: int, noise: float, steps_to_decay: float, steps: int = 1000) -> np.ndarray:
    random = np.random.default_rng(seed)
    curve = 1.5 + 4.5 * np.exp(-np.arange(steps) / steps_to_decay)
    return curve * (1 + noise * random.standard_normal(steps))


@pytest.mark.parametrize("steps_to_decay", [30, 300])
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.25])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_false_alarm_on_a_noisy_decaying_curve(seed: int, noise: float, steps_to_decay: float) -> None:
    assert spikes_of(decaying(seed, noise, steps_to_decay)) == {}


@pytest.mark.parametrize("steps_to_decay", [30, 300])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_jump_to_three_times_the_loss_is_found_wherever_it_is(seed: int, noise: float, steps_to_decay: float) -> None:
    planted = np.random.default_rng(seed).choice(np.arange(20, 1000), size=12, replace=False)
    losses = decaying(seed, noise, steps_to_decay)
    losses[planted] = 3 * decaying(seed, 0.0, steps_to_decay)[planted]
    assert sorted(spikes_of(losses)) == sorted(planted.tolist())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_limit_is_seven_deviations_above_the_median(seed: int) -> None:
    losses = np.random.default_rng(seed).normal(5.0, 0.4, 300)
    detector = SpikeDetector()
    for step, loss in enumerate(losses):
        if step >= 20:
            before = losses[max(0, step - 128) : step]
            deviation = np.median(np.abs(np.diff(before))) / 0.6745 / np.sqrt(2)
            level = np.median(before[-20:])
            over = level + max(7 * deviation, 0.1 * level)
            assert deepcopy(detector).expected_if_spike(over - 1e-9) is None
            assert deepcopy(detector).expected_if_spike(over + 1e-9) == pytest.approx(level)
        detector.expected_if_spike(float(loss))


def test_a_loss_that_stays_high_becomes_the_expected_one() -> None:
    found = spikes_of([1.0] * 50 + [3.0] * 50)
    assert sorted(found) == list(range(50, 61))
    assert set(found.values()) == {1.0, 2.0}


def test_nothing_is_a_spike_before_twenty_steps() -> None:
    assert spikes_of([1.0] * 19 + [100.0]) == {}
    assert spikes_of([1.0] * 20 + [100.0]) == {20: 1.0}
