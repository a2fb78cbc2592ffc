"""Folders of `datasets`: caches of `map`, selections and several splits were read as data.

Reports: allenai/open-instruct#638, huggingface/datasets#2196.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mowe_ray.data.shards import list_shards
from tests.read_source import CLIP, read_source


def write_arrow(path: Path, *texts: str) -> None:
    table = pa.table({"text": texts, "audio": pa.array([{"bytes": CLIP, "path": None}] * len(texts))})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def save_to_disk(folder: Path, *texts: str, **state: object) -> None:
    """One file a text, as `Dataset.save_to_disk` lays them out."""
    names = [f"data-{n:05d}-of-{len(texts):05d}.arrow" for n in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        write_arrow(folder / name, text)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], **state}))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.slow
@pytest.mark.parametrize("other", ["cache-0123456789abcdef.arrow", "indices.arrow", "tmp1a2b3c.arrow", "._data.arrow"])
def test_only_the_files_that_state_json_lists_are_data(tmp_path: Path, other: str) -> None:
    save_to_disk(tmp_path / "ds", "x", "y")
    write_arrow(tmp_path / "ds" / other, "another")
    assert read_source(tmp_path / "ds", tmp_path, "asr").answers == ["x", "y"]
    assert read_source(f"{tmp_path}/ds/*.arrow", tmp_path / "glob", "asr").answers == ["x", "y"]


@pytest.mark.slow
def test_a_cache_is_no_data_without_state_json_either(tmp_path: Path) -> None:
    write_arrow(tmp_path / "ds" / "libri-train.arrow", "x")
    write_arrow(tmp_path / "ds" / "cache-77.arrow", "another")
    assert read_source(tmp_path / "ds", tmp_path, "asr").answers == ["x"]


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "ds", "x", "y")
    (tmp_path / "ds" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"data-00001-of-00002\.arrow"):
        list_shards(str(tmp_path / "ds"))


@pytest.mark.parametrize("path", ["ds", "ds/*.arrow", "ds/data-00000-of-00001.arrow"])
def test_a_selection_whose_rows_are_listed_apart_is_refused(tmp_path: Path, path: str) -> None:
    save_to_disk(tmp_path / "ds", "x", _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(ValueError, match="flatten_indices"):
        list_shards(str(tmp_path / path))


def test_of_a_dataset_dict_one_split_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_to_disk(tmp_path / "dd" / split, split)
    (tmp_path / "dd" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"dd/train', '.*dd/test'"):
        list_shards(str(tmp_path / "dd"))
    assert read_source(tmp_path / "dd" / "train", tmp_path, "asr").answers == ["train"]


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"],
        ["libri-train.arrow", "libri-validation.arrow"],
        ["train.jsonl", "dev.jsonl"],
        ["corpus_train.tar", "corpus_eval.tar"],
    ],
    ids=" ".join,
)
def test_several_splits_in_a_folder_are_not_mixed(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="several splits"):
        list_shards(str(tmp_path))
    chosen = [str(tmp_path / name) for name in names if "train" in name]
    assert list_shards(f"{tmp_path}/*train*") == chosen


@pytest.mark.parametrize("packed", ["b.parquet.zst", "b.arrow.lz4", "b.parquet.gz"])
def test_a_packed_shard_is_not_passed_over(tmp_path: Path, packed: str) -> None:
    for name in ("a.tar", packed, "._a.tar", ".b.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=packed):
        list_shards(str(tmp_path))
    (tmp_path / packed).unlink()
    assert list_shards(str(tmp_path)) == [str(tmp_path / "a.tar")]


def test_a_hub_folder_of_one_split_is_read(tmp_path: Path) -> None:
    table = pa.table({"text": ["x"], "audio": [CLIP]})
    for n in range(2):
        pq.write_table(table, tmp_path / f"train-{n:05d}-of-00002.parquet")
    assert read_source(tmp_path, tmp_path / "cache", "asr").answers == ["x", "x"]
