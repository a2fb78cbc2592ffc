import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mowe_ray.data.sample import Sample
from mowe_ray.data.shards.record import parse_record
from mowe_ray.data.shards.write import write_parquet, write_webdataset


@pytest.mark.parametrize("write", [write_webdataset, write_parquet])
def test_the_same_samples_give_the_same_bytes(tmp_path, make_samples, write):
    for name in ("x", "y"):
        write(iter(make_samples(6)), str(tmp_path / name), 30_000)
    files = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert len(files) > 1
    for name in files:
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_tar_members(tmp_path, make_samples):
    samples = make_samples(2)
    written = write_webdataset(samples, str(tmp_path / "w"))
    assert (written.samples, written.seconds) == (2, pytest.approx(1.1))
    with tarfile.open(written.shards[0]) as archive:
        members = archive.getmembers()
        contents = [archive.extractfile(member).read() for member in members]
    assert [member.name for member in members] == [
        "000000000.flac",
        "000000000.json",
        "000000001.flac",
        "000000001.json",
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
    assert contents[0] == samples[0].audio
    assert json.loads(contents[1]) == {
        "id": "a0",
        "instruction": "What is 0?",
        "answer": "answer 0",
        "task": "asr",
        "duration": 0.5,
    }


def test_shards_split_by_size(tmp_path, make_samples):
    samples = make_samples(10, step_s=0.0)
    written = write_webdataset(samples, str(tmp_path / "w"), 3 * len(samples[0].audio))
    sizes = [Path(shard).stat().st_size for shard in written.shards]
    assert written.samples == 10
    assert len(sizes) == 4
    assert max(sizes) < 4 * len(samples[0].audio) + 10 * 2048


def test_the_suffix_follows_the_bytes(tmp_path, encode):
    kinds = {"ogg": "ogg", "opus": "opus", "m4a": "m4a", "mp3": "mp3", "wav": "wav"}
    samples = [Sample(k, encode(k), "i", "a", "asr", "s", "wrong") for k in kinds]
    samples.append(Sample("text", b"no audio", "i", "a", "asr", "s", "wav"))
    written = write_webdataset(samples, str(tmp_path / "w"))
    with tarfile.open(written.shards[0]) as archive:
        names = [name for name in archive.getnames() if not name.endswith("json")]
    assert [name.rpartition(".")[2] for name in names] == [*kinds.values(), "wav"]


def test_parquet_has_small_row_groups_and_the_usual_columns(tmp_path, make_samples):
    samples = make_samples(40, step_s=0.2)
    samples.append(Sample("text", None, "Say", "word", "chat", "s"))
    written = write_parquet(samples, str(tmp_path / "p"))
    file = pq.ParquetFile(written.shards[0])
    assert file.num_row_groups >= 2
    rows = file.read().to_pylist()
    assert [row["audio"] and row["audio"]["bytes"] for row in rows] == [s.audio for s in samples]
    assert rows[0]["duration"] == 0.5
    assert rows[-1]["audio"] is None
    assert rows[-1]["duration"] is None


def test_no_samples_make_no_shards(tmp_path):
    assert write_webdataset([], str(tmp_path / "w")).shards == []


def test_what_else_a_row_says_is_kept(tmp_path, make_samples):
    row = {
        "audio": "a.wav",
        "Text": "a",
        "speaker": "ann",
        "age": 31,
        "tags": ["x", None],
        "gap": float("nan"),
        "raw": b"",
    }
    record = parse_record(row)
    assert record.others == {"speaker": "ann", "age": 31, "tags": ["x", None]}
    samples = [replace(sample, others=record.others) for sample in make_samples(1)]
    with tarfile.open(write_webdataset(samples, str(tmp_path / "w")).shards[0]) as archive:
        note = json.loads(archive.extractfile("000000000.json").read())
    assert record.others.items() <= note.items()
    (again,) = pq.read_table(write_parquet(samples, str(tmp_path / "p")).shards[0]).to_pylist()
    assert json.loads(again["others"]) == record.others
    assert again["answer"] == note["answer"] == "answer 0"
