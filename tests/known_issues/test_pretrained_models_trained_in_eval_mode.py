"""transformers' from_pretrained leaves a model in eval mode; it was trained so until the first validation had passed.

Without training mode a pool enters no idle encoders (decision 2), a language model recomputes no activations, and
dropout is off; a resumed run differed from an undisturbed one. Report: huggingface/trl#1066.
"""

from pathlib import Path

import pytest

from mowe_ray.config.model_section import ModelSection
from mowe_ray.config.training_section import MoweLossSection
from mowe_ray.model.export import export
from mowe_ray.training.build import assemble
from tests.tiny_models import save_language_model, tiny_language_model_config, tiny_tokenizer, tiny_whisper_config


def build(tokenizer, **changes):
    values = {
        "base_encoder": {"config": tiny_whisper_config()},
        "weak_encoders": [
            {"name": name, "checkpoint": {"config": tiny_whisper_config(d_model=16)}, "train": train}
            for name, train in (("trained", "full"), ("frozen", "frozen"))
        ],
        "language_model": {"config": tiny_language_model_config("llama")},
        "lora": None,
    }
    section = ModelSection(**values | changes)
    return assemble(section, MoweLossSection(), seed=0, tokenizer=tokenizer, gpu=False)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["random", "folder", "export"])
def test_every_part_but_the_frozen_encoders_is_in_training_mode(source: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    changes = {}
    if source == "folder":
        save_language_model(tmp_path / "llm", "llama")
        changes = {"language_model": str(tmp_path / "llm")}
    elif source == "export":
        export(*build(tokenizer), tmp_path / "export")
        changes = {"init_from": str(tmp_path / "export")}
    model, _ = build(tokenizer, **changes)
    tower = model.audio_tower
    assert model.training
    assert tower.pool.training
    assert all(module.training for module in model.language_model.modules())
    trained, frozen = tower.encoders()[1:]
    assert trained.training
    assert not frozen.training
    assert not any(module.training for module in frozen.modules())
