"""Scans that are kept beside their shards, and remote tars that are walked in windows."""

import json
import shutil
import struct
from functools import partial
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pytest

from mowe_ray.data.corpora.prepare import Packing, pack
from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.sample import Sample, StorageError
from mowe_ray.data.shards import parquet, read_samples, scan_shard
from mowe_ray.data.shards.kept_scans import FOLDER, ScanWriter, options_key
from mowe_ray.data.shards.storage import fingerprint
from mowe_ray.data.shards.walked import WalkedFile, open_to_walk
from mowe_ray.data.shards.write import write_parquet, write_webdataset


@pytest.fixture
def scanned():
    """The shards that `indexed` has scanned since."""
    return []


@pytest.fixture
def indexed(tmp_path, scanned):
    """Index a path as a machine does that has seen nothing before."""

    def counting(function, items):
        for item in items:
            scanned.append(item.rpartition("/")[2])
            yield function(item)

    def index(path, task=None, index_folder=None):
        scanned.clear()
        options = {"min_s": 0.1, "max_s": 30.0, "run_map": counting, "index_folder": index_folder}
        return build_index([SourceSpec("made", str(path), task)], tmp_path / uuid4().hex, **options).table

    return index


def packed(out: Path, samples: list[Sample], kind: str = "webdataset") -> Path:
    packing = Packing(kind, 30_000, 0.0, 0, 0.0, 30.0, 1)  # type: ignore[arg-type]
    pack(partial(iter, samples), str(out), packing, source="s", total=None, overwrite=False, request={}, log=print)
    return out


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_nobody_scans_what_prepare_has_written(tmp_path, make_samples, indexed, scanned, kind):
    found = indexed(packed(tmp_path / "out", make_samples(6), kind))
    assert scanned == []
    shutil.rmtree(tmp_path / "out" / FOLDER)
    assert indexed(tmp_path / "out").equals(found)
    assert len(scanned) > 1


def test_a_shard_written_anew_is_scanned_and_the_others_are_not(tmp_path, make_samples, indexed, scanned):
    out = packed(tmp_path / "out", make_samples(8))
    expected = indexed(out)
    (out / "00001.tar").touch()
    (out / "prepared.json").unlink()
    assert indexed(out).equals(expected)
    assert scanned == ["00001.tar"]
    (file,) = (out / FOLDER).iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert indexed(out).equals(expected)
    assert len(scanned) == len(list(out.glob("*.tar")))


def test_a_copy_of_what_prepare_has_written_is_taken_by_its_sizes(tmp_path, make_samples, indexed, scanned):
    out = packed(tmp_path / "out", make_samples(6))
    shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copyfile)
    assert indexed(tmp_path / "copy")["id"].equals(indexed(out)["id"])
    assert scanned == []
    (tmp_path / "copy" / "prepared.json").unlink()  # without it, nobody says how long they were
    indexed(tmp_path / "copy")
    assert len(scanned) == len(list(out.glob("*.tar")))


@pytest.fixture
def store():
    """A folder of an object store, as a URL."""
    yield (url := f"memory://{uuid4().hex}")
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_the_first_scan_of_foreign_shards_is_kept_for_any_task(store, make_samples, indexed, scanned):
    samples = [*make_samples(3), *make_samples(3, prefix="b", task="")]
    write_webdataset(iter(samples), store, 40_000)
    indexed(store)
    first = len(scanned)
    assert first > 1
    assert indexed(store, "er")["task"].to_pylist() == ["asr"] * 3 + ["er"] * 3
    assert scanned == []
    write_webdataset(iter(make_samples(3, prefix="c")), f"{store}/more")
    fsspec.filesystem("memory").mv(f"{store}/more/00000.tar", f"{store}/0.tar")
    assert indexed(store)["id"].to_pylist()[:4] == ["c0", "c1", "c2", "a0"]
    assert scanned == ["0.tar"]
    assert indexed(store)["id"].to_pylist()[:4] == ["c0", "c1", "c2", "a0"]
    assert scanned == []


def test_files_are_closed_when_they_are_large_and_each_has_its_shards(tmp_path, make_samples, monkeypatch, indexed):
    monkeypatch.setattr("mowe_ray.data.shards.kept_scans._HELD_BYTES", 1)
    out = packed(tmp_path / "out", make_samples(6), "parquet")
    assert len(list((out / FOLDER).iterdir())) == len(list(out.glob("*.parquet"))) > 1
    assert indexed(out)["id"].to_pylist() == [f"a{n}" for n in range(6)]


