"""What would make a finished run end without a right export is found before its first step.

Report: unslothai/unsloth#1122 (merged exports that lacked weights).
"""

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.building import Lora, WeakEncoder, build_model, build_processor
from mowe_ray.model.export_check import try_export
from tests.tiny_models import (
    LANGUAGE_MODEL_FAMILIES,
    tiny_ast_config,
    tiny_hubert_config,
    tiny_language_model_config,
    tiny_tokenizer,
    tiny_whisper_config,
)


class UnsavedLlamaConfig(LlamaConfig):
    model_type = "unsaved_llama"


class UnsavedLlama(LlamaForCausalLM):
    """Its logits are scaled by a random number that no checkpoint holds."""

    config_class = UnsavedLlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.register_buffer("unsaved", 1 + torch.rand(1), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.unsaved
        return output


AutoConfig.register("unsaved_llama", UnsavedLlamaConfig)
AutoModelForCausalLM.register(UnsavedLlamaConfig, UnsavedLlama)

GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
MODELS = {
    **{family: tiny_language_model_config(family) for family in LANGUAGE_MODEL_FAMILIES},
    "gpt2": GPT2,
    "mixtral": tiny_language_model_config("mixtral", num_local_experts=2),
}


def build(language_model: dict[str, Any], **changes: Any) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    tokenizer = tiny_tokenizer(chat_template=True)
    arguments: dict[str, Any] = {
        "base_encoder": tiny_whisper_config(),
        "weak_encoders": [
            WeakEncoder("hubert", tiny_hubert_config(), "lora", "weighted_sum"),
            WeakEncoder("ast", tiny_ast_config(), "frozen", "layer:2"),
        ],
        "tokenizer": tokenizer,
        "lora": Lora(r=2),
    }
    model = build_model(language_model=language_model, **arguments | changes)
    return model, build_processor(model, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "apart"])
@pytest.mark.parametrize("name", MODELS)
def test_a_right_export_is_tried_and_leaves_nothing_behind(name: str, merge: bool) -> None:
    model, processor = build(MODELS[name])
    weights, generator = {key: w.clone() for key, w in model.state_dict().items()}, torch.get_rng_state()
    assert try_export(model, processor, merge=merge) is None
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())


@pytest.mark.slow
def test_logits_that_do_not_come_back_are_refused() -> None:
    model, processor = build(tiny_language_model_config("unsaved_llama"))
    with pytest.raises(ValueError, match="would compute other logits"):
        try_export(model, processor, merge=True)


@pytest.mark.slow
def test_a_processor_of_another_model_is_refused() -> None:
    model, processor = build(MODELS["llama"], downsample=4)
    other = MoweProcessor(processor.tokenizer, [(400, 160, 0)], 1)
    with pytest.raises(ValueError, match="could not be exported after training: input_ids holds"):
        try_export(model, other, merge=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", LANGUAGE_MODEL_FAMILIES)
def test_of_a_large_model_one_layer_of_each_part_is_tried(family: str) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24}
    with torch.device("meta"):
        model, processor = build(tiny_language_model_config(family, **sizes))
    assert sum(math.prod(p.shape) for p in model.parameters()) > 5e7
    assert try_export(model, processor, merge=True) is None


@pytest.mark.slow
def test_what_has_no_short_copy_is_not_tried_and_says_why() -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24}
    with torch.device("meta"):
        model, processor = build(
            tiny_language_model_config("llama", **sizes), lora=Lora(r=2, target_modules=r".*layers\.2\d\..*q_proj")
        )
    untried = try_export(model, processor, merge=True)
    assert untried is not None
    assert "no copy of one layer" in untried
