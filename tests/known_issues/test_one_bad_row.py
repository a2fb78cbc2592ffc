"""One bad row ended the scan, prepare or the run: GSM in a WAV, half an emoji, a NUL in a path, a FIFO, deep JSON.

Reports: https://github.com/bastibe/python-soundfile/issues/164 (GSM), https://github.com/openai/tiktoken/issues/82
(surrogates). Every case stands among good rows, which must come through; the row is counted with a cause.
"""

import io
import json
import os
import socket
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mowe_ray.data.corpora.layout import find
from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import MicroBatch, load_micro_batch
from mowe_ray.data.sample import bad_audio
from mowe_ray.prepare import main
from tests.audio_files import by_ffmpeg, by_sndfile
from tests.read_source import write_tar

WAV = by_sndfile("WAV", "PCM_16", seconds=1.0)


def load(path: Path, cache: Path) -> tuple[MicroBatch, dict[str, tuple[str, str]]]:
    """Scan and decode, and pass what travels between machines on; cause and detail of each bad sample by id."""
    index = build_index([SourceSpec("made", str(path), "asr")], cache, min_s=0.1, max_s=30.0)
    batch = MicroBatch.from_row(load_micro_batch(index.table, 0.1, 30.0).to_row())
    return batch, {bad.id: (bad.cause, bad.detail) for bad in [*index.bad, *batch.bad]}


def lines(path: Path, *rows: dict | str) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def prepared(path: Path, out: Path) -> dict:
    """What prepare reports of a manifest with two good rows."""
    assert main([str(path), "--out", str(out), "--task", "asr"]) == 0
    report = json.loads((out / "data_report.json").read_text())
    assert report["good"] == 2
    return report["sources"][path.stem]["causes"]


def damaged_aiff() -> bytes:
    data = bytearray(by_sndfile("AIFF", "PCM_16", seconds=1.0))
    data[20] = 255
    return bytes(data)


_MORE = '{"audio": "a.wav", "text": "hi", "more": ?}'
ROWS = {
    "half an emoji in the answer": ({"audio": "a.wav", "text": "high \ud83d"}, "unreadable"),
    "half an emoji in the id": ({"audio": "a.wav", "text": "hi", "id": "\udc00x"}, "unreadable"),
    "half an emoji in the task": ({"audio": "a.wav", "text": "hi", "task": "as\ud83dr"}, "unreadable"),
    "half an emoji in the instruction": ({"audio": "a.wav", "text": "hi", "instruction": "\ude00"}, "unreadable"),
    "half an emoji in the path": ({"audio": "a\ud83d.wav", "text": "hi"}, "unreadable"),
    "half an emoji in a reference": ({"audio": "a.wav", "references": ["a", "\ud83d"]}, "unreadable"),
    "NUL in the path": ({"audio": "a\0.wav", "text": "hi"}, "unreadable"),
    "path too long": ({"audio": "a" * 5000 + ".wav", "text": "hi"}, "unreadable"),
    "name too long": ({"audio": "a" * 300 + ".wav", "text": "hi"}, "unreadable"),
    "book as answer": ({"audio": "a.wav", "text": "word " * 30_000}, "unreadable"),
    "negative offset": ({"audio": "a.wav", "text": "hi", "offset": -1.0, "duration": 0.5}, "unreadable"),
    "offset in words": ({"audio": "a.wav", "text": "hi", "offset": "soon", "duration": 0.5}, "unreadable"),
    "offset behind the end": ({"audio": "a.wav", "text": "hi", "offset": 1e30}, "zero_length"),
    "folder": ({"audio": "folder.wav", "text": "hi"}, "unreadable"),
    "FIFO": ({"audio": "fifo.wav", "text": "hi"}, "unreadable"),
    "socket": ({"audio": "socket.wav", "text": "hi"}, "unreadable"),
    "device": ({"audio": "/dev/zero", "text": "hi"}, "unreadable"),
    "file taken for a folder": ({"audio": "a.wav/b.wav", "text": "hi"}, "unreadable"),
    "missing": ({"audio": "nowhere.wav", "text": "hi"}, "no_audio"),
    "all null": ({"audio": None, "text": None, "instruction": None, "duration": None}, "no_answer"),
    "200,000 nested lists": (_MORE.replace("?", "[" * 200_000 + "]" * 200_000), "unreadable"),
    "number of 10,000 digits": (_MORE.replace("?", "1" * 10_000), "unreadable"),
    "wrong byte in an AIFF header": ({"audio": "x.aiff", "text": "hi"}, "unreadable"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.wav").write_bytes(WAV)
    (tmp_path / "x.aiff").write_bytes(damaged_aiff())
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "fifo.wav")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.wav"))
        yield tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("row", "cause"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("timed", [False, True], ids=["", "timed"])
def test_in_a_manifest(folder, row, cause, timed):
    if timed and isinstance(row, dict):  # then the scan opens no audio, and the decoder is the first to see it
        row = {"duration": 1.0, **row}
    good = {"audio": "a.wav", "text": "hello", "id": "good"}
    manifest = lines(folder / "m.jsonl", good, row, good)
    batch, bad = load(manifest, folder / "cache")
    assert batch.answers == ["hello", "hello"]
    assert [known for known, _ in bad.values()] == [cause if not timed or cause != "no_answer" else "no_answer"]
    assert all(detail for _, detail in bad.values())
    assert all(name.encode() for name in bad)
    (folder / "list.json").write_text(f"[{good_json(good)}, {good_json(row)}, {good_json(good)}]")
    batch, in_list = load(folder / "list.json", folder / "cache")
    assert [known for known, _ in in_list.values()] == [known for known, _ in bad.values()]
    assert batch.answers == ["hello", "hello"]


def good_json(row: dict | str) -> str:
    return row if isinstance(row, str) else json.dumps(row)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "cause"), ROWS.values(), ids=ROWS)
