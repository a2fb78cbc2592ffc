"""A language model's generation_config.json that may not be saved, or makes "greedy" something else.

Vicuna, Llama-2 and Qwen3-ASR ship temperature and top_p without do_sample: a finished training ended without an export
(huggingface/transformers#29988, QwenLM/Qwen3-ASR#210, haotian-liu/LLaVA#1252, hiyouga/LlamaFactory#2767).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from mowe_ray.evaluation.generation import generate_texts
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.building import build_model, build_processor, load_model
from mowe_ray.model.export import export
from tests.tiny_models import save_language_model, tiny_whisper_config

SHIPPED: dict[str, dict[str, Any]] = {
    "sampling without do_sample": {"temperature": 0.6, "top_p": 0.9},
    "beams' setting without beams": {"early_stopping": True, "length_penalty": 0.5},
    "sampling": {"do_sample": True, "temperature": 0.1, "top_k": 3},
    "no repeated words": {"no_repeat_ngram_size": 1},
    "penalties": {"repetition_penalty": 5.0, "encoder_repetition_penalty": 2.0},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "limits": {"min_new_tokens": 7, "forced_eos_token_id": 5, "max_length": 9},
}


def loaded(folder: Path, settings: dict[str, Any]) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """A model whose answers repeat a token, as tied random weights do."""
    save_language_model(folder, "llama", tie_word_embeddings=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **settings}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = build_model(base_encoder=tiny_whisper_config(), language_model=str(folder), tokenizer=tokenizer)
    return model.eval(), build_processor(model, tokenizer)


@torch.no_grad()
def most_likely(model: MoweForConditionalGeneration, input_ids: torch.Tensor, count: int) -> list[int]:
    """Append the most likely token again and again, without `generate`."""
    start = input_ids.shape[1]
    for _ in range(count):
        scores = model(input_ids=input_ids).logits[:, -1]
        scores[:, model.config.audio_token_id] = -torch.inf
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], 1)
        if input_ids[0, -1] == 1:
            break
    return input_ids[0, start:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_export_is_written_and_answers_are_the_most_likely_tokens(name: str, tmp_path: Path) -> None:
    model, processor = loaded(tmp_path / "llm", SHIPPED[name])
    inputs = dict(processor(["What is it?"], [[]]))
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    wanted = most_likely(model, inputs["input_ids"], 12)
    text = processor.batch_decode([wanted], skip_special_tokens=True)[0].strip()
    assert len(set(wanted)) < len(wanted), "nothing repeats, so no penalty would show"
    assert generate_texts(model, processor, prompts, None, max_new_tokens=12) == [text]
    export(model, processor, tmp_path / "export")
    exported = AutoModel.from_pretrained(tmp_path / "export").eval()
    written = [*inputs["input_ids"][0].tolist(), *wanted]
    assert exported.generate(**prompts, max_new_tokens=12)[0].tolist() == written
    again = load_model(str(tmp_path / "export")).eval()
    assert again.generate(**prompts, max_new_tokens=12)[0].tolist() == written


@pytest.mark.slow
def test_an_old_export_with_such_settings_is_evaluated_greedily(tmp_path: Path) -> None:
    model, processor = loaded(tmp_path / "llm", {})
    export(model, processor, tmp_path / "export")
    file = tmp_path / "export" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"no_repeat_ngram_size": 1, "repetition_penalty": 5.0}))
    inputs = dict(processor(["What is it?"], [[]]))
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    old = AutoModel.from_pretrained(tmp_path / "export").eval()
    wanted = processor.batch_decode([most_likely(model, inputs["input_ids"], 12)], skip_special_tokens=True)[0].strip()
    assert generate_texts(old, processor, prompts, None, max_new_tokens=12) == [wanted]
    export(load_model(str(tmp_path / "export")), processor, tmp_path / "second")
    assert "repetition_penalty" not in json.loads((tmp_path / "second" / "generation_config.json").read_text())