def test_scans_go_to_the_second_place_where_the_first_cannot_be_written(tmp_path, make_samples):
    write_parquet(make_samples(2), str(tmp_path))
    (tmp_path / "file").touch()
    places = [str(tmp_path / "file" / FOLDER), str(tmp_path / "other")]
    writer = ScanWriter(places, str(tmp_path), options_key((), ()))
    shard = str(tmp_path / "00000.parquet")
    writer.add(shard, fingerprint(shard), scan_shard(shard))
    writer.flush()
    assert [path.name for path in (tmp_path / "other").iterdir()] == writer.names


def test_an_index_of_wids_names_the_shards(store, tmp_path, make_samples, indexed):
    write_webdataset(make_samples(6), store, 20_000)
    shards = [{"url": f"{number:05d}.tar", "nsamples": 2, "filesize": 1} for number in (1, 0)]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    fsspec.filesystem("memory").pipe_file(f"{store}/index.json", json.dumps(index).encode())
    expected = [*indexed(f"{store}/00001.tar")["id"].to_pylist(), *indexed(f"{store}/00000.tar")["id"].to_pylist()]
    assert len(expected) < 6
    assert indexed(f"{store}/index.json")["id"].to_pylist() == expected
    fsspec.filesystem("memory").pipe_file(f"{store}/index.json", b'{"shardlist": [{}]}')
    with pytest.raises(ValueError, match="damaged index of wids"):
        indexed(f"{store}/index.json")


@pytest.mark.parametrize("suffix", ["parquet", "tsv"])
def test_a_remote_shard_that_is_gone_is_no_bad_sample(store, make_samples, indexed, suffix):
    fs = fsspec.filesystem("memory")
    if suffix == "parquet":
        write_parquet(make_samples(2), store)
    else:
        fs.pipe({f"{store}/a.flac": make_samples(1)[0].audio, f"{store}/a.tsv": b"audio\ttext\na.flac\thello\n"})
    rows = indexed(store, "asr")
    fs.rm(rows["shard"][0].as_py())
    parquet._open.cache_clear()  # as another process, which has not opened it yet
    with pytest.raises(StorageError, match="was there when it was indexed, and is gone"):
        list(read_samples(rows))


def test_reads_of_a_walked_file_are_those_of_the_file(store):
    random = np.random.default_rng(0)
    content = random.bytes(300_000)
    fsspec.filesystem("memory").pipe_file(f"{store}/a", content)
    file = WalkedFile(f"{store}/a", len(content), [0, 50_000, 200_000, 299_999])
    for at in random.integers(0, len(content), 200).tolist():
        size = int(random.choice([1, 512, 4000, 20_000]))
        file.seek(at)
        assert file.read(size) == content[at : at + size]


@pytest.mark.parametrize("index", ["none", "energon", "dali", "wrong"])
def test_a_remote_tar_is_scanned_as_a_local_one(store, tmp_path, make_samples, index):
    write_webdataset(make_samples(30), str(tmp_path))
    expected = scan_shard(str(tmp_path / "00000.tar"))
    fs = fsspec.filesystem("memory")
    fs.put_file(str(tmp_path / "00000.tar"), f"{store}/a.tar")
    starts = [int(at) - 512 for at in expected["audio_at"].to_pylist()]
    size = (tmp_path / "00000.tar").stat().st_size
    text = "v1.2 30\n" + "".join(f"flac {at + 512} 9 a.flac json {at + 900} 9 a.json\n" for at in starts)
    files = {"energon": struct.pack("<31Q", *starts, size), "dali": text.encode(), "wrong": struct.pack("<2Q", 7, 9999)}
    if index in files:
        fs.pipe_file(f"{store}/a.idx" if index == "dali" else f"{store}/a.tar.idx", files[index])
    with open_to_walk(f"{store}/a.tar") as file:
        assert file._ahead == {"none": [], "wrong": [7, 9999]}.get(index, starts)  # type: ignore[attr-defined]
    assert scan_shard(f"{store}/a.tar").equals(expected)
