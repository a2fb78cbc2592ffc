"""Small audio files in every container, made on the spot."""

import io
from collections.abc import Callable

import av
import numpy as np
import pytest
import soundfile

from mowe_ray.data.sample import Sample

RATE = 16_000


@pytest.fixture(scope="session")
def tone() -> Callable[..., np.ndarray]:
    """A tone in noise: (S,) float32 with a peak of about 0.4."""

    def make(seconds: float = 1.0, hertz: float = 440.0, rate: int = RATE) -> np.ndarray:
        time = np.arange(round(seconds * rate)) / rate
        noise = np.random.default_rng(int(hertz)).standard_normal(len(time))
        return (0.35 * np.sin(2 * np.pi * hertz * time) + 0.01 * noise).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def encode(tone) -> Callable[..., bytes]:
    """Encode a waveform, by default a tone, with libsndfile or FFmpeg."""

    def with_ffmpeg(wave: np.ndarray, codec: str, container: str) -> bytes:
        out = io.BytesIO()
        with av.open(out, "w", format=container) as file:
            stream = file.add_stream(codec, rate=48_000)
            stream.layout = "mono"
            frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            frame.sample_rate = RATE
            resampler = av.AudioResampler(stream.format, "mono", 48_000, frame_size=stream.frame_size or None)
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                file.mux(stream.encode(piece))
            file.mux(stream.encode(None))
        return out.getvalue()

    def make(
        kind: str = "flac",
        wave: np.ndarray | None = None,
        *,
        seconds: float = 1.0,
        hertz: float = 440.0,
        rate: int = RATE,
    ) -> bytes:
        wave = tone(seconds, hertz, rate) if wave is None else wave
        if kind == "opus":
            return with_ffmpeg(wave, "libopus", "ogg")
        if kind == "m4a":
            return with_ffmpeg(wave, "aac", "ipod")
        if kind == "webm":
            return with_ffmpeg(wave, "libopus", "webm")
        out = io.BytesIO()
        subtype = {"ogg": "VORBIS", "float": "FLOAT"}.get(kind)
        soundfile.write(out, wave, rate, format={"float": "WAV"}.get(kind, kind), subtype=subtype)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def make_samples(encode) -> Callable[..., list[Sample]]:
    """Samples with tones of growing length, ids `a0`, `a1`..., tasks as given."""

    def make(count: int, *, prefix: str = "a", task: str = "asr", step_s: float = 0.1) -> list[Sample]:
        return [
            Sample(
                id=f"{prefix}{n}",
                audio=encode("flac", seconds=0.5 + step_s * n, hertz=200.0 + 10 * n),
                instruction=f"What is {n}?",
                answer=f"answer {n}",
                task=task,
                source="made",
                suffix="flac",
            )
            for n in range(count)
        ]

    return make
