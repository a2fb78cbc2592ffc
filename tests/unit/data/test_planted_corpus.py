"""What the planted corpus promises: its answer is in the wave, and not in any power spectrum of it."""

import io

import numpy as np
import pytest
import soundfile
import torch
from transformers import ASTFeatureExtractor, WhisperFeatureExtractor

from tests.planted_corpus import QUESTION, RATE, TASK, planted_samples

TRAIN, VALIDATION = 160, 60


@pytest.fixture(scope="module")
def clips() -> tuple[list[np.ndarray], np.ndarray]:
    """Decoded waves, and 1 for "up", -1 for "down"."""
    samples = list(planted_samples(0, TRAIN + VALIDATION))
    assert {(sample.instruction, sample.task) for sample in samples} == {(QUESTION, TASK)}
    waves = [soundfile.read(io.BytesIO(sample.audio), dtype="float32")[0] for sample in samples]
    return waves, np.array([{"up": 1, "down": -1}[sample.answer] for sample in samples])


def test_answers_are_balanced_and_clips_short(clips):
    waves, answers = clips
    assert answers[:TRAIN].sum() == answers[TRAIN:].sum() == 0
    assert all(0.6 * RATE <= len(wave) <= RATE for wave in waves)
    assert all(0.1 < np.abs(wave).max() < 1 for wave in waves)  # nothing is cut off


def test_the_sign_of_the_skewness_is_the_answer(clips):
    waves, answers = clips
    skewness = np.array([((wave - wave.mean()) ** 3).mean() / wave.std() ** 3 for wave in waves])
    assert np.array_equal(np.sign(skewness), answers)
    assert np.abs(skewness).min() > 1  # no matter of luck


def test_log_mel_features_cannot_tell_a_clip_from_its_mirror_image(clips):
    whisper, ast = WhisperFeatureExtractor(feature_size=20), ASTFeatureExtractor(num_mel_bins=32, max_length=98)
    for wave in clips[0][:20]:
        for extract in (whisper, ast):
            up, down = (
                extract(w, sampling_rate=RATE, return_tensors="np")[
                    "input_features" if extract is whisper else "input_values"
                ]
                for w in (wave, -wave)
            )
            assert np.abs(up).max() > 0.1
            np.testing.assert_allclose(up, down, atol=1e-4)


def test_no_classifier_of_power_spectra_generalises(clips):
    waves, answers = clips
    features = np.array([_spectrum(wave) for wave in waves])
    features = (features - features[:TRAIN].mean(0)) / features[:TRAIN].std(0)
    assert _held_out(features, answers) < 0.65
    moments = np.array([[((wave - wave.mean()) ** 3).mean() / wave.std() ** 3] for wave in waves])
    assert _held_out(moments, answers) == 1.0  # the classifier is one


def _spectrum(wave: np.ndarray) -> np.ndarray:
    """Mean and deviation over time of the log power in 16 bands."""
    power = torch.stft(torch.from_numpy(wave), 400, 160, window=torch.hann_window(400), return_complex=True).abs() ** 2
    bands = torch.stack([band.mean(0) for band in power.clamp_min(1e-8).tensor_split(16)]).log()
    return torch.cat([bands.mean(1), bands.std(1)]).numpy()


def _held_out(features: np.ndarray, answers: np.ndarray) -> float:
    """Accuracy on the held-out clips of the linear classifier with the least squared error on the others."""
    augmented = np.column_stack([features, np.ones(len(features))])
    weights = np.linalg.lstsq(augmented[:TRAIN], answers[:TRAIN], rcond=None)[0]
    return float((np.sign(augmented[TRAIN:] @ weights) == answers[TRAIN:]).mean())
