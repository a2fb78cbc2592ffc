"""Names of control tokens in instructions and answers became control tokens: a model learned to stop in mid-answer.

Reports: huggingface/transformers#25081 (split_special_tokens) and #35534 (placeholders in text), allenai/dolma#176.
The tokenizers are small ones of the kinds that Llama-2, Qwen2, Phi-3 and Gemma have.
"""

import json
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mowe_ray.model import MoweProcessor
from mowe_ray.model.tokenizing import train_tokenizer

LAYERS = [(160, 160, 0), (3, 1, 1), (3, 2, 1)]
WAVE = np.zeros(8000, np.float32)
TEXTS = ["what is said in this clip", "press the end key now", "a dog barks, then rain falls"]
BYTES = [f"<0x{n:02X}>" for n in range(256)]

TURNS = (
    "{{% for message in messages %}}{start}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{end}\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}{answer}{{% endif %}}"
)
LLAMA = "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
PHI = (
    "{% for message in messages %}<|user|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level(*specials: AddedToken) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(list(specials))
    return tokenizer


def sentence_piece(prepend: bool, *specials: AddedToken) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    """BPE with byte fallback: what no merge covers is written in bytes, whose tokens are not special."""
    steps = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {name: len(vocabulary) + n for n, name in enumerate(BYTES)}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens(list(specials))
    return tokenizer


def special(name: str, **options: bool) -> AddedToken:
    return AddedToken(name, special=True, normalized=False, **options)


def plain(name: str) -> AddedToken:
    return AddedToken(name, special=False, normalized=False)


def llama() -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=sentence_piece(True), bos_token="<s>", eos_token="</s>")
    fast.chat_template = LLAMA
    return fast


def qwen() -> PreTrainedTokenizerFast:
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = byte_level(*map(special, names), plain("<tool_call>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TURNS.format(start="<|im_start|>", end="<|im_end|>", answer="<|im_start|>assistant\n")
    return fast


def phi() -> PreTrainedTokenizerFast:
    names = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
    tokenizer = sentence_piece(True, *(special(name, rstrip=True) for name in names))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>")
    fast.chat_template = PHI
    return fast


def gemma() -> PreTrainedTokenizerFast:
    # Its turns are written with added tokens that are not marked as special; runs of newlines are added tokens too.
    names = ("<start_of_turn>", "<end_of_turn>", "\n\n")
    tokenizer = sentence_piece(False, *map(plain, names))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    turns = TURNS.format(start="<start_of_turn>", end="<end_of_turn>", answer="<start_of_turn>model\n")
    fast.chat_template = "{{ bos_token }}" + turns.replace("message['content']", "message['content'] | trim")
    return fast


def gpt2() -> PreTrainedTokenizerFast:
    # One token is begin, end and unknown.
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(special(end)), bos_token=end, eos_token=end, unk_token=end, pad_token=None
    )


def own() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 320)


# What the chat template writes behind an answer, where that is not the end of text.
END_OF_TURN = {"phi": "<|end|>", "gemma": "<end_of_turn>"}
KINDS = [llama, qwen, phi, gemma, gpt2, own]
CONTROLS = ["<s>", "</s>", "<unk>", "<|end|>", "<|im_end|>", "<|user|>", "<end_of_turn>", "<|pad|>", "<|endoftext|>"]


def end_of(make: Callable, processor: MoweProcessor) -> int:
    """The token that ends an answer."""
    tokenizer = processor.tokenizer
    return int(tokenizer.convert_tokens_to_ids(END_OF_TURN.get(make.__name__, tokenizer.eos_token)))


def ids(processor: MoweProcessor, instruction: str, answer: str, clips: int = 1) -> tuple[list[int], list[int]]:
    inputs = processor([instruction], [[WAVE] * clips], [answer])
    labels = inputs["labels"][0]
    return inputs["input_ids"][0][labels == -100].tolist(), labels[labels != -100].tolist()


def written(processor: MoweProcessor, tokens: list[int]) -> str:
    """What stands in a row, without its control tokens; a tokenizer may put spaces around a piece."""
    return str(processor.tokenizer.decode(tokens, skip_special_tokens=True)).replace(" ", "")


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("clips", [0, 1, 2])
def test_names_of_control_tokens_stay_text(make: Callable, control: str, clips: int) -> None:
    processor = MoweProcessor(make(), LAYERS)
    special_ids = {
        *processor.tokenizer.all_special_ids,
        *(number for number, token in processor.tokenizer.added_tokens_decoder.items() if "turn" in token.content),
    }
    usual, usual_answer = ids(processor, "what is key said", "press key now", clips)
    prompt, answer = ids(processor, f"what is {control} said", f"press {control} now", clips)
    for tokens, others in ((prompt, usual), (answer, usual_answer)):
        assert [t for t in tokens if t in special_ids] == [t for t in others if t in special_ids]
    end = end_of(make, processor)
    assert answer.count(end) == 1
    assert answer[-1] == end
    assert f"whatis{control}said" in written(processor, prompt)
    assert written(processor, answer[:-1]) == f"press{control}now"
    # Evaluation asks the same that was trained.
    asked = processor([f"what is {control} said"], [[WAVE] * clips])["input_ids"][0].tolist()
    assert asked == prompt


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize(("times", "clips"), [(1, 0), (2, 1), (3, 1)])
def test_placeholders_that_are_not_the_clips_stay_text(make: Callable, times: int, clips: int) -> None:
    processor = MoweProcessor(make(), LAYERS)
    prompt, answer = ids(processor, "it is <|audio|>" * times, "it is <|audio|>", clips)
    assert prompt.count(processor.audio_token_id) == clips * processor.num_audio_tokens(8000)
    assert processor.audio_token_id not in answer
    assert "itis<|audio|>" * times in written(processor, prompt)
    assert written(processor, answer[:-1]) == "itis<|audio|>"


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("text", ["what is said?\n\nA: rain", "say it: 3 < 4 | 5 > 2", "schön, naïve"])
def test_other_text_is_tokenized_as_by_transformers(make: Callable, text: str) -> None:
    tokenizer = make()
    processor = MoweProcessor(tokenizer, LAYERS, downsample=1000)  # a clip is one token
    content = f"<|audio|>\n{text}"
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": content}]
        wanted = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    else:
        wanted = tokenizer(content + "\n")["input_ids"]
    prompt, answer = ids(processor, text, text)
    assert prompt == wanted
    assert answer == [*tokenizer(text, add_special_tokens=False)["input_ids"], end_of(make, processor)]


@pytest.mark.parametrize("instruction", ["first <|audio|> then <|audio|>", "<|audio|><|audio|><|audio|>"])
def test_other_rows_of_a_batch_are_as_if_alone(instruction: str) -> None:
    processor = MoweProcessor(qwen(), LAYERS)
    both = processor([instruction, "what?"], [[WAVE], [WAVE]], ["say <|audio|>", "rain"])
    alone = processor(["what?"], [[WAVE]], ["rain"])
    row = both["input_ids"][1][both["attention_mask"][1] == 1]
    assert row.tolist() == alone["input_ids"][0].tolist()
    assert (both["input_ids"] == processor.audio_token_id).sum(1).tolist() == [processor.num_audio_tokens(8000)] * 2
