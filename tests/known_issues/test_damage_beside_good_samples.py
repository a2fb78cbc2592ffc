"""A wrong byte in the header of one member ended a tar there, and one in a table of a corpus ended prepare.

Report: webdataset/webdataset#142.
"""

import io
import json
import struct
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.prepare import main
from tests import tiny_corpora
from tests.audio_files import by_sndfile

WAV = by_sndfile("WAV", "PCM_16", seconds=0.5)


def tar(path: Path, keys: str, tar_format: int) -> list[int]:
    """Write a sample of each key, which has an instruction of its own; returns where the headers of members are."""
    with tarfile.open(path, "w", format=tar_format) as archive:
        for key in keys:
            fields = json.dumps({"instruction": "Write.", "answer": key}).encode()
            for name, content in ((f"{key}.wav", WAV), (f"{key}.json", fields)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as archive:
        return [member.offset for member in archive.getmembers()]


@pytest.mark.slow
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("byte", [0, 124, 130, 148, 156, 257])
def test_a_wrong_byte_in_a_header_of_a_tar_costs_its_sample(tmp_path, tar_format, byte):
    shard = tmp_path / "a.tar"
    headers = tar(shard, "abcd", tar_format)
    whole = shard.read_bytes()
    for number, header in enumerate(headers):
        damaged = bytearray(whole)
        damaged[header + byte] ^= 0x55
        shard.write_bytes(damaged)
        index = build_index([SourceSpec("s", str(shard))], tmp_path / f"cache{number}", min_s=0.1, max_s=30.0)
        batch = load_micro_batch(index.table, 0.1, 30.0)
        assert "".join(batch.answers) == "abcd".replace("abcd"[number // 2], "")
        assert all(batch.lengths), "what has lost its audio is no text-only sample"
        assert "broken_shard" in {bad.cause for bad in index.bad}


def test_several_damaged_headers_and_a_cut(tmp_path):
    shard = tmp_path / "a.tar"
    headers = tar(shard, "abcdef", tarfile.GNU_FORMAT)
    damaged = bytearray(shard.read_bytes())
    for header in (headers[2], headers[3], headers[7]):
        damaged[header : header + 512] = bytes(range(256)) * 2
    shard.write_bytes(damaged[: headers[11] + 10])
    index = build_index([SourceSpec("s", str(shard))], tmp_path, min_s=0.1, max_s=30.0)
    assert load_micro_batch(index.table, 0.1, 30.0).answers == ["a", "c", "e"]
    assert len(index.bad) == 3


def test_noise_between_two_tars_is_no_sample(tmp_path):
    tar(tmp_path / "a.tar", "ab", tarfile.GNU_FORMAT)
    (tmp_path / "b.tar").write_bytes(b"\x01" * 1024 + (tmp_path / "a.tar").read_bytes())
    index = build_index([SourceSpec("s", str(tmp_path / "b.tar"))], tmp_path, min_s=0.1, max_s=30.0)
    assert load_micro_batch(index.table, 0.1, 30.0).answers == ["a", "b"]
    assert [bad.cause for bad in index.bad] == ["broken_shard"]


def prepared(folder: Path, out: Path, *options: str) -> dict[str, int]:
    """Run prepare; returns how many samples were good, and how many bad by cause."""
    assert main([str(folder), "--out", str(out), *options]) == 0
    report = json.loads((out / "data_report.json").read_text())
    (source,) = report["sources"].values()
    return {"good": report["good"], **source["causes"]}


@pytest.mark.slow
def test_a_wrong_byte_in_a_transcript_of_common_voice(tmp_path):
    tiny_corpora.common_voice(tmp_path / "cv")
    table = tmp_path / "cv" / "en" / "test.tsv"
    lines = table.read_bytes().splitlines(keepends=True)
    table.write_bytes(lines[0] + lines[1].replace(b"words", b"w\xf6rds") + lines[1] + lines[2])
    found = prepared(tmp_path / "cv" / "en", tmp_path / "out", "--split", "test")
    assert found == {"good": 1, "unreadable": 1, "no_audio": 1}


@pytest.mark.slow
def test_a_wrong_byte_in_a_transcript_of_librispeech(tmp_path):
    chapter = tmp_path / "train" / "1" / "2"
    chapter.mkdir(parents=True)
    for number in range(3):
        (chapter / f"1-2-{number}.flac").write_bytes(by_sndfile("FLAC", "PCM_16", seconds=0.5))
    (chapter / "1-2.trans.txt").write_bytes(b"1-2-0 HELLO\n1-2-1 H\xc9LLO\n1-2-2 THERE\n")
    assert prepared(tmp_path / "train", tmp_path / "out") == {"good": 2, "unreadable": 1}


@pytest.mark.slow
@pytest.mark.parametrize("entry", [{"caption": "no id"}, "text", None, ["list"]])
def test_an_entry_of_another_structure_in_wavcaps(tmp_path, entry):
    tiny_corpora.wavcaps(tmp_path / "wc")
    table = tmp_path / "wc" / "json_files" / "SoundBible" / "sb_final.json"
    content = json.loads(table.read_text())
    table.write_text(json.dumps({**content, "data": [entry, *content["data"]]}))
    before = prepared(tmp_path / "wc", tmp_path / "out", "--split", "SoundBible")
    assert before == {"good": 1, "no_audio": 1, "unreadable": 1}


@pytest.mark.parametrize("content", [b'{"data": [', b"\xff\xfe{", b"[" * 200_000], ids=["cut", "binary", "deep"])
def test_a_json_corpus_that_is_none_is_named(tmp_path, capsys, content):
    tiny_corpora.wavcaps(tmp_path / "wc")
    (tmp_path / "wc" / "json_files" / "SoundBible" / "sb_final.json").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "wc"), "--out", str(tmp_path / "out"), "--split", "SoundBible"])
    assert stopped.value.code == 2
    assert "sb_final.json: not JSON" in capsys.readouterr().err


