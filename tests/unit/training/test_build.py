import io
from pathlib import Path
from typing import Any

import pytest
import torch

from mowe_ray.config.model_section import ModelSection
from mowe_ray.config.training_section import MoweLossSection, TrainingSection
from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.model.export import export
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.build import assemble, model_dtype, optimizer_groups, own_tokenizer, tokenizer_of
from mowe_ray.training.estimate import estimate
from tests.tiny_models import save_language_model, tiny_hubert_config, tiny_language_model_config, tiny_whisper_config
from tests.unit.training.test_datasets import write


def section(**changes: Any) -> ModelSection:
    values: dict[str, Any] = {
        "base_encoder": {"config": tiny_whisper_config()},
        "weak_encoders": [
            {"name": "w", "checkpoint": {"config": tiny_whisper_config(d_model=16)}, "train": "full"},
            {"name": "h", "checkpoint": {"config": tiny_hubert_config()}, "features": "weighted_sum"},
        ],
        "language_model": {"config": tiny_language_model_config("llama")},
        "lora": None,
    }
    return ModelSection(**values | changes)


def build(model: ModelSection, tokenizer, **loss: Any):
    return assemble(model, MoweLossSection(**loss), seed=1, tokenizer=tokenizer, gpu=False)


def test_every_option_reaches_the_model(tokenizer):
    model, processor = build(
        section(
            router={"top_k": 2, "data_independent": False, "temperature": 2.0, "noise": 0.5, "execution": "dense"},
            adapter={"kind": "stack_mlp", "downsample": 4},
            pad_audio="full30",
            spec_augment={"mask_prob": 0.1, "mask_length": 7},
            train_base="lora",
            lora={"r": 4, "alpha": 8, "target_modules": ["q_proj"]},
            gradient_checkpointing=["language_model"],
        ),
        tokenizer,
        kind="load_balance",
        weight=0.3,
        z_weight=0.2,
    )
    config = model.config
    assert (config.router_top_k, config.router_temperature, config.router_noise) == (2, 2.0, 0.5)
    assert (config.router_data_independent, config.router_data_dependent) == (False, True)
    assert (config.router_execution, config.adapter, config.downsample) == ("dense", "stack_mlp", 4)
    assert (config.pad_audio, config.spec_augment) == ("full30", {"mask_prob": 0.1, "mask_length": 7})
    assert (config.mowe_loss, config.mowe_loss_weight, config.mowe_z_weight) == ("load_balance", 0.3, 0.2)
    assert config.base_encoder.train == "lora"
    assert [(spec.name, spec.train, spec.features) for spec in config.weak_encoders] == [
        ("w", "full", "last"),
        ("h", "frozen", "weighted_sum"),
    ]
    assert config.lora["language_model"] == {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj"]}
    assert processor.downsample == 4
    assert model.language_model.is_activation_checkpointing
    assert not model.audio_tower.base_encoder.model.is_activation_checkpointing


@pytest.mark.parametrize("fusion", ["concat", "average"])
def test_dense_baselines_and_no_pool(tokenizer, fusion):
    assert build(section(fusion=fusion), tokenizer)[0].audio_tower.dependent_router is None
    assert build(section(weak_encoders=[]), tokenizer)[0].audio_tower.pool is None


def test_number_formats():
    assert model_dtype(section(), gpu=False) == torch.float32
    assert model_dtype(section(), gpu=True) == torch.bfloat16
    assert model_dtype(section(dtype="bfloat16"), gpu=False) == torch.bfloat16
    assert model_dtype(section(dtype="float32"), gpu=True) == torch.float32


def test_learning_rates_go_to_their_parts(tokenizer):
    model, _ = build(section(), tokenizer)
    training = TrainingSection(max_steps=1, learning_rate=1e-3, lr_per_part={"routers": 1e-2, "scalars": 0.1})
    rates = {group["part"]: group["peak_lr"] for group in optimizer_groups(model, training)}
    others = dict.fromkeys(("weak_encoders", "adapter", "language_model"), 1e-3)
    assert rates == {"routers": 1e-2, "scalars": 0.1, **others}
    training = TrainingSection(max_steps=1, learning_rate=1e-3, lr_per_part={"routers": 1e-2})
    rates = {group["part"]: group["peak_lr"] for group in optimizer_groups(model, training)}
    assert rates == {"routers": 1e-2, **others}


@pytest.mark.slow
def test_training_goes_on_from_an_export(tokenizer, tmp_path):
    first, processor = build(section(lora={"r": 2}), tokenizer)
    export(first, processor, tmp_path / "export")
    again = section(
        init_from=str(tmp_path / "export"), weak_encoders=[{"name": "h", "checkpoint": "unused", "train": "full"}]
    )
    second, _ = build(again, tokenizer_of(again, None), kind="none")
    assert second.config.mowe_loss == "none"
    assert [spec.train for spec in second.config.weak_encoders] == ["frozen", "full"]
    weights = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name]), name
    assert estimate(again).total.trainable == sum(p.numel() for p in second.parameters() if p.requires_grad)


def test_a_random_language_model_gets_a_tokenizer_of_the_training_texts(tmp_path: Path):
    spec = SourceSpec("made", write(tmp_path, "made", [0.5] * 4))
    index = build_index([spec], tmp_path / "cache", min_s=0.1, max_s=30.0)
    folder = RunFolder(str(tmp_path), "run")
    own = own_tokenizer(section(), index, folder)
    assert own == folder.read_text("tokenizer.json")
    tokenizer = tokenizer_of(section(), own)
    assert len(tokenizer) <= 320, "the configured vocab_size"
    text = "What is 3? answer 3, ünï"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("answer")["input_ids"]) < len("answer"), "it has learned merges"
    folder.write_text("tokenizer.json", own + " ")
    assert own_tokenizer(section(), index, folder) == own + " ", "a resumed run keeps its tokenizer"


def test_a_checkpoint_brings_its_own_tokenizer(tmp_path):
    save_language_model(tmp_path / "llm", "llama")
    model = section(language_model=str(tmp_path / "llm"))
    assert own_tokenizer(model, None, RunFolder(str(tmp_path), "run")) is None
    assert tokenizer_of(model, None).chat_template


def test_assembling_is_seeded(tokenizer):
    def bits(seed: int) -> bytes:
        model, _ = assemble(section(), MoweLossSection(), seed=seed, tokenizer=tokenizer, gpu=False)
        out = io.BytesIO()
        torch.save([p.sum() for p in model.parameters()], out)
        return out.getvalue()

    assert bits(1) == bits(1) != bits(2)
