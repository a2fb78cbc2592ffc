"""Checkpoint folders as the hub has them: every family loads through the configuration and trains."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor

from mowe_ray.config import RunConfig, load_config
from mowe_ray.model.building import parameter_parts, untouched_parameters
from mowe_ray.train import main
from mowe_ray.training.build import assemble, optimizer_groups, tokenizer_of
from tests.end_to_end import tone, trained_model, write_tones
from tests.tiny_models import (
    ENCODER_CONFIGS,
    LANGUAGE_MODEL_FAMILIES,
    save_encoder_checkpoint,
    save_language_model,
)

# The families the issue names, in the order of their adapters.
ENCODERS = ("whisper", "hubert", "wav2vec2", "wavlm", "audio-spectrogram-transformer")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder of `save_pretrained` by family; language models also by FAMILY-plain, without a chat template."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in ENCODERS:
        save_encoder_checkpoint(root / family, ENCODER_CONFIGS[family]())
    for family in LANGUAGE_MODEL_FAMILIES:
        save_language_model(root / family, family, chat_template=True)
        save_language_model(root / f"{family}-plain", family, chat_template=False)
    return root


def _overrides(base, weak, language_model, *, train="frozen", lora="{r: 4}"):
    members = [
        f"{{name: m{i}-{folder.name}, checkpoint: {folder}, train: {train}, features: {features}}}"
        for i, (folder, features) in enumerate(weak)
    ]
    return [
        f"model.base_encoder={base}",
        f"model.train_base={train}",
        f"model.weak_encoders=[{', '.join(members)}]",
        f"model.language_model={language_model}",
        f"model.lora={lora}",
        "model.spec_augment=null",
        "compute.num_workers=1",
        "compute.gpus_per_worker=0",
        "training.max_steps=4",
        "training.epochs=null",
    ]


def _assembled(config: RunConfig):
    tokenizer = tokenizer_of(config.model, None)
    return assemble(config.model, config.training.mowe_loss, seed=0, tokenizer=tokenizer, gpu=False)


def _inputs(processor):
    clips = [[tone(220, 1.0)], [tone(330, 0.6)], [tone(440, 1.3)], [tone(550, 0.5)]]
    features = processor(instructions=["Is the tone high?"] * 4, audio=clips, answers=["yes", "no", "high", "low"])
    return {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}


def _train_once(model, processor, config):
    """One optimizer step; the trainable tensors without a gradient, and those that stayed the same."""
    model.train()
    optimizer = torch.optim.AdamW(optimizer_groups(model, config.training), lr=1e-2)
    inputs = _inputs(processor)
    model(**inputs).loss.backward()
    untouched = untouched_parameters(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # A LoRA factor B starts at zero, so only the second step has a gradient for its A.
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
    assert torch.isfinite(loss)
    return untouched, {name for name, p in model.named_parameters() if torch.equal(p, before[name])}


@pytest.mark.parametrize("train", ["frozen", "lora", "full"])
@pytest.mark.parametrize("family", ENCODERS)
def test_every_encoder_family_loads_from_its_folder_and_trains(checkpoints, family, train):
    config = load_config(
        "quickstart",
        _overrides(
            checkpoints / family,
            [(checkpoints / family, "weighted_sum"), (checkpoints / "whisper", "last")],
            checkpoints / "llama",
            train=train,
        ),
    )
    model, processor = _assembled(config)

    untouched, unchanged = _train_once(model, processor, config)

    assert untouched == []
    parts = parameter_parts(model)
    trainable = {parts[name] for name, p in model.named_parameters() if p.requires_grad}
    encoders = {"base_encoder", "weak_encoders"}
    assert trainable & encoders == (set() if train == "frozen" else encoders)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen <= unchanged
    assert not any(name in unchanged for name in parts if parts[name] in encoders and name not in frozen)


@pytest.mark.parametrize("template", ["", "-plain"])
@pytest.mark.parametrize("family", LANGUAGE_MODEL_FAMILIES)
def test_every_language_model_loads_from_its_folder_and_trains_with_lora(checkpoints, family, template):
    llm = checkpoints / f"{family}{template}"
    config = load_config(
        "quickstart", _overrides(checkpoints / "whisper", [(checkpoints / "hubert", "layer:1")], llm, train="full")
    )
    model, processor = _assembled(config)

    untouched, _ = _train_once(model, processor, config)

    assert untouched == []
    language_model = {n: p for n, p in model.named_parameters() if n.startswith("language_model.")}
    assert all(p.requires_grad == ("lora_" in name) for name, p in language_model.items())
    prompt = processor(instructions=["Is the tone high?"], audio=[[tone(220, 1.0)]])
    text = processor.tokenizer.decode([t for t in prompt["input_ids"][0] if t != processor.audio_token_id])
    assert ("<|assistant|>" in text) == (template == "")


@pytest.mark.parametrize("family", [*ENCODERS, *LANGUAGE_MODEL_FAMILIES])
def test_the_folders_are_sharded_as_large_checkpoints_are(checkpoints, family):
    folder = checkpoints / family
    shards = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 1
    assert {path.name for path in folder.glob("*.safetensors")} == shards


def test_the_weights_are_those_of_the_folder(checkpoints):
    config = load_config(
        "quickstart", _overrides(checkpoints / "hubert", [(checkpoints / "wavlm", "last")], checkpoints / "qwen2")
    )
    model, _ = _assembled(config)
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    for family, stored, loaded in (
        ("hubert", "hubert.", "audio_tower.base_encoder.model."),
        ("wavlm", "wavlm.", "audio_tower.pool.members.0.encoder.model."),
        ("qwen2", "model.", "language_model.model."),
    ):
        compared = 0
        for shard in (checkpoints / family).glob("*.safetensors"):
            with safe_open(shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if name.startswith(stored) and (ours := loaded + name.removeprefix(stored)) in weights:
                        torch.testing.assert_close(weights[ours], file.get_tensor(name), rtol=0, atol=0)
                        compared += 1
        assert compared > 10, family


@pytest.mark.slow
def test_a_run_from_folders_with_lora_exports_a_model_that_loads(checkpoints, ray_cluster, tmp_path, capsys):
    """Base LoRA, one frozen member, one member with learned layer weights, LoRA on a language model with a template."""
    members = [
        f"{{name: hubert, checkpoint: {checkpoints / 'hubert'}, features: weighted_sum, train: lora}}",
        f"{{name: ast, checkpoint: {checkpoints / 'audio-spectrogram-transformer'}}}",
    ]
    tones = write_tones(tmp_path / "validation", 8, first=24)
    code = main(
        [
            *_overrides(checkpoints / "whisper", [], checkpoints / "phi3", train="lora"),
            f"model.weak_encoders=[{', '.join(members)}]",
            "name=folders",
            f"storage={tmp_path}",
            f"data.train=[{{path: {write_tones(tmp_path / 'train', 24)}}}]",
            f"data.validation=[{{path: {tones}, name: one}}, {{path: {tones}, name: two}}]",
            "training.learning_rate=1e-2",
        ]
    )

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert set(result["tasks"]) == {"aqa", "ac"}
    assert result["sources"]["one"] == result["sources"]["two"]
    model = AutoModel.from_pretrained(result["export"])
    processor = AutoProcessor.from_pretrained(result["export"])
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    features = processor(instructions=["Is it high?"], audio=[[tone(500, 1.0)]])
    trained, _ = trained_model(Path(result["run"]))
    with torch.no_grad():
        torch.testing.assert_close(model(**features).logits, trained(**features).logits, atol=1e-4, rtol=1e-4)
    answer = model.generate(**features, max_new_tokens=4, do_sample=False)
    assert processor.batch_decode(answer)
