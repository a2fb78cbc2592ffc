"""A tiny model without dropout, its processor, and decoded micro-batches to feed it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from mowe_ray.data.batch import MicroBatch
from mowe_ray.data.decode import to_int16
from mowe_ray.data.sample import BadSample
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
