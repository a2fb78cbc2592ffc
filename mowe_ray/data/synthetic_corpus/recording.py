"""From rendered events to one recording: placed in time, at some loudness, over some noise."""

import io
from collections.abc import Sequence

import numpy as np
import soundfile

from mowe_ray.data.synthetic_corpus.sounds import SAMPLE_RATE, Rng, Wave

PEAK = 0.35  # of an ordinary event; leaves room for a speaker who shouts


def record(events: Sequence[Wave], rng: Rng, loudness: float = 1.0) -> Wave:
    """Play `events` one after the other in a slightly noisy room.

    Args:
        events: waves (S,) of any peak; each is brought to the same one first.
        rng: draws the pauses, a gain within 3 dB, and noise 30 to 45 dB below a full-scale event.
        loudness: factor on top of the gain, for speakers who shout or murmur.

    Returns:
        (S,) float32, 16 kHz, within [-1, 1].
    """
    pieces = [_pause(rng, 0.1, 0.25)]
    for position, event in enumerate(events):
        if position > 0:
            pieces.append(_pause(rng, 0.12, 0.25))
        pieces.append(event / np.abs(event).max())
    pieces.append(_pause(rng, 0.1, 0.25))
    wave = np.concatenate(pieces) * (PEAK * loudness * 10 ** (rng.uniform(-3, 3) / 20))
    noise = rng.standard_normal(wave.size) * (PEAK * 10 ** (rng.uniform(-45, -30) / 20))
    return np.clip(wave + noise, -1, 1).astype(np.float32)


def encode_flac(wave: Wave) -> bytes:
    """(S,) float32 in [-1, 1] at 16 kHz -> 16-bit FLAC file."""
    file = io.BytesIO()
    soundfile.write(file, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _pause(rng: Rng, shortest_s: float, longest_s: float) -> Wave:
    return np.zeros(int(rng.uniform(shortest_s, longest_s) * SAMPLE_RATE), np.float32)
