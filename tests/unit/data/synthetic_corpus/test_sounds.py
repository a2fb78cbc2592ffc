import numpy as np
import pytest

from mowe_ray.data.synthetic_corpus.sounds import SAMPLE_RATE, SOUNDS, beeps


def _centroid_hz(wave):
    power = np.abs(np.fft.rfft(wave)) ** 2
    return float((power * np.fft.rfftfreq(wave.size, 1 / SAMPLE_RATE)).sum() / power.sum())


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_are_short_have_peak_one_and_start_softly(name):
    for seed in range(20):
        wave = SOUNDS[name](np.random.default_rng(seed))
        assert wave.dtype == np.float32
        assert 0.4 < wave.size / SAMPLE_RATE < 1.6
        assert np.abs(wave).max() == pytest.approx(1)
        assert abs(wave[0]) < 1e-6


def test_spectra_keep_their_order_whatever_the_parameters():
    ranges = {}
    for name in ("engine", "siren", "rain"):
        centroids = [_centroid_hz(SOUNDS[name](np.random.default_rng(s))) for s in range(20)]
        ranges[name] = min(centroids), max(centroids)
    assert ranges["engine"][1] < ranges["siren"][0]
    assert ranges["siren"][1] < ranges["rain"][0]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_beeps_can_be_counted_but_not_by_length(count):
    lengths = []
    for seed in range(20):
        wave = beeps(np.random.default_rng(seed), count)
        loud = np.abs(wave).reshape(-1)[: wave.size // 160 * 160].reshape(-1, 160).max(axis=1) > 0.3
        assert int(np.sum(loud[1:] & ~loud[:-1]) + loud[0]) == count
        lengths.append(wave.size)
    assert 1.3 * SAMPLE_RATE <= min(lengths) <= max(lengths) <= 1.6 * SAMPLE_RATE
