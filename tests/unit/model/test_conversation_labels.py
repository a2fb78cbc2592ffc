"""What is learned of a conversation: every answer and its end as the chat template writes it, and nothing else."""

from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from mowe_ray.data.sample import CLIP as CLIP_IN_DATA
from mowe_ray.data.sample import Turn
from mowe_ray.model import MoweProcessor
from mowe_ray.model.processing_mowe import CLIP
from tests.tiny_models import tiny_tokenizer
from tests.unit.model.conftest import waves

WHISPER_LAYERS = [(160, 160, 0), (3, 1, 1), (3, 2, 1)]
IGNORED = -100

# How these models write turns, by hand; {% generation %} marks what transformers calls the assistant's tokens.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN2 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<end_of_turn>{% endgeneration %}\n"
    "{% else %}{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Template, its control tokens, and the end of a turn.
FAMILIES = {
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "qwen2": (QWEN2, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "phi3": (PHI3, ["<|end|>"], "<|end|>"),
    "gemma3": (GEMMA3, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
}
HISTORY = [Turn("user", "What is heard?"), Turn("assistant", "a dog, twice")]
QUESTION, ANSWER = "And then?", "rain"


def make(family: str) -> MoweProcessor:
    template, controls, _ = FAMILIES[family]
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(c, special=True) for c in controls]})
    tokenizer.chat_template = template
    return MoweProcessor(tokenizer, WHISPER_LAYERS)


def messages(*turns: Turn) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def learned(processor: MoweProcessor, inputs: Any, row: int = 0) -> str:
    kept = inputs["labels"][row] != IGNORED
    assert torch.equal(inputs["labels"][row][kept], inputs["input_ids"][row][kept])
    return str(processor.tokenizer.decode(inputs["labels"][row][kept]))


@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_assistants_tokens_of_transformers(family: str, system: bool) -> None:
    processor = make(family)
    first = [Turn("system", "Be short.")] if system else []
    history = [*first, *HISTORY]
    inputs = processor([QUESTION], [[]], [ANSWER], histories=[history])
    if system and family == "gemma3":  # as its template is given a system text by those who use it
        history = [Turn("user", f"Be short.\n\n{HISTORY[0].text}"), *HISTORY[1:]]
    whole = messages(*history, Turn("user", QUESTION), Turn("assistant", ANSWER))
    wanted = processor.tokenizer.apply_chat_template(
        whole, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens, labels = inputs["input_ids"][0].tolist(), inputs["labels"][0].tolist()
    assert wanted["input_ids"][: len(tokens)] == tokens
    masked = [t if m else IGNORED for t, m in zip(wanted["input_ids"], wanted["assistant_masks"], strict=True)]
    assert masked[: len(labels)] == labels
    assert set(masked[len(labels) :]) <= {IGNORED}, "nothing of what is left is the assistant's"


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_by_hand(family: str) -> None:
    processor, (_, _, end) = make(family), FAMILIES[family]
    rows = [HISTORY, [HISTORY[0], HISTORY[1]._replace(learned=False)], []]
    inputs = processor([QUESTION] * 3, [[]] * 3, [ANSWER] * 3, histories=rows)
    assert learned(processor, inputs, 0) == f"a dog, twice{end}rain{end}"
    assert learned(processor, inputs, 1) == learned(processor, inputs, 2) == f"rain{end}"


def test_without_a_template_answers_end_with_the_end_of_text() -> None:
    processor = MoweProcessor(tiny_tokenizer(chat_template=False), WHISPER_LAYERS)
    inputs = processor([QUESTION], [[]], [ANSWER], histories=[HISTORY])
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == "What is heard?\na dog, twice</s>And then?\nrain</s>"
    assert learned(processor, inputs) == "a dog, twice</s>rain</s>"


@pytest.mark.parametrize("family", FAMILIES)
def test_clips_lie_where_they_are_said_to(family: str) -> None:
    processor = make(family)
    history = [Turn("user", f"First {CLIP} then {CLIP}."), Turn("assistant", "two dogs")]
    inputs = processor([f"And {CLIP}?"], [waves(0.5, 1.0, 0.3)], ["rain"], histories=[history])
    sizes = [processor.num_audio_tokens(round(16_000 * s)) for s in (0.5, 1.0, 0.3)]
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    first, second, third = ("<|audio|>" * size for size in sizes)
    assert f"First {first} then {second}." in text
    assert f"And {third}?" in text
    assert learned(processor, inputs) == f"two dogs{FAMILIES[family][2]}rain{FAMILIES[family][2]}"
    assert processor.num_tokens(f"And {CLIP}?", [8000, 16_000, 4800], "rain", history) == len(inputs["input_ids"][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_control_tokens_in_turns_are_text(family: str) -> None:
    processor, (_, controls, end) = make(family), FAMILIES[family]
    shouted = f"{end}<|audio|></s>{controls[0]}"
    history = [Turn("user", f"What is {shouted}?"), Turn("assistant", f"it is {shouted}")]
    inputs = processor([shouted], [[]], [shouted], histories=[history])
    usual = processor([QUESTION], [[]], [ANSWER], histories=[HISTORY])
    specials = {processor.tokenizer.convert_tokens_to_ids(name) for name in (*controls, "</s>", "<|audio|>")}

    def steering(tokens: torch.Tensor) -> list[int]:
        return [token for token in tokens.tolist() if token in specials]

    assert steering(inputs["input_ids"][0]) == steering(usual["input_ids"][0])
    assert learned(processor, inputs) == f"it is {shouted}{end}{shouted}{end}"


def test_prompts_of_conversations_end_before_the_answer() -> None:
    processor = make("qwen2")
    training = processor([QUESTION], [waves(0.5)], [ANSWER], histories=[[Turn("user", f"{CLIP}\nWhat?"), HISTORY[1]]])
    prompt = processor([QUESTION], [waves(0.5)], histories=[[Turn("user", f"{CLIP}\nWhat?"), HISTORY[1]]])
    length = prompt["input_ids"].shape[1]
    assert torch.equal(training["input_ids"][0][:length], prompt["input_ids"][0])
    assert processor.tokenizer.decode(training["input_ids"][0][length:]) == "rain<|im_end|>"


def test_places_and_clips_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="2 places of clips but the row has 1"):
        make("phi3")([f"{CLIP} and {CLIP}"], [waves(0.5)], ["a"])


def test_data_and_model_mean_the_same_place() -> None:
    assert CLIP == CLIP_IN_DATA
