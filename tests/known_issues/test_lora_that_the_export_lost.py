"""Every adapter that trains is in the export, or is refused before training.

Transposed or lost on GPT-2's Conv1D (huggingface/peft#3531), dropped from embeddings and overwritten on tied heads
(huggingface/peft#2018, huggingface/transformers#45127), an assertion at the end for experts (unslothai/unsloth-zoo#647,
modelscope/ms-swift#6447).
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from mowe_ray.config.model_section import ModelSection
from mowe_ray.model import MoweForConditionalGeneration
from mowe_ray.model.building import Lora, build_model, build_processor
from mowe_ray.model.export import export
from tests.tiny_models import tiny_language_model_config, tiny_tokenizer, tiny_whisper_config

GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2 with square layers": {**GPT2, "n_inner": 32},
    "mixtral": tiny_language_model_config("mixtral", num_local_experts=2),
    "qwen3_moe": tiny_language_model_config("qwen3_moe", num_experts=4, moe_intermediate_size=16, **EXPERTS),
    "phi3": tiny_language_model_config("phi3"),
    "llama": tiny_language_model_config("llama"),
    "gemma3_text": tiny_language_model_config("gemma3_text", tie_word_embeddings=False),
}
CASES = [
    *((name, "all-linear") for name in MODELS),
    ("gpt2 with square layers", ("mlp.c_fc", "mlp.c_proj")),
    ("llama", ("embed_tokens", "lm_head")),
    ("gemma3_text", ("embed_tokens", "q_proj")),
    ("mixtral", ("q_proj", "w1", "w2", "w3")),
    ("qwen3_moe", ("gate_proj", "up_proj", "down_proj")),
    ("qwen3_moe", ("gate", "q_proj")),
]


def build(
    language_model: dict[str, Any], target_modules: str | tuple[str, ...], dtype: torch.dtype = torch.float32
) -> MoweForConditionalGeneration:
    return build_model(
        base_encoder=tiny_whisper_config(),
        language_model=language_model,
        tokenizer=tiny_tokenizer(chat_template=False),
        lora=Lora(4, 8, 0.0, target_modules),
        dtype=dtype,
    )


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 60)[None]}


def trained(model: MoweForConditionalGeneration) -> MoweForConditionalGeneration:
    """Three steps; B starts as zeros, so nothing shows before the first."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model.train()
    for _ in range(3):
        model(**inputs(), labels=inputs()["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def exported(model: MoweForConditionalGeneration, folder: Path, **options: bool) -> MoweForConditionalGeneration:
    export(model, build_processor(model, tiny_tokenizer(chat_template=False)), folder, **options)
    loaded: MoweForConditionalGeneration = AutoModel.from_pretrained(folder).eval()
    return loaded


@torch.no_grad()
def logits(model: MoweForConditionalGeneration) -> torch.Tensor:
    found: torch.Tensor = model(**inputs()).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "apart"])
@pytest.mark.parametrize(("name", "target_modules"), CASES)
def test_the_export_computes_what_the_trained_model_does(
    name: str, target_modules: str | tuple[str, ...], merge: bool, tmp_path: Path
) -> None:
    model = build(MODELS[name], target_modules)
    before = logits(model.eval())
    trained(model)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    loaded = exported(model, tmp_path, merge=merge)
    assert (logits(model) - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded), logits(model), atol=2e-6, rtol=1e-5)
    assert any(".lora_" in name for name in loaded.state_dict()) is not merge
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_tied_embeddings_is_refused_before_training(target: str) -> None:
    tied = tiny_language_model_config("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=rf"model\.lora\.target_modules: .*{target} shares its weight"):
        build(tied, ("q_proj", target))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target_modules"), [("llama", ("no_such",)), ("llama", ("self_attn",)), ("qwen3_moe", ("gate_proj",))]
)
def test_what_peft_cannot_adapt_is_refused_with_the_key(name: str, target_modules: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape("model.lora.target_modules")):
        build(MODELS[name], target_modules)


@pytest.mark.slow
def test_apart_a_small_bfloat16_update_stays_exact(tmp_path: Path) -> None:
    """An update of 1 / 300 of a weight is below what bfloat16 can add to it."""
    model = build(MODELS["llama"], "all-linear", torch.bfloat16).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-4)
    apart, merged = exported(model, tmp_path / "apart", merge=False), exported(model, tmp_path / "merged")
    assert torch.equal(logits(apart), logits(model))
    assert not torch.equal(logits(merged), logits(model))


@pytest.mark.slow
def test_a_merge_rounds_once(tmp_path: Path) -> None:
    model = trained(build(MODELS["llama"], ("q_proj",), torch.bfloat16))
    loaded = exported(model, tmp_path)
    layer = model.language_model.model.layers[0].self_attn.q_proj
    down, up = (getattr(layer, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    wanted = layer.base_layer.weight.double() + 8 / 4 * up @ down
    found = loaded.language_model.model.layers[0].self_attn.q_proj.weight
    # But for a sum that float32's own rounding moves over the middle between two numbers of bfloat16.
    assert (found == wanted.to(torch.bfloat16)).float().mean() > 0.999


_ELSEWHERE = """
import sys
sys.modules["mowe_ray"] = None  # as where it is not installed: importing it fails
import torch
from transformers import AutoModel
folder, out = sys.argv[1:]
# Trusted because this test has just written the code in the folder; that it runs is what is tested.
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 60)[None]).logits, out)
"""


@pytest.mark.slow
def test_apart_the_export_needs_transformers_and_peft_alone(tmp_path: Path) -> None:
    model = trained(build(MODELS["llama"], "all-linear"))
    exported(model, tmp_path / "export", merge=False)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "export"), str(tmp_path / "logits.pt")]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model), atol=1e-5, rtol=1e-5)


def test_the_config_says_whether_adapters_are_merged() -> None:
    values = {"base_encoder": {"config": tiny_whisper_config()}, "language_model": {"config": MODELS["llama"]}}
    assert ModelSection(**values).merges_lora
    assert ModelSection(**values, lora=None).merges_lora
    assert not ModelSection(**values, lora={"merge": False}).merges_lora
