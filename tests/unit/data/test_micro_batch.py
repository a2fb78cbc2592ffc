import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from mowe_ray.data.decode import decode_audio
from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import MicroBatch, load_micro_batch
from mowe_ray.data.sample import BadAudio, Sample
from mowe_ray.data.shards.write import write_webdataset


@pytest.fixture
def rows(tmp_path, make_samples, encode):
    """Index rows: three good clips, one text, one truncated, one silent."""
    cut = encode("flac", seconds=2.0)
    silent = encode("wav", np.zeros(16_000, np.float32))
    samples = [
        *make_samples(3),
        Sample("text", None, "Say hi", "hi", "chat", "x"),
        Sample("cut", cut[: len(cut) // 2], "i", "a", "asr", "x", "flac", 2.0),
        Sample("silent", silent, "i", "a", "asr", "x", "wav"),
    ]
    write_webdataset(samples, str(tmp_path / "w"))
    spec = SourceSpec("made", str(tmp_path / "w"))
    return build_index([spec], tmp_path / "cache", min_s=0.1, max_s=30.0).table


def same(a: MicroBatch, b: MicroBatch) -> bool:
    rest = {**vars(a), "audio": None} == {**vars(b), "audio": None}
    return rest and np.array_equal(a.audio, b.audio)


def test_good_samples_are_packed_and_bad_ones_named(rows, make_samples):
    batch = load_micro_batch(rows, 0.1, 30.0)
    assert batch.ids == ["a0", "a1", "a2", "text"]
    assert batch.lengths == [8000, 9600, 11_200, 0]
    assert batch.instructions[:2] == ["What is 0?", "What is 1?"]
    assert batch.answers[3] == "hi"
    assert batch.tasks == ["asr", "asr", "asr", "chat"]
    assert batch.sources == ["made"] * 4
    assert [(bad.id, bad.source, bad.cause) for bad in batch.bad] == [
        ("cut", "made", "truncated"),
        ("silent", "made", "silent"),
    ]
    start = 0
    for sample, length, scale in zip(make_samples(3), batch.lengths, batch.scales, strict=False):
        wave = decode_audio(sample.audio, None, 0.1, 30.0)
        clip = batch.audio[start : start + length].astype(np.float64) * scale
        assert np.abs(clip - wave).max() <= 0.51 * scale
        start += length
    assert len(batch.audio) == start


def test_rows_keep_the_order_asked_for(rows):
    assert load_micro_batch(rows.take(pa.array([3, 2, 0])), 0.1, 30.0).ids == ["text", "a2", "a0"]


def test_round_trip_through_a_table(rows):
    batches = [
        load_micro_batch(rows, 0.1, 30.0),
        load_micro_batch(rows.slice(3, 1), 0.1, 30.0),
        load_micro_batch(rows.slice(4, 2), 0.1, 30.0),
        load_micro_batch(rows.slice(0, 0), 0.1, 30.0),
    ]
    table = pa.concat_tables([batch.to_row() for batch in batches])
    for form in (table, table.combine_chunks(), table.slice(0)):
        for number, batch in enumerate(batches):
            assert same(MicroBatch.from_row(form, number), batch)


def test_the_row_shares_the_audio(rows):
    batch = load_micro_batch(rows, 0.1, 30.0)
    table = batch.to_row()
    assert np.shares_memory(batch.audio, MicroBatch.from_row(table).audio)


@pytest.mark.slow
def test_clips_longer_than_their_index_row_still_fit(rows):
    short = rows.set_column(
        rows.schema.get_field_index("duration_s"),
        "duration_s",
        pa.array([0.01] * len(rows), pa.float32()),
    )
    assert same(load_micro_batch(short, 0.1, 30.0), load_micro_batch(rows, 0.1, 30.0))


def test_a_row_keeps_the_name_of_its_file(tmp_path, make_samples):
    sample, other = make_samples(2)
    (tmp_path / "rain.flac").write_bytes(sample.audio)
    (tmp_path / "wind.flac").write_bytes(other.audio)
    lines = [{"audio": name, "text": "a", "task": "ac", "id": name[:4]} for name in ("rain.flac", "wind.flac")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = SourceSpec("made", str(tmp_path / "rows.jsonl"))
    batch = load_micro_batch(build_index([spec], tmp_path / "cache", min_s=0.1, max_s=30.0).table, 0.1, 30.0)
    assert batch.paths == ["rain.flac", "wind.flac"]
    assert batch.without({0: BadAudio("crashed", "")}).paths == ["wind.flac"]
    nameless = replace(batch, paths=[])
    assert MicroBatch.joined([nameless, batch]).paths == ["", "", "rain.flac", "wind.flac"]
