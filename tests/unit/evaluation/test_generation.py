"""Answers to decoded samples: the same whoever shares the batch, long clips in pieces, and the routers' choices."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.evaluation.generation import answer_micro_batch, instruction_of
from tests.ranks import make_model, merged, micro_batch, steer_routers

OPTIONS = {
    "max_new_tokens": 6,
    "num_beams": 1,
    "max_audio_s": 30.0,
    "chunked_tasks": ["sound"],
    "batch_seconds": 120.0,
    "max_batch_size": 32,
}


@pytest.fixture(scope="module")
def model():
    made, processor = make_model()
    steer_routers(made, processor)
    return made.eval(), processor


def joined(*kinds: int) -> MicroBatch:
    """One sample whose clip is a second of each kind."""
    parts = merged([micro_batch([kind], seed=kind) for kind in kinds])
    one = micro_batch([kinds[0]], seed=kinds[0])
    return replace(one, audio=parts.audio, lengths=[len(parts.audio)])


@pytest.mark.slow
def test_an_answer_is_what_generate_says_to_the_sample_alone(model):
    batch = micro_batch([0, None, 3], seed=1)
    answers = answer_micro_batch(*model, batch, **OPTIONS)
    for row, clips in enumerate(batch.clips()):
        inputs = model[1]([batch.instructions[row]], [clips])
        tokens = model[0].generate(**inputs, max_new_tokens=6, do_sample=False)
        (wanted,) = model[1].batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answers[row].answer == wanted.strip()
    assert [answer.id for answer in answers] == batch.ids
    assert [answer.references for answer in answers] == batch.references
    assert [answer.duration_s for answer in answers] == [1.0, 0.0, 0.7]


def test_choices_are_those_of_the_routers(model):
    batch = micro_batch([0, None, 3, 1], seed=1)
    answers = answer_micro_batch(*model, batch, **OPTIONS)
    assert answers[1].dependent is answers[1].independent is None
    chosen = [np.argmax(answer.dependent.load) for answer in answers if answer.dependent]
    assert chosen == [0, 3, 1]
    for answer in answers:
        if answer.dependent:
            assert sum(answer.dependent.load) == sum(answer.independent.load) == 1
            assert sum(answer.dependent.probabilities) == pytest.approx(1, abs=1e-4)
            assert answer.dependent.load[np.argmax(answer.dependent.probabilities)] == 1
            assert np.argmax(answer.independent.load) == 3


def test_long_clips_are_answered_in_pieces_and_joined(model):
    long = joined(0, 1, 2)
    (whole,) = answer_micro_batch(*model, long, **{**OPTIONS, "max_audio_s": 1.0})
    pieces = [answer_micro_batch(*model, replace(joined(kind), instructions=long.instructions), **OPTIONS)[0]
              for kind in (0, 1, 2)]  # fmt: skip
    assert whole.answer == " ".join(piece.answer for piece in pieces if piece.answer)
    assert whole.duration_s == 3.0
    np.testing.assert_allclose(whole.dependent.load, [1 / 3, 1 / 3, 1 / 3, 0, 0], atol=1e-4)
    mean = np.mean([piece.dependent.probabilities for piece in pieces], axis=0)
    np.testing.assert_allclose(whole.dependent.probabilities, mean, atol=1e-4)


def test_long_clips_of_other_tasks_are_cut(model):
    long, short = replace(joined(0, 1), tasks=["other"]), replace(joined(0), tasks=["other"])
    (cut,) = answer_micro_batch(*model, long, **{**OPTIONS, "max_audio_s": 1.0})
    (wanted,) = answer_micro_batch(*model, replace(short, instructions=long.instructions), **OPTIONS)
    assert (cut.answer, cut.dependent) == (wanted.answer, wanted.dependent)


def test_a_short_last_piece_is_filled_up_with_silence(model):
    long = joined(0, 1)
    barely = replace(long, audio=long.audio[:16_100], lengths=[16_100])
    seen = []
    handle = model[0].audio_tower.register_forward_pre_hook(lambda module, given: seen.append(given[1].tolist()))
    try:
        answer_micro_batch(*model, barely, **{**OPTIONS, "max_audio_s": 1.0})
    finally:
        handle.remove()
    assert seen == [[16_000, 16_000]]


@pytest.mark.parametrize(("batch_seconds", "max_batch_size", "sizes"), [(2.0, 32, [2, 2, 1]), (9.0, 3, [3, 2])])
def test_pieces_stay_within_the_limits_of_a_batch(model, batch_seconds, max_batch_size, sizes):
    long = joined(0, 1, 2, 3, 4)
    seen = []
    handle = model[0].audio_tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[1])))
    limits = {"max_audio_s": 1.0, "batch_seconds": batch_seconds, "max_batch_size": max_batch_size}
    try:
        answer_micro_batch(*model, long, **{**OPTIONS, **limits})
    finally:
        handle.remove()
    assert seen == sizes


def test_beams_and_other_instructions_reach_the_model(model):
    batch = micro_batch([2], seed=3)
    asked = []

    def instruct(task, sample_id):
        asked.append((task, sample_id))
        return "What else?"

    (answer,) = answer_micro_batch(*model, batch, **{**OPTIONS, "num_beams": 3}, instruct=instruct)
    assert asked == [("sound", "3-0")]
    assert answer.instruction == "What else?"
    inputs = model[1](["What else?"], [batch.clips()[0]])
    tokens = model[0].generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=3)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    assert answer.answer == model[1].batch_decode(new, skip_special_tokens=True)[0].strip()


def test_a_micro_batch_that_lost_all_its_samples_has_no_answers(model):
    with torch.inference_mode():
        assert answer_micro_batch(*model, micro_batch([]), **OPTIONS) == []


LABELS = ["happy", "sad"]


@pytest.mark.parametrize("task", ["asr", "ac", "er"])
def test_the_usual_phrasings_are_drawn_evenly_by_id(task):
    drawn = Counter(instruction_of(task, f"clip-{i}", LABELS, seed=0) for i in range(800))
    assert len(drawn) == 8
    assert min(drawn.values()) > 60


def test_the_draw_depends_on_the_seed_and_the_id_alone():
    one = [instruction_of("asr", str(i), None, seed=1) for i in range(50)]
    assert one == [instruction_of("asr", str(i), LABELS, seed=1) for i in reversed(range(50))][::-1]
    assert one != [instruction_of("asr", str(i), None, seed=2) for i in range(50)]
    assert instruction_of("asr", "clip", None, seed=0) == "Note down the spoken sentence."  # in every process


def test_a_classification_names_its_labels():
    assert all(str(instruction_of("er", str(i), LABELS, 0)).endswith(" (happy, sad)") for i in range(20))
    assert instruction_of("er", "1", None, 0) is None
    assert "happy" not in str(instruction_of("ac", "1", LABELS, 0))


@pytest.mark.parametrize("task", ["aqa", "sqa", "mine"])
def test_questions_of_their_own_stay(task):
    assert instruction_of(task, "1", LABELS, seed=0) is None