def test_in_what_prepare_reads(folder, row, cause):
    good = {"audio": "a.wav", "text": "hello", "id": "good"}
    causes = prepared(lines(folder / "m.jsonl", good, row, good), folder / "out")
    assert causes == {cause: 1}


@pytest.mark.parametrize(("row", "cause"), ROWS.values(), ids=ROWS)
def test_in_a_tar(tmp_path, row, cause):
    content = row if isinstance(row, str) else json.dumps({key: row[key] for key in row if key != "audio"})
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for key, fields in (("a", '{"text": "hello"}'), ("b", content), ("c", '{"text": "hello"}')):
            for name, data in ((f"{key}.wav", WAV), (f"{key}.json", fields.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    batch, bad = load(tmp_path / "a.tar", tmp_path / "cache")
    assert batch.answers.count("hello") == 2
    assert len(batch.ids) + len(bad) == 3


def test_gsm_in_a_wav_is_read(folder):
    (folder / "gsm.wav").write_bytes(by_sndfile("WAV", "GSM610", seconds=1.0))
    batch, bad = load(lines(folder / "m.jsonl", {"audio": "gsm.wav", "text": "hello"}), folder / "cache")
    assert not bad
    assert 16_000 <= batch.lengths[0] <= 16_640  # blocks of 320 samples at 8 kHz


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "id", "instruction", "audio", "references"])
def test_bytes_that_are_not_utf8_in_parquet(tmp_path, name):
    (tmp_path / "a.wav").write_bytes(WAV)
    columns = {"text": ["hello"] * 3, "id": ["a", "b", "c"], "instruction": ["What?"] * 3, "audio": ["a.wav"] * 3}
    columns["references"] = ["hello"] * 3
    cells = [value.encode() for value in columns[name]]
    cells[1] = b"\xff\xfe" + cells[1]
    wrong = pa.StringArray.from_buffers(3, *pa.array(cells, pa.binary()).buffers()[1:])
    if name == "references":
        wrong = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), wrong)
    pq.write_table(pa.table({**columns, name: wrong}), tmp_path / "a.parquet")
    batch, bad = load(tmp_path / "a.parquet", tmp_path / "cache")
    assert batch.answers == ["hello", "hello"]
    assert [cause for cause, _ in bad.values()] == ["unreadable"]
    assert main([str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out"), "--task", "asr"]) == 0
    assert json.loads((tmp_path / "out" / "data_report.json").read_text())["good"] == 2


@pytest.mark.parametrize("empty", [{"bytes": None, "path": None}, {"bytes": b"", "path": None}, None])
def test_empty_cells_in_parquet(tmp_path, empty):
    rows = [{"audio": {"bytes": WAV, "path": "a.wav"}, "text": "hello", "duration": 1.0}] * 2
    pq.write_table(
        pa.Table.from_pylist([*rows, {"audio": empty, "text": "hello", "duration": 1.0}]), tmp_path / "a.parquet"
    )
    batch, bad = load(tmp_path / "a.parquet", tmp_path / "cache")
    assert batch.answers == ["hello", "hello"]
    assert len(bad) == 1


def test_a_damaged_row_group_costs_that_group(tmp_path):
    rows = [{"audio": WAV, "text": f"hello {n}", "duration": 1.0} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2, compression="zstd")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    column = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(1)
    at = column.dictionary_page_offset or column.data_page_offset
    data[at : at + column.total_compressed_size] = bytes(column.total_compressed_size)
    (tmp_path / "a.parquet").write_bytes(data)
    batch, bad = load(tmp_path / "a.parquet", tmp_path / "cache")
    assert batch.answers == ["hello 0", "hello 1", "hello 4", "hello 5"]
    assert [cause for cause, _ in bad.values()] == ["broken_shard"]


@pytest.mark.slow
def test_a_wrong_byte_in_the_header_of_a_tsv(folder):
    (folder / "m.tsv").write_bytes(b"audio\ttext\tno\xfftes\na.wav\thello\tx\na.wav\th\xffllo\tx\na.wav\thello\tx\n")
    batch, bad = load(folder / "m.tsv", folder / "cache")
    assert batch.answers == ["hello", "hello"]
    assert [cause for cause, _ in bad.values()] == ["unreadable"]
    assert prepared(folder / "m.tsv", folder / "out") == {"unreadable": 1}


def test_member_names_of_a_tar_that_are_not_utf8(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in (("caf\udce9.wav", WAV), ("caf\udce9.json", b'{"text": "hello"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    batch, bad = load(tmp_path / "a.tar", tmp_path / "cache")
    assert batch.ids == ["caf?"]
    assert not bad


def test_machines_and_storage_are_not_blamed_on_samples():
    for error in (
        MemoryError(),
        OSError(5, "Input/output error"),
        OSError(116, "Stale file handle"),
        TimeoutError(110, ""),
    ):
        with pytest.raises(type(error)):
            bad_audio(error)
    assert bad_audio(KeyError("x")).detail == "KeyError: 'x'"
    assert len(bad_audio(ValueError("x" * 10_000)).detail) == 200


@pytest.mark.slow
def test_a_file_that_changes_rate_or_channels_is_no_error(folder):
    parts = [by_ffmpeg("adts", "aac", rate, channels=channels) for rate, channels in ((16_000, 1), (44_100, 2))]
    (folder / "x.aac").write_bytes(b"".join(parts))
    batch, bad = load(lines(folder / "m.jsonl", {"audio": "x.aac", "text": "hello"}), folder / "cache")
    assert not bad
    assert batch.lengths[0] / 16_000 == pytest.approx(4.1, abs=0.2)


@pytest.mark.parametrize("rate", [1e30, float("inf"), -1.0, 0.5])
def test_a_decoded_clip_with_an_impossible_rate_costs_its_row(tmp_path, rate):
    rows = [
        {"audio": {"array": [0.1, -0.1] * 4000, "sampling_rate": hertz}, "text": "hello"} for hertz in (8000.0, rate)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    batch, bad = load(tmp_path / "a.parquet", tmp_path / "cache")
    assert (batch.answers, len(bad)) == (["hello"], 1)
    assert "broken_shard" not in {cause for cause, _ in bad.values()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "metadata", ["{", "[" * 200_000, "[1]", '{"info": {"features": {"text": {"_type": "ClassLabel", "names": 5}}}}']
)
def test_damaged_metadata_of_datasets_cost_their_shard(tmp_path, metadata):
    table = pa.table({"audio": [WAV], "text": ["hello"]})
    (tmp_path / "d").mkdir()
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "d" / "a.parquet")
    pq.write_table(table, tmp_path / "d" / "b.parquet")
    batch, bad = load(tmp_path / "d", tmp_path / "cache")
    assert batch.answers == ["hello"]
    assert [cause for cause, _ in bad.values()] == ["broken_shard"]
    assert main([str(tmp_path / "d"), "--out", str(tmp_path / "out"), "--task", "asr"]) == 0
    assert json.loads((tmp_path / "out" / "data_report.json").read_text())["good"] == 1


@pytest.mark.parametrize("damage", ["deep", "fifo", "name"])
def test_what_is_wrong_with_a_folder_is_named(tmp_path, damage):
    write_tar(tmp_path / "a.tar", ("a.wav", WAV), ("a.json", b'{"text": "hello"}'))
    if damage == "name":
        (tmp_path / "a.tar").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tar"))
    elif damage == "deep":
        (tmp_path / "dataset_dict.json").write_text("[" * 200_000)
    else:
        os.mkfifo(tmp_path / "state.json")
        with pa.ipc.new_stream(str(tmp_path / "a.arrow"), pa.schema([("text", pa.string())])):
            (tmp_path / "a.tar").unlink()
    named = {"name": "caf.*rename it", "deep": "dataset_dict.json: not JSON", "fifo": "state.json: not JSON"}[damage]
    with pytest.raises(ValueError, match=named):
        load(tmp_path, tmp_path / "cache")


def test_pipes_in_a_folder_and_behind_links_are_no_shards(tmp_path):
    write_tar(tmp_path / "a.tar", ("a.wav", WAV), ("a.json", b'{"text": "hello"}'))
    os.mkfifo(tmp_path / "b.tar")
    (tmp_path / "c.tar").symlink_to(tmp_path / "b.tar")
    for path in (tmp_path, tmp_path / "*.tar"):
        assert load(path, tmp_path / "cache")[0].answers == ["hello"]


def test_a_pipe_is_no_table_of_a_corpus(tmp_path):
    os.mkfifo(tmp_path / "train.csv")
    assert find(tmp_path, "train.csv") is None, "reading it would wait for ever"
