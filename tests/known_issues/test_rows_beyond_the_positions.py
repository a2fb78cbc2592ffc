"""Rows longer than the language model's positions crashed training (GPT-2) or were trained out of its range (RoPE).

Reports: huggingface/datasets#5391, yeyupiaoling/Whisper-Finetune#96 and #109. So did clips beyond the encoder's 30 s.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mowe_ray.config import load_config
from mowe_ray.config.model_section import ModelSection
from mowe_ray.data.micro_batch import Features, MicroBatch
from mowe_ray.evaluation.positions import drop_too_long
from mowe_ray.model import MoweProcessor
from mowe_ray.model.building import build_model, build_processor
from mowe_ray.model.export import export
from mowe_ray.training.build import assemble
from mowe_ray.training.clip_length import check_clip_length
from mowe_ray.training.collate import collate
from mowe_ray.training.dry_run import dry_run
from tests.tiny_models import save_encoder_checkpoint, tiny_language_model_config, tiny_tokenizer, tiny_whisper_config

POSITIONS = 64
GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
LANGUAGE_MODELS = {
    "gpt2": GPT2,
    **{name: tiny_language_model_config(name, max_position_embeddings=POSITIONS) for name in ("llama", "gemma3_text")},
}


def make(family: str):
    tokenizer = tiny_tokenizer(chat_template=True)
    model = build_model(
        base_encoder=tiny_whisper_config(),
        language_model=LANGUAGE_MODELS[family],
        tokenizer=copy.deepcopy(tokenizer),
        lora=None,
    )
    return model, build_processor(model, tokenizer)


def with_answers(micro_batch: MicroBatch, *answers: str) -> MicroBatch:
    return replace(micro_batch, answers=list(answers), references=[[answer] for answer in answers])


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_rows_that_are_too_long_are_counted_and_the_others_trained(family: str, make_micro_batch) -> None:
    model, processor = make(family)
    usual = make_micro_batch([0.3, 0.5, 0, 0.2])
    features = Features(0, 1, 2, [2, 3, 1], np.arange(12, dtype=np.uint16))
    micro_batch = with_answers(replace(usual, features=[features]), "yes", "x" * 100, "y" * 100, "no")
    batch = collate(micro_batch, processor)
    assert [(bad.id, bad.source, bad.cause) for bad in batch.bad] == [
        ("s1", "made", "too_many_tokens"),
        ("s2", "made", "too_many_tokens"),
    ]
    assert str(POSITIONS) in batch.bad[0].detail
    assert (batch.ids, batch.clips) == (["s0", "s3"], 2)
    assert batch.inputs["input_ids"].shape[1] <= POSITIONS
    assert batch.encoder_states[0].view(torch.uint16)[:, 0].tolist() == [[[0, 1], [2, 3]], [[10, 11], [0, 0]]]
    alone = make_micro_batch([0.3])
    for clip, whole in zip(
        [wave for row in drop_too_long(micro_batch, processor).clips() for wave in row],
        [usual.clips()[0][0], usual.clips()[3][0]],
        strict=True,
    ):
        np.testing.assert_array_equal(clip, whole)
    assert len(alone.audio) == batch.inputs["input_lengths"][0]
    assert torch.isfinite(
        model(**batch.text_inputs, **batch.audio_inputs | {"encoder_states": None}, num_items_in_batch=2).loss
    )


def test_the_last_position_is_used(make_micro_batch) -> None:
    _, processor = make("gpt2")
    one = make_micro_batch([0.1])
    spare = POSITIONS - processor.num_tokens(one.instructions[0], one.lengths, "")
    for extra, kept in ((0, 1), (1, 0)):
        answer = "#" * (spare + extra)  # no merge of the tokenizer has this sign
        assert len(collate(with_answers(one, answer), processor).ids) == kept


def test_long_audio_and_long_questions_count_too(make_micro_batch) -> None:
    _, processor = make("llama")
    long_clip = make_micro_batch([28.0, 0.3])
    assert [bad.id for bad in drop_too_long(long_clip, processor).bad] == ["s0"]
    asked = ["What?", "#" * 80]
    assert [bad.id for bad in drop_too_long(make_micro_batch([0.3, 0.3]), processor, instructions=asked).bad] == ["s1"]


def test_room_for_the_answer_is_kept_when_it_is_generated(make_micro_batch) -> None:
    _, processor = make("llama")
    micro_batch = make_micro_batch([0.3, 0.3])
    prompt = processor.num_tokens(micro_batch.instructions[0], [4800])
    assert not drop_too_long(micro_batch, processor, new_tokens=POSITIONS - prompt).bad
    assert len(drop_too_long(micro_batch, processor, new_tokens=POSITIONS - prompt + 1).bad) == 2
    # Long clips are answered in pieces.
    assert not drop_too_long(make_micro_batch([28.0]), processor, new_tokens=4, max_samples=4800).bad


def test_text_alone_may_be_capped(make_micro_batch) -> None:
    """A language model with 128 k positions has room for a text that its GPU has none for."""
    _, processor = make("gpt2")
    micro_batch = with_answers(make_micro_batch([0.1, 0.1, 0]), "yes", "#" * 20, "#" * 20)
    cap = processor.num_tokens(micro_batch.instructions[1], [], "#" * 20) - 1
    assert collate(micro_batch, processor, max_text_tokens=cap + 1).ids == ["s0", "s1", "s2"]
    batch = collate(micro_batch, processor, max_text_tokens=cap)
    assert batch.ids == ["s0"]
    assert {(bad.cause, bad.detail) for bad in batch.bad} == {
        ("too_many_tokens", f"{cap + 1} tokens of text, at most {cap} (data.max_text_tokens)")
    }
    assert drop_too_long(micro_batch, processor, max_text_tokens=cap, new_tokens=1).ids == ["s0", "s1", "s2"]


def test_an_export_knows_its_positions(tmp_path: Path) -> None:
    model, processor = make("llama")
    export(model, processor, tmp_path)
    loaded = MoweProcessor.from_pretrained(tmp_path)
    assert loaded.max_positions == POSITIONS
    with pytest.raises(ValueError, match=str(POSITIONS)):
        loaded(["#" * 100], [[]])


def section(**changes) -> ModelSection:
    values = {
        "base_encoder": {"config": tiny_whisper_config()},
        "language_model": {"config": tiny_language_model_config("llama")},
        "lora": None,
    }
    return ModelSection.model_validate(values | changes)


@pytest.mark.parametrize("source", ["inline", "folder", "weak", "export"])
def test_a_limit_on_clips_beyond_the_encoder_is_refused(source: str, tmp_path: Path) -> None:
    short = tiny_whisper_config(max_source_positions=500)  # 10 s
    if source == "inline":
        model = section(base_encoder={"config": short})
    elif source == "folder":
        save_encoder_checkpoint(tmp_path, short)
        model = section(base_encoder=str(tmp_path))
    elif source == "weak":
        model = section(weak_encoders=[{"name": "w", "checkpoint": {"config": short}, "train": "frozen"}])
    else:
        from mowe_ray.config.training_section import MoweLossSection

        built = assemble(
            section(base_encoder={"config": short}),
            MoweLossSection(),
            seed=0,
            tokenizer=tiny_tokenizer(False),
            gpu=False,
        )
        export(*built, tmp_path)
        model = section(init_from=str(tmp_path))
    check_clip_length(model, 10.0)
    with pytest.raises(ValueError, match=r"data.max_duration_s: 10.5 s is more than the 10 s"):
        check_clip_length(model, 10.5)


def test_whisper_takes_30_seconds_and_others_any(tmp_path: Path) -> None:
    check_clip_length(section(), 30.0)
    with pytest.raises(ValueError, match=r"set data\.max_duration_s=30 or lower"):
        check_clip_length(section(base_encoder={"config": {"model_type": "whisper"}}), 30.1)
    check_clip_length(section(base_encoder={"config": {"model_type": "hubert"}}), 600.0)
    check_clip_length(section(base_encoder="nobody/knows-this-checkpoint"), 600.0)


def test_the_dry_run_says_so(tmp_path: Path) -> None:
    config = load_config("quickstart", ["data.max_duration_s=31", "data.train=[]", "data.validation=[]"])
    with (tmp_path / "out").open("w") as out, pytest.raises(ValueError, match=r"data\.max_duration_s"):
        dry_run(config, out)
