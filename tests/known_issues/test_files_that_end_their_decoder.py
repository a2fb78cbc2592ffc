"""A file that ends the process that reads it, as 7.1 AAC once did: it costs itself, whoever reads it.

https://github.com/meta-pytorch/torchcodec/pull/1166 is about one such bug; `deadly_decoder` stands in for the next.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mowe_ray.data.cached_shards import open_cached, write_audio
from mowe_ray.data.corpora.prepare import Packing, pack
from mowe_ray.data.data_report import DataReport, killers_in
from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import load_in_child, load_micro_batch, without_known
from mowe_ray.data.sample import BadSample, Sample
from mowe_ray.data.scan import map_in_child
from mowe_ray.data.shards import first_entry, scan_shard
from tests import deadly_decoder
from tests.audio_files import by_sndfile
from tests.deadly_decoder.sitecustomize import ENDS

pytestmark = pytest.mark.slow  # every process that ends has to import the decoders first

GOOD = by_sndfile("WAV", "PCM_16", seconds=0.5)
# The length of a FLAC is read without its decoder, that of a Sun audio file with it.
DEADLY_TO_DECODE = by_sndfile("FLAC", "PCM_16", seconds=0.5) + ENDS
DEADLY_TO_SCAN = by_sndfile("AU", "PCM_16", seconds=0.5) + ENDS
TEXT = {"text": "hello", "task": "asr"}


@pytest.fixture(autouse=True)
def deadly(monkeypatch):
    """The decoders of child processes, not of this one, have the bug."""
    monkeypatch.syspath_prepend(next(iter(deadly_decoder.__path__)))


def write_tar(path: Path, clips: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, audio in clips.items():
            for member, content in ((f"{name}.au", audio), (f"{name}.json", json.dumps(TEXT).encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return str(path)


def write_manifest(path: Path, clips: dict[str, bytes]) -> str:
    for name, audio in clips.items():
        (path.parent / name).write_bytes(audio)
    path.write_text("".join(json.dumps({"id": name, "audio": name, **TEXT}) + "\n" for name in clips))
    return str(path)


def write_table(path: Path, clips: dict[str, bytes]) -> str:
    rows = [{"id": name, "audio": {"bytes": audio, "path": None}, **TEXT} for name, audio in clips.items()]
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return str(path)


WRITERS = {"tar": write_tar, "jsonl": write_manifest, "parquet": write_table, "arrow": write_table}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_scan_counts_the_header_that_ended_it(tmp_path, suffix):
    clips = {"one": GOOD, "two": DEADLY_TO_SCAN, "three": GOOD}
    shard = WRITERS[suffix](tmp_path / f"x.{suffix}", clips)
    rows = scan_shard(shard, in_child=True)
    assert rows["id"].to_pylist() == list(clips)
    assert rows["cause"].to_pylist() == [None, "crashed", None]
    assert rows["detail"][1].as_py() == f"{shard}: its header: signal SIGSEGV ended the process"
    whole = scan_shard(WRITERS[suffix](tmp_path / f"y.{suffix}", {"one": GOOD, "three": GOOD}))
    columns = ["id", "duration_s", "task", "detail"]
    assert rows.filter(pc.is_null(rows["cause"])).select(columns).equals(whole.select(columns))


def test_a_process_that_scans_for_itself_survives(tmp_path):
    shards = [write_tar(tmp_path / "0.tar", {"one": GOOD}), write_tar(tmp_path / "1.tar", {"two": DEADLY_TO_SCAN})]
    found = map_in_child(scan_shard, shards)
    assert [rows["cause"].to_pylist() for rows in found] == [[None], ["crashed"]]


def test_an_arrow_file_is_read_in_a_child_process_before_it_is_used(tmp_path):
    shard = Path(write_table(tmp_path / "x.arrow", {"one": GOOD, "two": GOOD}))
    shard.write_bytes(shard.read_bytes() + ENDS)
    (row,) = scan_shard(str(shard)).to_pylist()
    assert (row["id"], row["cause"]) == ("x.arrow", "broken_shard")
    assert row["detail"] == "damaged, as signal SIGSEGV ended the process that read it"
    assert first_entry(str(shard)) == {}


def test_a_damaged_length_is_no_want_of_memory(tmp_path):
    table = pa.table({"id": ["one"], "text": ["hello" * 1000], "audio": [GOOD]})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(tmp_path / "x.arrow", table.schema, options=options) as writer:
        writer.write_table(table)
    content = (tmp_path / "x.arrow").read_bytes()
    # The length of the text stands before its compressed bytes.
    before, length, after = content.rpartition(len("hello" * 1000).to_bytes(8, "little"))
    assert length
    (tmp_path / "x.arrow").write_bytes(before + (1 << 60).to_bytes(8, "little") + after)
    (row,) = scan_shard(str(tmp_path / "x.arrow")).to_pylist()
    assert row["cause"] == "broken_shard"
    assert "malloc" in row["detail"]


@pytest.fixture
def rows(tmp_path):
    clips = {"one": GOOD, "two": DEADLY_TO_DECODE, "three": GOOD, "text": b"no audio", "five": GOOD}
    shard = write_manifest(tmp_path / "x.jsonl", clips)
    # The manifest promises a length, so that the scan opens no file.
    lines = [json.loads(line) | {"duration": 0.5} for line in Path(shard).read_text().splitlines()]
    Path(shard).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return build_index([SourceSpec("made", shard)], tmp_path / "cache", min_s=0.1, max_s=9.0).table


def test_a_block_that_ended_its_decoder_is_decoded_sample_by_sample(rows, tmp_path):
    batch = load_in_child(rows, 0.1, 9.0)
    shard = rows["shard"][0].as_py()
    killer, text = batch.bad
    assert killer == BadSample("two", "made", "crashed", f"{shard}: signal SIGSEGV ended the process", shard)
    assert (text.id, text.cause, text.file) == ("text", "wrong_type", "")
    expected = load_micro_batch(rows.take([0, 2, 4]), 0.1, 9.0)
    assert {**vars(batch), "audio": 0, "bad": 0} == {**vars(expected), "audio": 0, "bad": 0}
    np.testing.assert_array_equal(batch.audio, expected.audio)

    report = DataReport({"made": 5})
    report.add(batch.bad)
    known = killers_in(json.loads(json.dumps(report.to_json())))
    assert known == report.killers == [killer]
    left, bad = without_known(rows, known)
    assert left["id"].to_pylist() == ["one", "three", "text", "five"]
    assert bad == [killer]
    assert len(load_in_child(rows.slice(0, 0), 0.1, 9.0).ids) == 0

    path = str(tmp_path / "a.arrow")
    write_audio(path, rows, 0.1, 9.0, in_child=True)
    assert open_cached(path).table["cause"].to_pylist() == [
        None,
        "crashed",
        None,
        "wrong_type",
        None,
    ]


def test_prepare_counts_the_clips_that_ended_their_decoder(tmp_path):
    clips = [GOOD, DEADLY_TO_DECODE, GOOD, DEADLY_TO_SCAN, None, GOOD]
    samples = [Sample(str(n), audio, "say", "hello", "asr", "made") for n, audio in enumerate(clips)]
    packing = Packing("webdataset", 1 << 20, 0.0, 0, 0.1, 9.0, threads=2)
    told: list[str] = []
    result = pack(
        lambda: samples,
        str(tmp_path),
        packing,
        source="made",
        total=None,
        overwrite=False,
        request={},
        log=told.append,
    )
    assert (result["samples"], result["bad"]) == (4, 2)
    (line,) = told
    assert line.startswith("left out 2, such as 1: crashed: signal SIGSEGV ended the process; all are listed in ")
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report["sources"]["made"]["causes"] == {"crashed": 2}
    assert [bad["id"] for bad in report["bad_samples"]] == ["1", "3"]