def test_a_quote_that_is_not_closed_is_named_with_its_line(tmp_path, capsys):
    tiny_corpora.audiocaps(tmp_path / "ac")
    (tmp_path / "ac" / "train.csv").write_text(
        'audiocap_id,youtube_id,start_time,caption\n1,-aB_c,30,good\n2,x,0,"not closed\n' + "3,y,0,words\n" * 20_000
    )
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "ac"), "--out", str(tmp_path / "out"), "--split", "train"])
    assert stopped.value.code == 2
    assert "train.csv, line" in capsys.readouterr().err


@pytest.mark.slow
def test_a_broken_parquet_file_among_good_ones(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "0.parquet").write_bytes(b"PAR1 and nothing else")
    pq.write_table(pa.table({"audio": [WAV] * 2, "text": ["a", "b"]}), folder / "1.parquet")
    assert prepared(folder, tmp_path / "out", "--task", "asr") == {"good": 2, "broken_shard": 1}


@pytest.mark.parametrize("stream", [True, False])
def test_wrong_bytes_in_arrow_files_end_no_process(tmp_path, stream):
    """Arrow trusts the offsets of a file: one that leads outside of it ended the process."""
    table = pa.table({"audio": [WAV] * 6, "text": [f"hello {n}" for n in range(6)], "duration": [0.5] * 6})
    path = tmp_path / "a.arrow"
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    whole = path.read_bytes()
    offsets = [at for at in range(0, len(whole) - 12, 4) if whole[at : at + 12] == struct.pack("<3i", 0, 7, 14)]
    assert len(offsets) == 3  # of the texts, one for each batch
    path.write_bytes(whole[: offsets[1] + 4] + struct.pack("<i", 0x7FFFFFF0) + whole[offsets[1] + 8 :])
    index = build_index([SourceSpec("s", str(path), "asr")], tmp_path, min_s=0.1, max_s=30.0)
    assert load_micro_batch(index.table, 0.1, 30.0).answers == ["hello 0", "hello 1", "hello 4", "hello 5"]
    assert [bad.cause for bad in index.bad] == ["broken_shard"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_wrong_character_in_an_arrow_file_costs_its_row(tmp_path, stream):
    table = pa.table({"audio": [WAV] * 3, "text": ["hello", "world", "there"], "duration": [0.5] * 3})
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content.replace(b"world", b"w\xf6rld"))
    index = build_index([SourceSpec("s", str(tmp_path / "a.arrow"), "asr")], tmp_path, min_s=0.1, max_s=30.0)
    assert load_micro_batch(index.table, 0.1, 30.0).answers == ["hello", "there"]
    assert [bad.cause for bad in index.bad] == ["unreadable"]
