from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, PreTrainedTokenizerBase

from mowe_ray.model import MoweProcessor
from mowe_ray.model.encoders import load_encoder
from tests.tiny_models import ENCODER_CONFIGS, tiny_tokenizer
from tests.unit.model.conftest import waves

WHISPER_LAYERS = [(160, 160, 0), (3, 1, 1), (3, 2, 1)]


@pytest.fixture(params=[False, True], ids=["plain", "chat"])
def processor(request: pytest.FixtureRequest) -> MoweProcessor:
    return MoweProcessor(tiny_tokenizer(chat_template=request.param), WHISPER_LAYERS)


def written(processor: MoweProcessor, tokens: torch.Tensor) -> str:
    return str(processor.tokenizer.decode(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("downsample", [1, 4, 8])
@pytest.mark.parametrize("family", ENCODER_CONFIGS)
def test_token_count_is_the_encoders(family: str, downsample: int, tokenizer: PreTrainedTokenizerBase) -> None:
    encoder, _ = load_encoder(ENCODER_CONFIGS[family](), 0)
    processor = MoweProcessor(tokenizer, encoder.frame_layers, downsample, chunk_samples=encoder.chunk_samples)
    for samples in (1, 400, 1599, 1600, 1601, 8000, 16_000, 123_457):
        wanted = -(-encoder.num_frames(samples) // downsample)
        assert processor.num_audio_tokens(samples) == wanted


def test_training_rows_are_padded_right_and_teach_only_the_answer(processor: MoweProcessor) -> None:
    inputs = processor(["What?", "Tell me."], [waves(0.5), waves(1.0)], ["yes", "no, high"])
    assert (inputs["attention_mask"][:, 0] == 1).all()
    for row, answer in enumerate(["yes", "no, high"]):
        learned = inputs["labels"][row] != -100
        assert written(processor, inputs["labels"][row][learned]) == answer + "</s>"
        assert torch.equal(inputs["labels"][row][learned], inputs["input_ids"][row][learned])
        attended = inputs["input_ids"][row][inputs["attention_mask"][row] == 1]
        assert written(processor, attended).endswith(answer + "</s>")


def test_prompts_are_the_training_rows_without_the_answer(processor: MoweProcessor) -> None:
    arguments = (["What?", "Tell me more."], [waves(0.5), waves(1.0)])
    training, prompts = processor(*arguments, ["yes", "no"]), processor(*arguments)
    assert "labels" not in prompts
    assert (prompts["attention_mask"][:, -1] == 1).all()
    for row in range(2):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row] == 1]
        learned = training["labels"][row] != -100
        before = (training["attention_mask"][row] == 1) & ~learned
        assert torch.equal(training["input_ids"][row][before], prompt)


def test_plain_layout(tokenizer: PreTrainedTokenizerBase) -> None:
    processor = MoweProcessor(tokenizer, WHISPER_LAYERS)
    row = processor(["What?"], [waves(0.5)], ["yes"])["input_ids"][0]
    assert written(processor, row) == "<|audio|>" * 4 + "\nWhat?\nyes</s>"


def test_chat_layout() -> None:
    processor = MoweProcessor(tiny_tokenizer(chat_template=True), WHISPER_LAYERS)
    row = processor(["What?"], [waves(0.5)], ["yes"])["input_ids"][0]
    audio = "<|audio|>" * 4
    assert written(processor, row) == f"<s><|user|>{audio}\nWhat?</s><|assistant|>yes</s>"


def test_several_clips_and_none(processor: MoweProcessor) -> None:
    inputs = processor(["two", "none", "one"], [waves(0.5, 1.0), [], waves(0.7)], ["a", "b", "c"])
    counts = (inputs["input_ids"] == processor.audio_token_id).sum(1).tolist()
    sizes = [processor.num_audio_tokens(round(16_000 * s)) for s in (0.5, 1.0, 0.7)]
    assert counts == [sizes[0] + sizes[1], 0, sizes[2]]
    assert inputs["input_lengths"].tolist() == [8000, 16_000, 11_200]
    assert inputs["input_values"].shape == (3, 16_000)
    assert inputs["input_values"].dtype == torch.float32
    assert (inputs["input_values"][0, 8000:] == 0).all()


def test_text_alone_has_no_audio_inputs(processor: MoweProcessor) -> None:
    for inputs in (processor(["hi"], [[]], ["yes"]), processor(["hi"], answers=["yes"])):
        assert set(inputs) == {"input_ids", "attention_mask", "labels"}


def test_clips_go_where_the_instruction_says(tokenizer: PreTrainedTokenizerBase) -> None:
    processor = MoweProcessor(tokenizer, WHISPER_LAYERS)
    row = processor(["is <|audio|> like <|audio|>?"], [waves(0.1, 0.2)], ["no"])["input_ids"][0]
    assert written(processor, row) == "is <|audio|> like <|audio|><|audio|>?\nno</s>"


@pytest.mark.parametrize(("instruction", "clips"), [("a <|audio|>", 2), ("<|audio|><|audio|><|audio|>", 2)])
def test_placeholders_and_clips_must_agree(processor: MoweProcessor, instruction: str, clips: int) -> None:
    with pytest.raises(ValueError, match=rf"row has {clips} clips"):
        processor([instruction], [waves(*[0.5] * clips)], ["yes"])


def test_a_row_that_is_too_long_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    arguments = (["What?"], [waves(0.5)], ["yes"])
    length = MoweProcessor(tokenizer, WHISPER_LAYERS)(*arguments)["input_ids"].shape[1]
    exact = MoweProcessor(tokenizer, WHISPER_LAYERS, max_positions=length)
    assert exact(*arguments)["input_ids"].shape[1] == length
    assert exact.num_tokens("What?", [8000], "yes") == length
    assert exact.fits("What?", [8000], "yes")
    assert not exact.fits("What?", [8000], "yes", new_tokens=1)
    short = MoweProcessor(tokenizer, WHISPER_LAYERS, max_positions=length - 1)
    assert not short.fits("What?", [8000], "yes")
    with pytest.raises(ValueError, match=f"{length} tokens.* takes {length - 1}"):
        short(*arguments)


def test_rows_must_agree(processor: MoweProcessor) -> None:
    with pytest.raises(ValueError, match="numbers must be the same"):
        processor(["a", "b"], [[]], ["yes", "no"])
    with pytest.raises(ValueError, match="numbers must be the same"):
        processor(["a", "b"], [[], []], ["yes"])


@pytest.mark.parametrize("clip", [np.zeros((2, 100), np.float32), np.zeros(0), np.zeros(9, np.int16)])
def test_what_is_not_a_waveform_is_refused(processor: MoweProcessor, clip: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one-dimensional float"):
        processor(["a"], [[clip]])


def test_saved_processor_does_the_same(processor: MoweProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MoweProcessor)
    arguments = (["What?"], [waves(0.5)], ["yes"])
    for name, values in processor(*arguments).items():
        assert torch.equal(loaded(*arguments)[name], values)
    assert loaded.batch_decode(loaded(*arguments)["input_ids"], skip_special_tokens=True) == (
        processor.batch_decode(processor(*arguments)["input_ids"], skip_special_tokens=True)
    )
