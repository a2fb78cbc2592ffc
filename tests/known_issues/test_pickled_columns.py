"""Ray Data's extension type unpickles the values of its columns: a shard of a stranger must not run code that way.

https://github.com/ray-project/ray/pull/63470 (`read_parquet`), https://github.com/ray-project/ray/pull/64881 (nested).
"""

import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

from mowe_ray.data.corpora.layout import Defaults
from mowe_ray.data.corpora.parquet import read_parquet
from mowe_ray.data.shards import scan_shard

PICKLED = ArrowPythonObjectType()


class MakesAFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def columns(mark: Path) -> dict[str, pa.Array]:
    """A column of pickled objects in each of the ways in which a table can hold one."""
    storage = pa.array([pickle.dumps(MakesAFolder(mark))], PICKLED.storage_type)
    plain = pa.ExtensionArray.from_storage(PICKLED, storage)
    return {
        "plain": plain,
        "struct": pa.StructArray.from_arrays([plain], names=["bytes"]),
        "list": pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), plain),
    }


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("column", ["text", "audio"])
@pytest.mark.parametrize("way", ["plain", "struct", "list"])
def test_pickled_objects_are_refused_and_not_read(way: str, column: str, suffix: str, tmp_path: Path) -> None:
    mark, shard = tmp_path / "code_ran", tmp_path / f"0.{suffix}"
    table = pa.table({"id": ["a"], "text": ["x"], **{column: columns(mark)[way]}})
    if suffix == "parquet":
        pq.write_table(table, shard)
    else:
        with pa.OSFile(str(shard), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ValueError, match=rf"pickled Python objects in {column}"):
        scan_shard(str(shard))
    assert not mark.exists()


def test_prepare_refuses_it_likewise(tmp_path: Path) -> None:
    mark, file = tmp_path / "code_ran", tmp_path / "0.parquet"
    pq.write_table(pa.table({"id": ["a"], "text": columns(mark)["plain"]}), file)
    with pytest.raises(ValueError, match="pickled Python objects in text"):
        list(read_parquet(file, Defaults("stranger")))
    assert not mark.exists()


def test_such_a_column_runs_code_when_it_is_read(tmp_path: Path) -> None:
    """Without this the other test would prove nothing."""
    columns(tmp_path / "code_ran")["plain"].to_pylist()
    assert (tmp_path / "code_ran").exists()
