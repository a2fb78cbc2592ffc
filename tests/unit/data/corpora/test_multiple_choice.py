"""MMAU, MMAU-Pro, MMAR and MMSU in miniature: from their JSON to samples, shards and micro-batches."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mowe_ray.data.corpora.layout import Defaults
from mowe_ray.data.corpora.registry import detect_kind, read_source
from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import MicroBatch, load_micro_batch
from mowe_ray.data.sample import BadSample, Sample
from mowe_ray.data.shards.choices import with_choices
from mowe_ray.data.shards.write import write_parquet, write_webdataset
from tests.tiny_corpora import put, tone

MMAU = {
    **{"id": "3fe6", "audio_id": "./clips/a.wav", "question": "Who speaks?", "choices": ["A man", "A woman"]},
    **{"answer": "A woman", "task": "sound", "category": "Reasoning", "difficulty": "hard", "dataset": "AudioSet"},
}
MMAR = {
    **{"id": "qx8h", "audio_path": "./clips/a.wav", "question": "Where is it?", "choices": ["Canyon", "City", "Sea"]},
    **{"answer": "City", "modality": "music", "category": "Cultural Layer", "language": None, "cue": ["song"]},
}
MMSU = {
    **{"id": "near_1", "task_name": "near_far", "audio_path": "clips/a.wav", "question": "Near or far?"},
    **{"choice_a": "Near", "choice_b": "Far", "choice_c": None, "answer_gt": "Far", "category": "Perception"},
}
PRO = {"id": "p1", "audio_path": ["clips/a.wav", "clips/b.wav"], "question": "Same?", "choices": ["yes", "no"]}
PRO |= {"answer": "no", "category": "multi", "length_type": "short"}


@pytest.fixture
def clips(tmp_path):
    for name in "ab":
        put(tmp_path / "clips" / f"{name}.wav", tone())
    return tmp_path


def read(path, task=None) -> list[Sample | BadSample]:
    assert detect_kind(path) == "mcq"
    return list(read_source(path, "mcq", Defaults("bench", task)))


def test_mmau_is_asked_with_its_choices_and_scored_apart(clips):
    put(clips / "mmau-test-mini.json", json.dumps([MMAU, MMAU | {"id": "gone", "audio_id": "./clips/c.wav"}]))
    sample, gone = read(clips / "mmau-test-mini.json")
    assert sample.instruction == "Who speaks?\nAnswer with one of these choices:\nA man\nA woman"
    assert (sample.task, sample.answer, sample.choices) == ("mcq", "A woman", ("A man", "A woman"))
    assert sample.groups == {"modality": "sound", "category": "Reasoning", "difficulty": "hard"}
    assert isinstance(gone, BadSample)
    assert gone.cause == "no_audio"
    lettered, _ = read(clips / "mmau-test-mini.json", "mcq_letter")
    assert lettered.answer == "B"


def test_mmar_mmsu_and_the_closed_questions_of_mmau_pro(clips):
    put(clips / "MMAR-meta.jsonl", json.dumps(MMAR) + "\n")
    (mmar,) = read(clips / "MMAR-meta.jsonl")
    assert (mmar.answer, mmar.groups) == ("City", {"modality": "music", "category": "Cultural Layer"})
    put(clips / "mmsu.jsonl", json.dumps(MMSU) + "\n")
    (mmsu,) = read(clips / "mmsu.jsonl")
    assert (mmsu.task, mmsu.answer, mmsu.choices) == ("mcq_letter", "B", ("Near", "Far"))
    assert mmsu.instruction == "Near or far?\nA. Near\nB. Far\nAnswer with the letter of the right choice."
    rows = [PRO, PRO | {"id": "p2", "category": "open", "choices": None}, PRO | {"id": "p3", "choices": ["yes"]}]
    pq.write_table(pa.Table.from_pylist(rows), clips / "test.parquet")
    (pro,) = read(clips / "test.parquet")
    assert (pro.id, len(pro.clips), pro.answer) == ("p1", 2, "no")
    assert pro.instruction.endswith("Same?\nAnswer with one of these choices:\nyes\nno")


def loaded(folder) -> MicroBatch:
    index = build_index([SourceSpec("bench", str(folder), None)], folder.parent / "index", min_s=0.1, max_s=30.0)
    return load_micro_batch(index.table, 0.1, 30.0)


@pytest.mark.parametrize("write", [write_webdataset, write_parquet])
def test_shards_keep_choices_and_groups_and_list_the_choices_once(clips, write):
    put(clips / "mmau.json", json.dumps([MMAU]))
    (sample,) = read(clips / "mmau.json")
    write([sample], str(clips / "shards"))
    batch = loaded(clips / "shards")
    assert batch.instructions == [sample.instruction]
    assert batch.scored_by(0) == {
        **{"references": ["A woman"], "choices": ["A man", "A woman"]},
        **{"groups": dict(sample.groups)},
    }
    again = MicroBatch.from_row(batch.to_row())
    assert (again.choices, again.groups) == (batch.choices, batch.groups)
    assert with_choices(sample.instruction, sample.choices, "") == sample.instruction


def test_a_manifest_with_choices_needs_no_reader(clips):
    row = {"audio": "clips/a.wav", "question": "Who?", "answer": "A woman", "choices": ["A man", "A woman"]}
    put(clips / "own.jsonl", json.dumps(row | {"task": "mcq_letter", "groups": {"difficulty": "easy"}}) + "\n")
    batch = loaded(clips / "own.jsonl")
    assert batch.answers == ["B"]
    assert batch.instructions[0].startswith("Who?\nA. A man\nB. A woman\n")
    assert batch.groups == [{"difficulty": "easy"}]
