"""The example on real recordings, without its packages: splits, shifts, questions, MIDI, and its configuration."""

import random
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from mowe_ray.config import load_config, load_evaluation

EXAMPLE = Path(__file__).parents[3] / "examples" / "real_pool"


@pytest.fixture
def example(monkeypatch):
    """Its modules, which import each other by name as a script does."""
    monkeypatch.syspath_prepend(EXAMPLE)
    import music
    import prepare
    import recordings
    import tasks

    yield music, prepare, recordings, tasks
    for name in ("music", "prepare", "recordings", "tasks"):
        del sys.modules[name]


def tone(pitch: float, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * pitch * np.arange(int(16_000 * seconds)) / 16_000).astype(np.float32)


def test_no_recording_is_in_two_splits_and_the_unseen_is_never_trained_on(example):
    _, prepare, recordings, tasks = example
    made = [
        recordings.Recording(f"{who}/{n}", "p", "number", str(n), tone(200 + n), who, "French", "", unseen)
        for who, unseen in (("a", ""), ("b", ""), ("c", "speaker"))
        for n in range(40)
    ]
    splits = prepare.made_splits(made, tasks.WORDINGS, 0)
    some = prepare.made_splits(made, ["number"], 0)
    assert {question.task for asked in some.values() for question in asked} == {"number"}
    few = prepare.made_splits(made, ["number", "language"], 0, kinds=3, most=12)
    answers = {name: {q.answers for q in asked if q.task == "number"} for name, asked in few.items()}
    assert len(answers["train"]) == 3
    assert set().union(*answers.values()) == answers["train"]
    assert {question.answers for question in few["ood-speaker"] if question.task == "language"} == {("French",)}
    # Of the language as many as asked for; of the numbers fewer, and takes of these up to about as many.
    assert [len([q for q in few["train"] if q.task == task]) for task in ("language", "number")] == [12, 12]
    keys = {name: {r.key for q in asked for r in q.of} for name, asked in splits.items()}
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert {key[0] for key in keys["train"]} == {"a", "b"}
    assert {key[0] for key in keys["ood-speaker"]} == {"c"}
    assert keys["ood-telephone"] == keys["ood-noise-0dB"] <= keys["test"]
    pairs = [q for q in splits["train"] if q.task == "speaker"]
    assert pairs
    assert all((q.of[0].speaker == q.of[1].speaker) == (q.answers == ("same",)) for q in pairs)


def test_noise_has_the_ratio_it_is_named_after_and_a_telephone_its_band(example):
    *_, tasks = example
    wave = tone(1_000)
    noise = tasks.noisy(wave, 10.0, np.random.default_rng(0))
    share = noise @ wave / (wave @ wave)  # noisy clips are scaled to a peak
    assert 10 * np.log10(np.mean((share * wave) ** 2) / np.mean((noise - share * wave) ** 2)) == pytest.approx(
        10, abs=0.2
    )
    assert np.abs(tasks.telephone(tone(6_000) + 0.01 * wave)).max() < 0.2 < np.abs(tasks.telephone(wave)).max()


def test_midi_holds_every_note_where_it_belongs(example):
    music, *_ = example
    midi = music._midi([[(0.0, 0.5, 60)], [(0.25, 0.5, 64)]], 40, 0, random.Random(0))
    assert midi[:4] == b"MThd"
    assert int.from_bytes(midi[18:22], "big") == len(midi) - 22
    assert music._length(3 * 480) == bytes([0x8B, 0x20])
    assert midi.count(bytes([0x90, 60])) == midi.count(bytes([0x80, 64])) == 1
    assert midi.endswith(b"\xff\x2f\x00")


def test_its_configuration_and_what_its_readme_changes_in_it_load():
    config = load_config(str(EXAMPLE / "train.yaml"), [])
    assert config.model.weak_encoders == []
    assert config.data.feature_cache
    commands = (EXAMPLE / "README.md").read_text().replace("\\\n", " ")
    (pool,) = re.findall(r"train\.yaml (name=pool .*)", commands)
    assert [weak.name for weak in load_config(str(EXAMPLE / "train.yaml"), shlex.split(pool)).model.weak_encoders] == [
        "a"
    ]
    (scored,) = re.findall(r"evaluate runs/real_pool runs/pool (.*?) *#", commands)
    assert load_evaluation(config.model_dump(mode="json"), shlex.split(scored)).data.validation_names
