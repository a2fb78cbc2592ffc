"""Six optimizer steps of a tiny MoWE model; `python -m tests.golden_curve` stores their losses.

Everything that decides a loss takes part: data to inputs, both routers, accumulation over two
micro-batches, the routing loss, warm-up, AdamW with decay, clipping.
"""

import json
from pathlib import Path

import numpy as np
import torch

from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.model.building import WeakEncoder, build_model, build_processor, parameter_parts
from mowe_ray.training.collate import collate
from mowe_ray.training.loop import training_steps
from mowe_ray.training.optimizer import learning_rate_factor, parameter_groups
from tests.plain_engine import PlainEngine
from tests.tiny_models import tiny_hubert_config, tiny_language_model_config, tiny_tokenizer, tiny_whisper_config

GOLDEN = Path(__file__).with_name("golden_losses.json")


def golden_curve() -> list[float]:
    """Return the loss of every step."""
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer(chat_template=False)
    model = build_model(
        base_encoder=tiny_whisper_config(),
        weak_encoders=[
            WeakEncoder("whisper", tiny_whisper_config(d_model=16), train="full"),
            WeakEncoder("hubert", tiny_hubert_config(), train="full", features="weighted_sum"),
        ],
        language_model=tiny_language_model_config("llama"),
        tokenizer=tokenizer,
        train_base="full",
    )
    processor = build_processor(model, tokenizer)
    groups = parameter_groups(model, parameter_parts(model), 1e-2, {"routers": 1e-1}, 0.01)
    batches = [collate(_tones(lane), processor) for lane in range(2)]
    # Six steps, two of them warm-up: steps of one size decay by their number.
    planned = [(n + 1, learning_rate_factor(n, 2, max(0, n - 2) / 4, "cosine"), batches) for n in range(6)]
    steps = training_steps(PlainEngine(model, groups, clip_norm=1.0), planned, seed=0)
    return [step.loss for step in steps]


def _tones(lane: int) -> MicroBatch:
    time = np.arange(8000) / 16_000
    clips = [(3e4 * np.sin(2 * np.pi * hertz * (1 + lane) * time)).astype(np.int16) for hertz in (200, 700)]
    return MicroBatch(
        audio=np.concatenate(clips),
        lengths=[8000, 8000],
        scales=[1 / 32768] * 2,
        ids=["low", "high"],
        instructions=["What is it?"] * 2,
        answers=["low", "high"],
        references=[["low"], ["high"]],
        tasks=["aqa"] * 2,
        sources=["made"] * 2,
        bad=[],
    )


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden_curve(), indent=1) + "\n", encoding="utf-8")
