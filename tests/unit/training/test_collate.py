import numpy as np
import pytest
import torch

from mowe_ray.data.sample import BadAudio, BadSample
from mowe_ray.training.collate import collate, pack, unpack
from tests.tiny_models import tiny_language_model_config


def test_waveforms_come_back_clip_by_clip(make_micro_batch):
    micro_batch = make_micro_batch([0.5, 0, 0.3])
    [first], text, [third] = micro_batch.clips()
    assert text == []
    assert [len(clip) for clip in (first, third)] == [8000, 4800]
    restored = np.concatenate([first / micro_batch.scales[0], third / micro_batch.scales[2]])
    np.testing.assert_allclose(restored, micro_batch.audio, atol=0.01)
    assert first.dtype == np.float32
    assert 0.2 < np.abs(first).max() <= 1


def test_a_batch_mixes_clips_and_text_only_rows(processor, make_micro_batch):
    bad = BadSample("b", "made", "silent")
    batch = collate(make_micro_batch([0.5, 0, 0.3], bad=[bad]), processor)
    assert batch.inputs["input_values"].shape == (2, 8000)
    assert batch.inputs["input_lengths"].tolist() == [8000, 4800]
    assert (batch.inputs["input_ids"] == processor.audio_token_id).sum(1).tolist() == [
        processor.num_audio_tokens(8000),
        0,
        processor.num_audio_tokens(4800),
    ]
    assert batch.answer_tokens == int((batch.inputs["labels"] != -100).sum())
    assert (batch.clips, batch.row_clips) == (2, [1, 0, 1])
    assert (batch.audio_s, batch.padded_s) == (pytest.approx(0.8), pytest.approx(1.0))
    assert batch.bad == [bad]


def test_prompts_have_no_answers_and_end_at_the_same_place(processor, make_micro_batch):
    prompts = collate(make_micro_batch([0.5, 0]), processor, generate=True)
    assert "labels" not in prompts.inputs
    assert prompts.inputs["attention_mask"][:, -1].tolist() == [1, 1]
    assert prompts.answer_tokens == 0


def test_a_micro_batch_that_lost_all_samples_weighs_nothing(processor, make_micro_batch, make_model):
    """It still must run forward and backward, for the other ranks wait in the same collectives."""
    bad = BadSample("b", "made", "truncated")
    batch = collate(make_micro_batch([], bad=[bad]), processor)
    assert (batch.answer_tokens, batch.clips, batch.audio_s, batch.padded_s) == (0, 0, 0.0, 0.0)
    assert (batch.ids, batch.answers, batch.row_clips, batch.bad) == ([], [], [], [bad])
    model = make_model().train()
    output = model(**batch.model_inputs, num_items_in_batch=7)
    output.loss.backward()
    assert float(output.lm_loss.detach()) == 0.0
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and not torch.any(g) for g in gradients)


def test_a_batch_moves_to_a_device_as_one_buffer(processor, make_micro_batch):
    batch = collate(make_micro_batch([0.5, 0, 0.3]), processor)
    moved = batch.on("meta")
    lengths = moved.inputs["input_lengths"]
    assert lengths.device.type == "cpu"
    assert lengths.tolist() == [8000, 4800]
    assert {name: (t.shape, t.dtype) for name, t in moved.inputs.items()} == {
        name: (t.shape, t.dtype) for name, t in batch.inputs.items()
    }
    starts = {t.untyped_storage().data_ptr() for name, t in batch.inputs.items() if name != "input_lengths"}
    assert starts == {batch.buffer.untyped_storage().data_ptr()}
    assert {t.device.type for name, t in moved.inputs.items() if name != "input_lengths"} == {"meta"}


def test_tensors_come_out_of_a_buffer_as_they_went_in():
    tensors = {
        "odd": torch.arange(5, dtype=torch.int8),
        "none": torch.empty(0, 3),
        1: torch.randn(2, 3, dtype=torch.float64),
        "half": torch.randn(7).to(torch.bfloat16),
        "ids": torch.tensor([[1, -100]]),
    }
    views = unpack(pack(tensors, pin=False), tensors)
    assert list(views) == list(tensors)
    for name, tensor in tensors.items():
        assert views[name].dtype == tensor.dtype
        assert torch.equal(views[name], tensor)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_padded_on_the_right_need_no_mask(family, processor, make_micro_batch, make_model):
    """Causal attention never looks at what comes later, and no loss is taken on it."""
    micro_batch = make_micro_batch([0.5, 0, 0.3])
    batch = collate(micro_batch, processor)
    model = make_model(language_model=tiny_language_model_config(family)).eval()
    masked = processor(
        instructions=micro_batch.instructions,
        audio=micro_batch.clips(),
        answers=micro_batch.answers,
    )
    assert not masked["attention_mask"].all()
    torch.testing.assert_close(model(**batch.model_inputs).lm_loss, model(**masked).lm_loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("instruction", ["first <|audio|> then <|audio|>", "<|audio|>" * 9])
def test_placeholders_in_an_instruction_cost_at_most_that_row(make_micro_batch, processor, instruction):
    batch = make_micro_batch([1.0, 0.0, 2.0, 1.5])
    batch.instructions[2] = instruction
    collated = collate(batch, processor)
    assert len(collated.ids) + len(collated.bad) == 4
    assert collated.ids[:2] + collated.ids[-1:] == ["s0", "s1", "s3"]
    assert collated.inputs["input_ids"].shape[0] == len(collated.ids)


def test_rows_that_cannot_be_collated_are_left_out_with_their_audio(make_micro_batch, processor):
    batch = make_micro_batch([1.0, 0.0, 2.0, 1.5])
    batch.answers[2] = None  # type: ignore[call-overload]
    collated = collate(batch, processor)
    assert [(bad.id, bad.cause) for bad in collated.bad] == [("s2", "crashed")]
    assert "TypeError" in collated.bad[0].detail or "ValueError" in collated.bad[0].detail
    alone = collate(make_micro_batch([1.0, 0.0, 2.0, 1.5]).without({2: BadAudio("crashed", "")}), processor)
    assert collated.ids == alone.ids == ["s0", "s1", "s3"]
    for name, tensor in alone.inputs.items():
        np.testing.assert_array_equal(collated.inputs[name], tensor)
