"""Hugging Face and AudioBench Parquet."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mowe_ray.data.corpora.layout import Defaults
from mowe_ray.data.corpora.parquet import is_audiobench, read_audiobench, read_parquet
from mowe_ray.data.sample import BadSample


def _write(path, rows, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(metadata), path)
    return path


def test_audio_cells_hold_bytes_or_a_path(tmp_path, make_audio, asr):
    data = make_audio()
    (tmp_path / "x.wav").write_bytes(data)
    _write(
        tmp_path / "train-00000-of-00001.parquet",
        [
            {"audio": {"bytes": data, "path": "q.wav"}, "text": "bytes"},
            {"audio": {"bytes": None, "path": "x.wav"}, "text": "path"},
            {"audio": {"bytes": None, "path": "gone.wav"}, "text": "gone"},
            {"audio": None, "text": "none"},
        ],
    )
    in_bytes, in_file, gone, none = read_parquet(tmp_path, asr)
    assert in_bytes.audio == in_file.audio == data
    assert in_bytes.id == "train-00000-of-00001-000000"
    assert gone.cause == none.cause == "no_audio"


def test_only_the_files_of_the_split(tmp_path, make_audio, asr):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "dev/0"):
        _write(tmp_path / f"{name}.parquet", [{"audio": make_audio(), "text": name}])
    answers = [sample.answer for sample in read_parquet(tmp_path, asr, "train")]
    assert answers == ["train-00000-of-00002", "train-00001-of-00002"]
    assert [sample.answer for sample in read_parquet(tmp_path, asr, "dev")] == ["dev/0"]
    assert len(list(read_parquet(tmp_path, asr))) == 4
    with pytest.raises(ValueError, match="'nosuch'"):
        list(read_parquet(tmp_path, asr, "nosuch"))


def test_class_labels_become_their_names(tmp_path, make_audio):
    features = {"label": {"names": ["dog", "rain"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    rows = [{"audio": make_audio(), "label": label} for label in (1, 0, -1)]
    file = _write(tmp_path / "a.parquet", rows, metadata)
    rain, dog, unlabelled = read_parquet(file, Defaults("corpus", "ac"))
    assert (rain.answer, dog.answer) == ("rain", "dog")
    assert unlabelled.cause == "no_answer"


def test_a_broken_file_is_counted_and_the_next_one_read(tmp_path, make_audio, asr):
    whole = _write(tmp_path / "b.parquet", [{"audio": make_audio(), "text": "good"}])
    (tmp_path / "a.parquet").write_bytes(whole.read_bytes()[:-100])
    broken, good = read_parquet(tmp_path, asr)
    assert isinstance(broken, BadSample)
    assert (broken.id, broken.cause) == ("a.parquet", "broken_shard")
    assert good.answer == "good"


@pytest.mark.parametrize("nested", [False, True])
def test_audiobench_with_plain_and_with_nested_columns(tmp_path, make_audio, nested):
    audio = {"bytes": make_audio(), "path": None}
    row = {
        "context": {"audio": audio, "text": None} if nested else audio,
        "instruction": {"text": "What is it?", "audio": None} if nested else "What is it?",
        "answer": {"text": "a dog", "audio": None} if nested else "a dog",
        "other_attributes": {"id": "7"},
    }
    file = _write(tmp_path / "a.parquet", [row])
    assert is_audiobench(file)
    (sample,) = read_audiobench(file, Defaults("clotho", "aqa"))
    assert sample.audio == make_audio()
    assert (sample.instruction, sample.answer) == ("What is it?", "a dog")


def test_not_audiobench(tmp_path, make_audio, asr):
    file = _write(tmp_path / "a.parquet", [{"audio": make_audio(), "answer": "x"}])
    assert not is_audiobench(file)
    with pytest.raises(ValueError, match="context, instruction"):
        list(read_audiobench(file, asr))
