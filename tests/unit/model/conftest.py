from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.building import WeakEncoder, build_model, build_processor
from tests.tiny_models import (
    tiny_hubert_config,
    tiny_language_model_config,
    tiny_tokenizer,
    tiny_whisper_config,
)

MakeModel = Callable[..., MoweForConditionalGeneration]


def waves(*seconds: float, seed: int = 0) -> list[np.ndarray]:
    """Noise whose loudness and pitch differ from clip to clip, so that routers can tell them apart."""
    random = np.random.default_rng(seed)
    clips = []
    for index, length in enumerate(seconds):
        time = np.arange(round(length * 16_000)) / 16_000
        tone = np.sin(2 * np.pi * 150 * 2 ** ((index + seed) % 5) * time)
        clips.append((0.3 * tone + 0.05 * random.normal(size=len(time))).astype(np.float32))
    return clips


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer(chat_template=False)


@pytest.fixture
def make_model(tokenizer: PreTrainedTokenizerBase) -> MakeModel:
    """Build a model of a Whisper base, a pool of a Whisper and a HuBERT, and a Llama; all replaceable."""

    def make(**changes: Any) -> MoweForConditionalGeneration:
        arguments: dict[str, Any] = {
            "base_encoder": tiny_whisper_config(),
            "weak_encoders": [
                WeakEncoder("whisper", tiny_whisper_config(d_model=16), train="full"),
                WeakEncoder("hubert", tiny_hubert_config(), train="full"),
            ],
            "language_model": tiny_language_model_config("llama"),
            "tokenizer": tokenizer,
        }
        return build_model(**arguments | changes)

    return make


@pytest.fixture
def make_batch(tokenizer: PreTrainedTokenizerBase) -> Callable[..., dict[str, torch.Tensor]]:
    """Build the inputs of rows, given the seconds of each row's clips."""

    def make(
        model: MoweForConditionalGeneration,
        rows: Sequence[Sequence[float]],
        *,
        answers: bool = True,
        seed: int = 0,
    ) -> dict[str, torch.Tensor]:
        processor: MoweProcessor = build_processor(model, tokenizer)
        return dict(
            processor(
                [f"What is clip {index}?" for index in range(len(rows))],
                [waves(*row, seed=seed + index) for index, row in enumerate(rows)],
                [f"sound {index}, high" for index in range(len(rows))] if answers else None,
            )
        )

    return make
