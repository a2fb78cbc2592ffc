"""A shard that was written anew after it was indexed gave other samples under the old ids: some lost, some repeated.

The id of each record is compared with that of the index when it is read. Report: mosaicml/streaming#399.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from mowe_ray.data.index import Index, SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.data.sample import Sample, StorageError
from mowe_ray.data.shards.write import write_parquet, write_webdataset
from tests.end_to_end import tone_samples

AUDIO = tone_samples(1)[0]
SAMPLES = [replace(AUDIO, id=f"clip {n}", answer=f"number {n}") for n in range(8)]


def write_manifest(samples: Iterable[Sample], out: str) -> None:
    folder = Path(out)
    folder.mkdir(exist_ok=True)
    (folder / "a.flac").write_bytes(AUDIO.audio or b"")
    lines = [json.dumps({"id": s.id, "audio": "a.flac", "answer": s.answer, "duration": 1.0}) for s in samples]
    (folder / "m.jsonl").write_text("\n".join(lines) + "\n")


def index_of(folder: Path) -> Index:
    return build_index([SourceSpec("s", str(folder / "w"), "asr")], folder / "cache", min_s=0.1, max_s=30)


@pytest.mark.parametrize("write", [write_webdataset, write_parquet, write_manifest])
def test_a_record_of_another_sample_is_an_error_that_names_the_shard(tmp_path, write):
    write(SAMPLES, str(tmp_path / "w"))
    index = index_of(tmp_path)
    assert load_micro_batch(index.table, 0.1, 30).ids == [s.id for s in SAMPLES]
    write(SAMPLES[::-1], str(tmp_path / "w"))
    with pytest.raises(StorageError, match=r"/w/.* was written anew .* where clip 0 was, there is clip 7 now. Run the"):
        load_micro_batch(index.table, 0.1, 30)
    assert load_micro_batch(index_of(tmp_path).table, 0.1, 30).ids == [s.id for s in SAMPLES[::-1]]


@pytest.mark.parametrize("write", [write_webdataset, write_parquet, write_manifest])
def test_ids_that_the_index_has_made_distinct_are_known(tmp_path, write):
    ids = ["a", "a", "a#2", "a#0", "b\ud800", "a"] if write is write_manifest else ["a", "a", "a#2", "a#0", "a"]
    samples = [replace(AUDIO, id=i) for i in ids]
    write(samples, str(tmp_path / "w"))
    batch = load_micro_batch(index_of(tmp_path).table, 0.1, 30)
    assert len(batch.ids) == 5
    assert not batch.bad
