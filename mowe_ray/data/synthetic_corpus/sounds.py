"""Synthesised sound events, six that differ in spectrum and in time, beeps to count, and recordings made of them.

Every function draws its own parameters (pitch, speed, length), so no two renderings are alike.
Arrays are (S,) float32 at 16 kHz with a peak near 1. All recipes are [ours].
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import soundfile

SAMPLE_RATE = 16_000
PEAK = 0.35  # of an ordinary event; leaves room for a speaker who shouts

Wave = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Rng = np.random.Generator


def siren(rng: Rng) -> Wave:
    """A tone that sweeps up and down between about 600 and 1400 Hz."""
    time = _clock(rng.uniform(0.9, 1.3))
    sweeps = np.sin(2 * np.pi * rng.uniform(1.5, 3.0) * time + rng.uniform(0, 2 * np.pi))
    tone = np.sin(_phase(rng.uniform(900, 1100) + rng.uniform(300, 420) * sweeps))
    return _finish(tone + 0.3 * np.sign(tone))


def knocking(rng: Rng) -> Wave:
    """Three to five dull thumps, each gone within 50 ms."""
    gap, pitch = rng.uniform(0.16, 0.26), rng.uniform(130, 240)
    count = int(rng.integers(3, 6))
    time = _clock(count * gap)
    wave = np.zeros_like(time)
    for knock in range(count):
        since = time - knock * gap - rng.uniform(0, 0.02)
        envelope = np.exp(-np.maximum(since, 0) / rng.uniform(0.012, 0.02)) * (since >= 0)
        body = np.sin(2 * np.pi * pitch * since) + 0.5 * rng.standard_normal(time.size)
        wave += rng.uniform(0.8, 1.0) * envelope * body
    return _finish(_smooth(wave, 5))


def bell(rng: Rng) -> Wave:
    """One strike of inharmonic partials that ring out."""
    time = _clock(rng.uniform(0.9, 1.3))
    pitch, ring = rng.uniform(1300, 2000), rng.uniform(0.25, 0.45)
    partials = ((1.0, 1.0, 1.0), (1.51, 0.6, 0.7), (2.0, 0.5, 0.6), (2.74, 0.4, 0.4))
    wave = sum(
        level * np.sin(2 * np.pi * ratio * pitch * time) * np.exp(-time / (ring * life))
        for ratio, level, life in partials
    )
    return _finish(np.asarray(wave))


def rain(rng: Rng) -> Wave:
    """Steady hiss with the ticks of single drops."""
    time = _clock(rng.uniform(0.9, 1.3))
    hiss = np.diff(rng.standard_normal(time.size + 1)) * rng.uniform(0.8, 1.2)
    drops = (rng.random(time.size) < rng.uniform(0.001, 0.003)) * rng.uniform(2, 4, time.size)
    return _finish(hiss + drops)


def dog(rng: Rng) -> Wave:
    """Two or three barks: a short harsh voice whose pitch jumps up and falls."""
    pitch, gap = rng.uniform(330, 480), rng.uniform(0.34, 0.46)
    count = int(rng.integers(2, 4))
    wave = np.zeros(int(count * gap * SAMPLE_RATE))
    for bark in range(count):
        time = _clock(rng.uniform(0.14, 0.2))
        place = time / time[-1]
        # The pitch of a bark rises and falls once within it.
        glide = _phase(pitch * (1 + 0.6 * np.sin(np.pi * place)))
        voice = np.asarray(sum(np.sin(k * glide) / k**0.5 for k in range(1, 7)))
        harsh = voice * (1 + 0.4 * rng.standard_normal(time.size)) * np.sin(np.pi * place) ** 0.6
        start = int(bark * gap * SAMPLE_RATE)
        wave[start : start + time.size] += harsh
    return _finish(wave)


def engine(rng: Rng) -> Wave:
    """A low buzz: firing pulses at 35 to 60 Hz, all below about 1 kHz."""
    time = _clock(rng.uniform(0.9, 1.3))
    speed = rng.uniform(35, 60) * (1 + 0.06 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * time))
    pulses = np.maximum(np.sin(_phase(speed)), 0) ** 6
    rumble = 0.2 * _smooth(rng.standard_normal(time.size), 16)
    return _finish(_smooth(pulses - pulses.mean() + rumble, 8))


def beeps(rng: Rng, count: int) -> Wave:
    """`count` equal tones of 110 ms, in a duration that does not depend on their number."""
    pitch, gap = rng.uniform(700, 1300), rng.uniform(0.3, 0.38)
    time = _clock(0.11)
    tone = np.sin(2 * np.pi * pitch * time) * np.minimum(1, 20 * np.sin(np.pi * time / 0.11))
    wave = np.zeros(int(rng.uniform(1.3, 1.6) * SAMPLE_RATE))
    first = rng.uniform(0, wave.size / SAMPLE_RATE - 0.11 - (count - 1) * gap)
    for beep in range(count):
        start = int((first + beep * gap) * SAMPLE_RATE)
        wave[start : start + tone.size] = tone
    return _finish(wave)


SOUNDS: dict[str, Callable[[Rng], Wave]] = {
    "siren": siren,
    "knocking": knocking,
    "bell": bell,
    "rain": rain,
    "dog": dog,
    "engine": engine,
}


def _clock(seconds: float) -> Floats:
    return np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def _phase(frequency: Floats) -> Floats:
    """Integral of a frequency in Hz: (S,) radians."""
    return 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE


def _smooth(wave: Floats, width: int) -> Floats:
    """Moving average over `width` samples: a cheap low-pass."""
    return np.convolve(wave, np.ones(width) / width, mode="same")


def _finish(wave: Floats) -> Wave:
    """Fade both ends over 5 ms, so that no event starts with a click, and bring the peak to 1."""
    fade = np.minimum(1, np.arange(wave.size) / (0.005 * SAMPLE_RATE))
    faded = wave * fade * fade[::-1]
    return np.asarray(faded / np.abs(faded).max(), np.float32)


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
