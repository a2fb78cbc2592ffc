"""A model in two parts, a plain language model and what makes its prompts, is the whole model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from mowe_ray.model import MoweFront
from mowe_ray.model.building import Lora, WeakEncoder, build_model, build_processor
from mowe_ray.model.export import export_split
from tests.tiny_models import (
    LANGUAGE_MODEL_FAMILIES,
    tiny_hubert_config,
    tiny_language_model_config,
    tiny_tokenizer,
    tiny_whisper_config,
)
from tests.unit.model.conftest import waves


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, Lora(r=2, target_modules="all-linear")], ids=["plain", "lora"])
@pytest.mark.parametrize("family", LANGUAGE_MODEL_FAMILIES)
def test_both_parts_give_the_logits_and_tokens_of_the_whole(family: str, lora: Lora | None, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=True)
    model = build_model(
        base_encoder=tiny_whisper_config(),
        weak_encoders=[WeakEncoder("a", tiny_hubert_config()), WeakEncoder("b", tiny_whisper_config())],
        language_model=tiny_language_model_config(family),
        tokenizer=tokenizer,
        lora=lora,
    ).eval()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # they begin as zeros
            torch.nn.init.normal_(parameter, std=0.05)
    processor = build_processor(model, tokenizer)
    inputs = processor(["What?", "Why is it so?"], [waves(0.5), waves(1.2)])
    with torch.no_grad():
        wanted = model(**inputs).logits
    written = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    export_split(model, processor, tmp_path)
    front = AutoModel.from_pretrained(tmp_path / "front").eval()
    assert isinstance(front, MoweFront)
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    assert llm.config.model_type == family
    again = AutoProcessor.from_pretrained(tmp_path / "front")(["What?", "Why is it so?"], [waves(0.5), waves(1.2)])
    embeds = front(**again)
    with torch.no_grad():
        logits = llm(inputs_embeds=embeds, attention_mask=again["attention_mask"]).logits
    real = again["attention_mask"].bool()
    torch.testing.assert_close(logits[real], wanted[real], atol=1e-5, rtol=0)
    new = llm.generate(inputs_embeds=embeds, attention_mask=again["attention_mask"], max_new_tokens=6)
    assert torch.equal(new, written)
    assert AutoTokenizer.from_pretrained(tmp_path / "llm").get_vocab().items() >= tokenizer.get_vocab().items()
