import os
import pickle
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from mowe_ray.data.index import Index, SourceSpec, build_index
from mowe_ray.data.sample import Sample
from mowe_ray.data.shards import read_samples, scan_shard
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.write import write_parquet, write_webdataset
from tests.made_index import made_index


@pytest.fixture
def mixture(tmp_path, make_samples):
    """A tar source with several shards and a Parquet source."""
    write_webdataset(make_samples(8, prefix="t"), str(tmp_path / "tar"), 30_000)
    write_parquet(make_samples(4, prefix="p", task="er"), str(tmp_path / "pq"))
    return [SourceSpec("tars", str(tmp_path / "tar")), SourceSpec("tables", str(tmp_path / "pq"))]


@pytest.mark.slow
def test_one_table_over_all_sources(tmp_path, mixture):
    index = build_index(mixture, tmp_path / "cache", min_s=0.1, max_s=30.0)
    assert index.table["id"].to_pylist() == [f"t{n}" for n in range(8)] + [f"p{n}" for n in range(4)]
    assert index.sources.tolist() == [0] * 8 + [1] * 4
    assert index.samples_per_source == {"tars": 8, "tables": 4}
    assert set(np.diff(index.shards)) == {0, 1}
    np.testing.assert_allclose(index.durations[:8], 0.5 + 0.1 * np.arange(8), rtol=1e-6)
    found = list(read_samples(index.table.take(pa.array([9, 0, 11, 5]))))
    assert [(s.id, s.source, s.task) for s in found if isinstance(s, Sample)] == [
        ("p1", "tables", "er"),
        ("t0", "tars", "asr"),
        ("p3", "tables", "er"),
        ("t5", "tars", "asr"),
    ]


def test_limits_send_samples_to_bad(tmp_path, mixture):
    index = build_index(mixture, tmp_path / "cache", min_s=0.55, max_s=0.95)
    assert set(index.table["id"].to_pylist()) == {"t1", "t2", "t3", "t4", "p1", "p2", "p3"}
    assert {(bad.id, bad.source, bad.cause) for bad in index.bad} == {
        ("t0", "tars", "too_short"),
        ("p0", "tables", "too_short"),
        *((f"t{n}", "tars", "too_long") for n in (5, 6, 7)),
    }
    assert "0.5 s" in {bad.detail for bad in index.bad}
    assert [s.id for s in read_samples(index.table)] == index.table["id"].to_pylist()


def test_the_scan_is_cached_until_a_shard_changes(tmp_path, mixture):
    scanned = []

    def counting(function, items):
        for item in items:
            scanned.append(item)
            yield function(item)

    build = partial(build_index, mixture, tmp_path / "cache", max_s=30.0, run_map=counting)
    first = build(min_s=0.1)
    shards = len(scanned)
    assert shards > 2
    assert build(min_s=0.6).table.num_rows < first.table.num_rows
    assert len(scanned) == shards
    os.utime(tmp_path / "pq" / "00000.parquet", ns=(1, 1))
    assert build(min_s=0.1).table.equals(first.table)
    assert len(scanned) == shards + 1
    write_webdataset([], str(tmp_path / "tar"))
    (tmp_path / "tar" / "00000.tar").unlink()
    assert build(min_s=0.1).samples_per_source["tars"] < 8


def test_the_cache_is_mapped_not_loaded(tmp_path, mixture):
    build_index(mixture, tmp_path / "cache", min_s=0.1, max_s=30.0)
    before = pa.total_allocated_bytes()
    index = build_index(mixture[:1], tmp_path / "cache", min_s=0.1, max_s=30.0)
    grown = pa.total_allocated_bytes() - before
    assert grown < 100 * len(index) + 4096


def test_repeated_ids_stay_distinguishable(tmp_path, make_samples):
    samples = make_samples(3)
    write_webdataset([*samples, samples[0], samples[1], samples[0]], str(tmp_path / "w"), 20_000)
    spec = SourceSpec("w", str(tmp_path / "w"))
    for _ in range(2):
        index = build_index([spec], tmp_path / "cache", min_s=0.1, max_s=30.0)
        ids = ["a0", "a1", "a2", "a0#2", "a1#2", "a0#3"]
        assert index.table["id"].to_pylist() == ids
        assert [sample.id for sample in read_samples(index.table)] == ids


def test_names_must_differ(tmp_path, mixture):
    with pytest.raises(ValueError, match="distinct names"):
        build_index([mixture[0], mixture[0]], tmp_path, min_s=0.1, max_s=30.0)


def test_a_source_without_a_usable_sample(tmp_path, mixture):
    index = build_index(mixture, tmp_path / "cache", min_s=20.0, max_s=30.0)
    assert len(index) == 0
    assert len(index.bad) == 12
    assert index.sources.shape == index.shards.shape == index.durations.shape == (0,)


def test_scan_rows_are_stable(tmp_path, mixture):
    shard = str(tmp_path / "tar" / "00000.tar")
    assert scan_shard(shard).equals(scan_shard(shard, Reading(task="er")))


def test_rows_are_taken_from_the_chunks_they_lie_in():
    index = made_index([("a", f"a{n}", 40) for n in range(5)] + [("b", "b0", 30)])
    chunked = Index(pa.concat_tables([index.table.slice(n, 7) for n in range(0, 230, 7)]), index.source_names, [])
    for rows in ([229, 0, 7, 6, 7, 100], [], [3], np.random.default_rng(0).permutation(230)):
        expected = index.table.take(pa.array(rows, pa.int64()))
        assert chunked.take(rows).to_pylist() == expected.to_pylist()
    marked = Index(index.table.replace_schema_metadata({"options": "kept"}), ["a", "b"], [])
    assert marked.take([5]).schema.metadata == {b"options": b"kept"}


def test_a_process_gets_the_arrays_of_an_index_shared_and_copies_little():
    index = made_index([("a", f"a{n}", 2000) for n in range(10)])
    assert len(index.runs.starts) == 11
    buffers: list[pickle.PickleBuffer] = []
    in_band = pickle.dumps(index, protocol=5, buffer_callback=buffers.append)
    assert len(in_band) < 10_000
    received = pickle.loads(in_band, buffers=buffers)
    assert received.take([17, 3]).to_pylist() == index.take([17, 3]).to_pylist()
