"""`model.gradient_checkpointing`: the parts it names recompute, and neither loss nor gradient notices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mowe_ray.config.model_section import ModelSection
from mowe_ray.config.training_section import MoweLossSection
from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.training.build import assemble
from mowe_ray.training.collate import collate
from tests.tiny_models import tiny_hubert_config, tiny_language_model_config, tiny_tokenizer, tiny_whisper_config

PARTS = ("base_encoder", "weak_encoders", "language_model")

# A module of the first layer of each part. Not the layer: its own hooks stay outside of what is recomputed.
INNER = {
    "base_encoder": "audio_tower.base_encoder.model.layers.0.self_attn",
    "weak_encoders": "audio_tower.pool.members.1.encoder.model.encoder.layers.0.attention",
    "language_model": "language_model.model.layers.0.self_attn",
}


Built = tuple[MoweForConditionalGeneration, dict[str, Any]]


@pytest.fixture(scope="module")
def build(make_micro_batch: Callable[..., MicroBatch]) -> Callable[..., Built]:
    """Build a model whose parts all train, and its inputs of one micro-batch."""
    batch = make_micro_batch([1.0, 0.6, 0, 0.8])

    def make(parts: tuple[str, ...], dropout: float, *, lora: bool) -> Built:
        model, processor = trainable(parts, dropout, lora=lora)
        return model.train(), collate(batch, processor).inputs

    return make


def trainable(
    parts: tuple[str, ...], dropout: float, *, lora: bool
) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """Assemble a model whose parts all train."""
    quiet = {f"{name}_dropout": dropout for name in ("hidden", "attention", "activation", "feat_proj")}
    whisper = {"dropout": dropout, "attention_dropout": dropout, "activation_dropout": dropout}
    train = "lora" if lora else "full"
    section = ModelSection.model_validate(
        {
            "base_encoder": {"config": tiny_whisper_config(**whisper)},
            "weak_encoders": [
                {"name": "w", "checkpoint": {"config": tiny_whisper_config(d_model=16, **whisper)}, "train": train},
                {"name": "h", "checkpoint": {"config": tiny_hubert_config(**quiet)}, "train": train},
            ],
            "router": {"top_k": 2, "noise": 0.5},
            "language_model": {
                "config": tiny_language_model_config("llama", attention_dropout=dropout, intermediate_size=512)
            },
            "lora": {"r": 4, "dropout": dropout},
            "train_base": train,
            "gradient_checkpointing": parts,
        }
        | ({} if lora else {"lora": None})
    )
    loss = MoweLossSection(kind="entropy_diversity", weight=0.3)
    return assemble(section, loss, seed=1, tokenizer=tiny_tokenizer(chat_template=False), gpu=False)


def trained_once(model: MoweForConditionalGeneration, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the losses, the logits and all gradients of one step."""
    torch.manual_seed(7)
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss, "logits": output.logits, "L_MoWE": output.routing_loss, **gradients}


def calls(module: nn.Module) -> list[None]:
    """Return a list that grows with every call of `module`."""
    made: list[None] = []
    module.register_forward_hook(lambda *_: made.append(None))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("parts", [*((part,) for part in PARTS), PARTS], ids=lambda parts: "+".join(parts))
def test_only_the_named_parts_recompute_and_nothing_changes(
    build: Callable[..., Built], parts: tuple[str, ...], dropout: float, lora: bool
) -> None:
    model, inputs = build((), dropout, lora=lora)
    expected = trained_once(model, inputs)
    model, inputs = build(parts, dropout, lora=lora)
    made = {part: calls(model.get_submodule(path)) for part, path in INNER.items()}
    found = trained_once(model, inputs)
    assert {part: len(times) for part, times in made.items()} == {part: 1 + (part in parts) for part in PARTS}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_dropout_and_noise_are_drawn(build: Callable[..., Built]) -> None:
    """So that equal outcomes above are due to the same draws, not to the lack of any."""
    model, inputs = build((), 0.2, lora=False)
    torch.manual_seed(8)
    other = model(**inputs)
    assert not torch.equal(other.loss, trained_once(model, inputs)["loss"])


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `run`, weights left out."""
    kept = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.slow
def test_each_part_saves_memory(build: Callable[..., Built]) -> None:
    def kept(*parts: str) -> int:
        model, inputs = build(parts, 0.1, lora=True)
        torch.manual_seed(7)
        return saved_bytes(lambda: model(**inputs), model)

    plain = kept()
    savings = {part: plain - kept(part) for part in PARTS}
    assert all(saving > 0.05 * plain for saving in savings.values()), (plain, savings)
    assert plain - kept(*PARTS) == pytest.approx(sum(savings.values()), rel=0.02)
