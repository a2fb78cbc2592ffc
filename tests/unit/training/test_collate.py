import numpy as np
import pytest
import torch

from mowe_ray.data.sample import BadSample
from mowe_ray.training.collate import collate


def test_waveforms_come_back_clip_by_clip(make_micro_batch):
    micro_batch = make_micro_batch([0.5, 0, 0.3])
    first, text, third = micro_batch.waveforms()
    assert text is None
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
    assert (batch.clips, batch.has_audio) == (2, [True, False, True])
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
    assert (batch.ids, batch.answers, batch.has_audio, batch.bad) == ([], [], [], [bad])
    model = make_model().train()
    output = model(**batch.to("cpu"), num_items_in_batch=7)
    output.loss.backward()
    assert float(output.lm_loss.detach()) == 0.0
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and not torch.any(g) for g in gradients)
