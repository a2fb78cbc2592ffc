"""The built-in corpus: reproducible, balanced, honest about validation, and learnable."""

import hashlib
import multiprocessing
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from mowe_ray.data.decode import decode_audio
from mowe_ray.data.shards import list_shards, scan_shard
from mowe_ray.data.synthetic_corpus import VOICES, builtin_corpus, builtin_samples
from mowe_ray.data.synthetic_corpus.tasks import ANIMALS, COLOURS, EMOTIONS, TASKS, WORDS


@pytest.fixture(scope="module")
def train():
    return list(builtin_samples("train", 600, seed=0))


@pytest.fixture(scope="module")
def validation():
    return list(builtin_samples("validation", 150, seed=0))


def _wave(sample):
    return decode_audio(sample.audio, None, 0.1, 10)


def _of(samples, task):
    return [sample for sample in samples if sample.task == task]


@pytest.mark.slow
def test_same_arguments_same_samples_and_a_small_corpus_is_the_start_of_a_large_one(train):
    assert list(builtin_samples("train", 40, seed=0)) == train[:40]
    assert next(builtin_samples("train", 1, seed=1)).audio != train[0].audio


def test_ids_are_unique_and_tasks_take_turns(train):
    assert len({sample.id for sample in train}) == len(train)
    assert [sample.task for sample in train] == list(TASKS) * 120


@pytest.mark.slow
def test_every_clip_decodes_and_is_short(train, validation):
    lengths = np.array([_wave(sample).size / 16_000 for sample in train + validation])
    assert lengths.min() > 0.4
    assert lengths.max() < 4
    assert lengths.mean() < 2


def test_validation_shares_no_speaker_and_no_waveform_with_training(train, validation):
    names = {split: {v.partition("+")[2] for v in voices} for split, voices in VOICES.items()}
    assert not names["train"] & names["validation"]
    heard = {hashlib.sha256(_wave(sample).tobytes()).digest() for sample in train}
    assert len(heard) == len(train)
    for sample in validation:
        assert hashlib.sha256(_wave(sample).tobytes()).digest() not in heard


def test_the_commonest_answer_is_a_weak_one(train, validation):
    limits = {"asr": 0.15, "er": 0.3, "ac": 0.2, "aqa": 0.25, "sqa": 0.2}
    for samples in (train, validation):
        for task, limit in limits.items():
            answers = Counter(sample.answer for sample in _of(samples, task))
            assert answers.most_common(1)[0][1] <= limit * answers.total(), task


def test_answers_are_balanced_within_each_closed_question(train):
    emotions = Counter(sample.answer for sample in _of(train, "er"))
    assert set(emotions.values()) == {120 // len(EMOTIONS)}
    facts = Counter(sample.answer for sample in _of(train, "sqa"))
    assert facts.keys() == {*COLOURS, *ANIMALS}
    assert set(facts.values()) == {120 // 8}
    questions = Counter(sample.answer for sample in _of(train, "aqa"))
    assert abs(questions["yes"] - questions["no"]) <= 4
    assert {questions[count] for count in ("one", "two", "three", "four")} == {10}


def test_instructions_are_paraphrased_and_emotions_come_with_their_list(train):
    for task in TASKS:
        assert len({sample.instruction for sample in _of(train, task)}) >= 3
    for sample in _of(train, "er"):
        assert "(happy, sad, angry, neutral)" in sample.instruction
    assert {w for s in _of(train, "asr") for w in s.answer.split()} == set(WORDS)


def _features(sample):
    """Means and deviations over time of 24 log bands of the level-normalised spectrum, and the length: (49,)."""
    wave = _wave(sample)
    frames = np.lib.stride_tricks.sliding_window_view(wave / np.abs(wave).max(), 400)[::160]
    power = np.abs(np.fft.rfft(frames * np.hanning(400))) ** 2
    edges = np.unique(np.geomspace(2, 201, 25).astype(int))
    bands = np.log(np.stack([power[:, a:b].mean(1) for a, b in pairwise(edges)]) + 1e-4)
    return np.concatenate([bands.mean(1), bands.std(1), [wave.size / 16_000]])


def _nearest_class_accuracy(train, validation):
    """Nearest class mean on standardised features: as little learning as there can be."""
    known, asked = (
        np.stack([_features(s) for s in train]),
        np.stack([_features(s) for s in validation]),
    )
    mean, scale = known.mean(0), known.std(0)
    answers = sorted({sample.answer for sample in train})
    labels = np.array([answers.index(sample.answer) for sample in train])
    centres = np.stack([((known - mean) / scale)[labels == k].mean(0) for k in range(len(answers))])
    distances = (((asked - mean) / scale)[:, None] - centres) ** 2
    guesses = [answers[k] for k in distances.sum(-1).argmin(1)]
    return np.mean([g == s.answer for g, s in zip(guesses, validation, strict=True)])


@pytest.mark.parametrize(
    ("task", "belongs", "at_least"),
    [
        ("er", lambda s: True, 0.7),
        ("ac", lambda s: " then " not in s.answer, 0.9),
        ("aqa", lambda s: "sound" in s.instruction, 0.8),
        ("asr", lambda s: " " not in s.answer, 0.35),
    ],
)
def test_answers_can_be_heard_by_the_simplest_classifier(train, validation, task, belongs, at_least):
    known = [sample for sample in _of(train, task) if belongs(sample)]
    asked = [sample for sample in _of(validation, task) if belongs(sample)]
    assert _nearest_class_accuracy(known, asked) >= at_least


def _build(cache):
    builtin_corpus("validation", cache, clips=20)


@pytest.mark.slow
def test_the_cache_is_used_again_and_survives_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_build, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    folder = builtin_corpus("validation", tmp_path, clips=20)
    assert list(tmp_path.iterdir()) == [folder]
    shard = next(folder.glob("*.tar"))
    before = shard.stat().st_mtime_ns
    assert builtin_corpus("validation", tmp_path, clips=20) == folder
    assert shard.stat().st_mtime_ns == before


def test_other_arguments_are_other_folders_and_shards_hold_every_clip(tmp_path):
    folder = builtin_corpus("train", tmp_path, clips=10)
    assert builtin_corpus("train", tmp_path, clips=10, seed=1) != folder
    rows = [row for shard in list_shards(str(folder)) for row in scan_shard(shard).to_pylist()]
    assert Counter(row["task"] for row in rows) == dict.fromkeys(TASKS, 2)
    assert all(row["cause"] is None and row["duration_s"] > 0.4 for row in rows)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'test'"):
        builtin_corpus("test", tmp_path)
