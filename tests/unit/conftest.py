"""What unit tests are made of: small audio files in every container, a tiny model, and micro-batches to feed it."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from transformers import PreTrainedTokenizerBase

from mowe_ray.data.decode import to_int16
from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.data.sample import BadSample, Sample
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.building import WeakEncoder, build_model, build_processor
from tests.tiny_models import (
    tiny_hubert_config,
    tiny_language_model_config,
    tiny_tokenizer,
    tiny_whisper_config,
)

NO_DROPOUT = dict.fromkeys(
    ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout"), 0.0
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer(chat_template=False)


@pytest.fixture
def make_model(tokenizer) -> Callable[..., MoweForConditionalGeneration]:
    def make(**changes: Any) -> MoweForConditionalGeneration:
        arguments: dict[str, Any] = {
            "base_encoder": tiny_whisper_config(),
            "weak_encoders": [
                WeakEncoder("whisper", tiny_whisper_config(d_model=16), train="full"),
                WeakEncoder("hubert", tiny_hubert_config(**NO_DROPOUT), train="full"),
            ],
            "language_model": tiny_language_model_config("llama"),
            "tokenizer": tokenizer,
        }
        return build_model(**arguments | changes)

    return make


@pytest.fixture
def processor(make_model, tokenizer) -> MoweProcessor:
    return build_processor(make_model(), tokenizer)


@pytest.fixture(scope="session")
def make_micro_batch() -> Callable[..., MicroBatch]:
    """Pack tones of the given seconds (0: text only), numbered from `first`."""

    def make(
        seconds: Sequence[float], *, first: int = 0, tasks: str = "asr", bad: Sequence[BadSample] = ()
    ) -> MicroBatch:
        clips, scales = [np.zeros(0, np.int16)], []
        for number, length in enumerate(seconds, first):
            time = np.arange(round(length * 16_000)) / 16_000
            noise = 0.05 * np.random.default_rng(number).standard_normal(len(time))
            tone = 0.3 * np.sin(2 * np.pi * 150 * 2 ** (number % 5) * time)
            clip, scale = to_int16((tone + noise).astype(np.float32)) if length else (clips[0], 1.0)
            clips.append(clip)
            scales.append(scale)
        numbers = range(first, first + len(seconds))
        return MicroBatch(
            audio=np.concatenate(clips),
            lengths=[len(clip) for clip in clips[1:]],
            scales=scales,
            ids=[f"s{n}" for n in numbers],
            instructions=[f"What is {n}?" for n in numbers],
            answers=[f"sound {n}, high" for n in numbers],
            references=[[f"sound {n}, high"] for n in numbers],
            tasks=[tasks] * len(seconds),
            sources=["made"] * len(seconds),
            bad=list(bad),
        )

    return make


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
