import io
import json
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.data.sample import BadSample, Sample
from mowe_ray.data.shards import list_shards, read_samples, scan_shard
from mowe_ray.data.shards.record import parse_record
from mowe_ray.data.shards.write import write_parquet, write_webdataset


def write_tar(path, members, tar_format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def note(**fields) -> bytes:
    return json.dumps(fields).encode()


@pytest.fixture
def load(tmp_path):
    """Index a path and read all of it: good samples and bad ones."""

    def read(path, task=None) -> tuple[list[Sample], list[BadSample]]:
        spec = SourceSpec("s", str(path), task)
        index = build_index([spec], tmp_path / "cache", min_s=0.1, max_s=30.0)
        found = list(read_samples(index.table))
        good = [sample for sample in found if isinstance(sample, Sample)]
        return good, index.bad + [sample for sample in found if isinstance(sample, BadSample)]

    return read


def test_tar_with_every_field(tmp_path, encode, load):
    audio = encode("flac")
    fields = {"id": "x", "instruction": "What?", "answer": "that", "task": "aqa", "duration": 1.0}
    write_tar(tmp_path / "a.tar", [("k.flac", audio), ("k.json", note(**fields))])
    good, bad = load(tmp_path)
    assert good == [Sample("x", audio, "What?", "that", "aqa", "s", "flac", 1.0)]
    assert not bad


def test_tar_defaults_come_from_key_task_and_header(tmp_path, encode, load):
    members = [("d/k.1.json", note(text="hello")), ("d/k.1.wav", encode("wav", seconds=2.0))]
    write_tar(tmp_path / "a.tar", members)
    good, _ = load(tmp_path, task="asr")
    assert (good[0].id, good[0].task, good[0].answer) == ("d/k.1", "asr", "hello")
    assert good[0].instruction == "Transcribe the speech."
    assert scan_shard(str(tmp_path / "a.tar"))["duration_s"].to_pylist() == [2.0]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_with_long_names(tmp_path, encode, load, tar_format):
    keys = ["x" * 200 + str(n) for n in range(3)]
    members = []
    for key in keys:
        members += [(f"{key}.flac", encode("flac")), (f"{key}.json", note(answer="a"))]
    write_tar(tmp_path / "a.tar", members, tar_format)
    good, bad = load(tmp_path)
    assert [sample.id for sample in good] == keys
    assert not bad


def test_faults_inside_a_tar_are_counted_by_cause(tmp_path, encode, load):
    flac = encode("flac")
    members = [
        ("good.flac", flac), ("good.json", note(answer="a")),
        ("mute.flac", flac), ("mute.json", note(instruction="i")),
        ("alone.flac", flac),
        ("text.wav", b"not audio at all" * 9), ("text.json", note(answer="a")),
        ("none.wav", b""), ("none.json", note(answer="a")),
        ("json.flac", flac), ("json.json", b"{broken"),
        ("words.json", note(instruction="i", answer="a")),
        ("nothing.json", note(answer="a")),
        ("lost.json", note(instruction="i", answer="a", duration=2.0)),
        ("README.md", b"notes"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    good, bad = load(tmp_path)
    assert [sample.id for sample in good] == ["good", "words"]
    assert good[1].audio is None
    assert {sample.id: sample.cause for sample in bad} == {
        "mute": "no_answer",
        "alone": "no_answer",
        "text": "wrong_type",
        "none": "zero_length",
        "json": "unreadable",
        "nothing": "no_audio",
        "lost": "no_audio",
    }


@pytest.mark.slow
def test_a_tar_cut_anywhere_keeps_what_came_before(tmp_path, encode, load):
    flac = encode("flac", seconds=0.3)
    members = []
    for n in range(3):
        members += [(f"{n}.flac", flac), (f"{n}.json", note(instruction="i", answer="a"))]
    write_tar(tmp_path / "whole.tar", members)
    whole = (tmp_path / "whole.tar").read_bytes()
    folder = tmp_path / "cut"
    folder.mkdir()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in archive.getmembers()]
    for cut in [*ends, *range(100, ends[-1], 777)]:
        (folder / "a.tar").write_bytes(whole[:cut])
        good, bad = load(folder)
        complete = sum(end - 400 <= cut for end in ends[1::2])  # a small JSON ends before its padding
        assert len(good) in (complete, sum(end <= cut for end in ends[1::2]))
        assert [sample.id for sample in good] == [str(n) for n in range(len(good))]
        assert all(sample.audio == flac for sample in good)
        assert [(sample.id, sample.cause) for sample in bad] == [("a.tar", "broken_shard")]


def test_what_is_no_tar_or_parquet_is_one_broken_shard(tmp_path, load):
    for name in ("a.tar", "a.parquet", "a.arrow"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(b"something else" * 100)
        good, bad = load(folder)
        assert not good
        assert [sample.cause for sample in bad] == ["broken_shard"]


def test_a_shard_that_shrinks_after_indexing(tmp_path, make_samples):
    write_webdataset(make_samples(2), str(tmp_path / "w"))
    index = build_index([SourceSpec("s", str(tmp_path / "w"))], tmp_path, min_s=0.1, max_s=30.0)
    shard = tmp_path / "w" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    assert {sample.cause for sample in read_samples(index.table)} == {"broken_shard"}
    shard.unlink()
    assert {sample.cause for sample in read_samples(index.table)} == {"unreadable"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["struct", "bytes", "path"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("timed", [True, False])
def test_tables_with_an_audio_column(tmp_path, encode, load, kind, suffix, timed):
    data = [encode("flac", seconds=1.0 + n, hertz=300 + n) for n in range(5)]
    folder = tmp_path / "t"
    folder.mkdir()
    for n, content in enumerate(data):
        (folder / f"{n}.flac").write_bytes(content)
    audio = {
        "struct": [{"bytes": d, "path": "x.flac"} for d in data],
        "bytes": data,
        "path": [f"{n}.flac" for n in range(5)],
    }[kind]
    columns = {"audio": audio, "sentence": [f"s{n}" for n in range(5)], "other": [0] * 5}
    if timed:
        columns["duration"] = [1.0 + n for n in range(5)]
    table = pa.table(columns)
    if suffix == "parquet":
        pq.write_table(table, folder / "a.parquet", row_group_size=2)
    else:
        with pa.ipc.new_stream(str(folder / "a.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    good, bad = load(folder, task="asr")
    assert not bad
    assert [sample.audio for sample in good] == data
    assert [sample.answer for sample in good] == [f"s{n}" for n in range(5)]
    assert len({sample.id for sample in good}) == 5
    durations = scan_shard(str(folder / f"a.{suffix}"))["duration_s"]
    np.testing.assert_allclose(durations.to_pylist(), [1, 2, 3, 4, 5])


def test_audiobench_columns_and_text_rows(tmp_path, encode, load):
    audio = encode("flac")
    rows = [
        {"context": {"bytes": audio, "path": None}, "instruction": "Q", "answer": "A"},
        {"context": None, "instruction": "Q", "answer": "B"},
        {"context": {"bytes": audio, "path": None}, "instruction": "Q", "answer": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    good, bad = load(tmp_path / "a.parquet")
    assert [(sample.audio, sample.answer) for sample in good] == [(audio, "A"), (None, "B")]
    assert [sample.cause for sample in bad] == ["no_answer"]


def test_a_table_without_answers_says_which_columns_it_has(tmp_path):
    pq.write_table(pa.table({"audio": [b""], "aim": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"audio, aim.*answer, text"):
        scan_shard(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("form", ["lines", "list", "tsv"])
def test_manifests_beside_their_audio(tmp_path, encode, load, form):
    (tmp_path / "wavs").mkdir()
    data = [encode("wav", seconds=1.0 + n) for n in range(2)]
    paths = ["wavs/0.wav", str(tmp_path / "wavs" / "1.wav")]
    for path, content in zip(paths, data, strict=True):
        (tmp_path / path).write_bytes(content)
    entries = [
        {"audio_filepath": paths[0], "text": "grüß dich", "duration": 1.0},
        {"audio_filepath": paths[1], "text": "zwei"},
        {"audio_filepath": "wavs/2.wav", "text": "missing"},
        {"audio_filepath": "wavs/3.wav", "text": "missing too", "duration": 3.0},
    ]
    if form == "tsv":
        lines = ["audio_filepath\ttext\tduration"]
        lines += [f"{e['audio_filepath']}\t{e['text']}\t{e.get('duration', '')}" for e in entries]
        path, text = tmp_path / "m.tsv", "\n".join(lines) + "\n"
    elif form == "lines":
        path = tmp_path / "m.jsonl"
        text = "\n\n".join(json.dumps(e, ensure_ascii=False) for e in entries)
    else:
        path, text = tmp_path / "m.json", json.dumps(entries, ensure_ascii=False, indent=2)
    path.write_text(text, encoding="utf-8")
    good, bad = load(path, task="asr")
    assert [(s.id, s.answer, s.audio) for s in good] == [
        (paths[0], "grüß dich", data[0]),
        (paths[1], "zwei", data[1]),
    ]
    assert [(sample.id, sample.cause) for sample in bad] == [
        ("wavs/2.wav", "no_audio"),
        ("wavs/3.wav", "no_audio"),
    ]


def test_manifest_segments_share_a_recording(tmp_path, encode, load):
    (tmp_path / "long.wav").write_bytes(encode("wav", seconds=4.0))
    entries = [{"audio": "long.wav", "answer": "a", "offset": o, "duration": 1.0} for o in (0.0, 2.0)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, entries)))
    good, bad = load(tmp_path / "m.jsonl")
    assert not bad
    assert [(sample.id, sample.offset_s) for sample in good] == [
        ("long.wav", 0.0),
        ("long.wav#2", 2.0),
    ]


def test_listing(tmp_path):
    for name in ("b.tar", "a.tar", "notes.json", "sub"):
        (tmp_path / name).mkdir() if name == "sub" else (tmp_path / name).touch()
    (tmp_path / "sub" / "c.tar").touch()
    expected = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert list_shards(str(tmp_path)) == expected
    assert list_shards(f"file://{tmp_path}") == expected
    assert list_shards(str(tmp_path / "a*")) == expected[:1]
    assert list_shards(expected[1]) == expected[1:]
    (tmp_path / "x.parquet").touch()
    with pytest.raises(ValueError, match=r"both .tar and .parquet"):
        list_shards(str(tmp_path))
    assert list_shards(str(tmp_path / "*.parquet")) == [str(tmp_path / "x.parquet")]
    with pytest.raises(ValueError, match="does not exist"):
        list_shards(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds 0 files"):
        list_shards(str(tmp_path / "empty"))


@pytest.mark.parametrize("write", [write_webdataset, write_parquet])
def test_remote_shards_read_like_local_ones(make_samples, load, write):
    samples = make_samples(5)
    out = f"memory://corpus-{write.__name__}"
    written = write(iter(samples), out, 20_000)
    try:
        assert len(list_shards(out)) == len(written.shards) > 1
        good, bad = load(out)
        assert not bad
        assert [(s.id, s.audio) for s in good] == [(s.id, s.audio) for s in samples]
    finally:
        fsspec.filesystem("memory").rm(out.removeprefix("memory:/"), recursive=True)


@pytest.mark.parametrize("write", [write_webdataset, write_parquet])
def test_several_right_answers_come_back_and_the_first_is_the_one_to_learn(tmp_path, write):
    one = Sample("a", None, "What is it?", "a dog", "aqa", "made", references=("a dog", "dog"))
    other = Sample("b", None, "And this?", "rain", "aqa", "made")
    [shard] = write([one, other], str(tmp_path)).shards
    index = build_index([SourceSpec("made", shard)], tmp_path / "cache", min_s=0.1, max_s=30)
    batch = load_micro_batch(index.table, 0.1, 30)
    assert batch.answers == ["a dog", "rain"]
    assert batch.references == [["a dog", "dog"], ["rain"]]


def test_a_list_of_answers_is_a_list_of_references():
    record = parse_record({"answer": ["yes", "yeah", "yes"], "audio": "a.wav"})
    assert (record.answer, record.references) == ("yes", ("yes", "yeah"))
    assert parse_record({"references": [" red ", ""], "audio": "a.wav"}).answer == "red"
