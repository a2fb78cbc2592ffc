import numpy as np
import pytest

from mowe_ray.data.synthetic_corpus.sounds import SAMPLE_RATE
from mowe_ray.data.synthetic_corpus.speech import Prosody, speaker


def _median_pitch_hz(wave):
    """Median over frames of the autocorrelation peak between 60 and 400 Hz."""
    pitches = []
    for start in range(0, wave.size - 800, 400):
        frame = wave[start : start + 800] - wave[start : start + 800].mean()
        correlation = np.correlate(frame, frame, "full")[799:]
        lags = np.arange(SAMPLE_RATE // 400, SAMPLE_RATE // 60)
        best = lags[np.argmax(correlation[lags])]
        if correlation[best] > 0.5 * correlation[0]:
            pitches.append(SAMPLE_RATE / best)
    return np.median(pitches)


def test_a_fresh_speaker_repeats_itself_whatever_was_spoken_before():
    with speaker() as first:
        first.say("something else entirely", "en+f2", Prosody(rate=120))
    with speaker() as second, speaker() as third:
        spoken = second.say("the cat is green", "en-us+m1", Prosody())
        third_spoken = third.say("the cat is green", "en-us+m1", Prosody())
    np.testing.assert_array_equal(spoken, third_spoken)
    assert spoken.dtype == np.float32
    assert 0.5 < spoken.size / SAMPLE_RATE < 2


@pytest.mark.slow
def test_prosody_changes_length_and_pitch():
    with speaker() as voice:
        plain = voice.say("we leave at noon", "en-us+m1", Prosody(span=10))
        fast = voice.say("we leave at noon", "en-us+m1", Prosody(span=10, rate=300))
        high = voice.say("we leave at noon", "en-us+m1", Prosody(span=10, pitch=90))
    assert fast.size < 0.75 * plain.size
    assert _median_pitch_hz(high) > 1.2 * _median_pitch_hz(plain)


def test_an_unknown_voice_is_refused():
    with speaker() as voice, pytest.raises(ValueError, match="nobody"):
        voice.say("hello", "nobody", Prosody())
