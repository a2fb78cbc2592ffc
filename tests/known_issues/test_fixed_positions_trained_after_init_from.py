"""Whisper's sinusoidal positions are fixed; a model trained further from an export trained them.

Report: huggingface/transformers#25989.
"""

from pathlib import Path

import pytest
import torch

from mowe_ray.model.building import Lora, WeakEncoder, build_model, build_processor, load_model
from mowe_ray.model.export import export
from tests.tiny_models import tiny_hubert_config, tiny_language_model_config, tiny_tokenizer, tiny_whisper_config


@pytest.mark.slow
def test_the_same_tensors_train_as_in_the_first_run(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    for lora in (None, Lora(r=2)):
        model = build_model(
            base_encoder=tiny_whisper_config(),
            weak_encoders=[
                WeakEncoder("whisper", tiny_whisper_config(d_model=16), "full"),
                WeakEncoder("hubert", tiny_hubert_config(), "frozen"),
            ],
            language_model=tiny_language_model_config("llama"),
            tokenizer=tokenizer,
            train_base="full",
            lora=lora,
        )
        export(model, build_processor(model, tokenizer), tmp_path)
        again = load_model(str(tmp_path), train_base="full", train_weak={"whisper": "full"}, lora=lora)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name, p in again.named_parameters() if p.requires_grad} == trainable
        assert not any("embed_positions" in name for name in trainable)
        for name, p in model.named_parameters():
            if "embed_positions" in name:
                assert torch.equal(again.get_parameter(name), p)
