"""Parquet files: as `datasets` writes them (an audio column `{bytes, path}` beside text columns), and AudioBench's."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mowe_ray.data.corpora.layout import Defaults, files_below
from mowe_ray.data.sample import BadAudio, BadSample, Sample, is_about_storage
from mowe_ray.data.shards.parquet import class_names, name_classes, python_rows, refuse_pickles

Fields = dict[str, Any]

_BATCH_ROWS = 16  # encoded clips held in memory at a time


def read_parquet(
    path: Path,
    defaults: Defaults,
    split: str | None = None,
    fields_of: Callable[[Fields], Fields] = dict,
) -> Iterator[Sample | BadSample]:
    """Read a Parquet file or every one below a folder.

    Args:
        path: file or folder.
        defaults: values for fields that rows lack.
        split: only files of this split (`train-00000-of-00004.parquet` or `train/...`); None = all.
        fields_of: turns a row into fields of the usual names.

    Raises:
        ValueError: there is no file of that split.
    """
    for file in parquet_files(path, split):
        try:
            for number, row in enumerate(read_rows(file)):
                yield defaults.sample(fields_of(row), f"{file.stem}-{number:06d}", file)
        except (pa.ArrowException, OSError, UnicodeDecodeError, BadAudio) as error:
            if is_about_storage(error):
                raise
            detail = error.detail if isinstance(error, BadAudio) else str(error)[:200]
            yield BadSample(file.name, defaults.source, "broken_shard", detail)


def parquet_files(path: Path, split: str | None = None) -> list[Path]:
    """List the Parquet files of `split`, sorted; ValueError if there are none."""
    files = [path] if path.is_file() else list(files_below(path, "*.parquet"))
    if split is not None and path.is_dir():
        files = [file for file in files if split in _splits(file.relative_to(path))]
    if not files:
        raise ValueError(f"{path}: no Parquet file" + (f" of split {split!r}" if split else ""))
    return files


def _splits(file: Path) -> set[str]:
    return {*file.parts[:-1], file.stem.partition("-")[0]}


def read_rows(file: Path) -> Iterator[Fields]:
    """Read the rows of a Parquet file, classes by name."""
    with pq.ParquetFile(file) as table:
        refuse_pickles(str(file), table.schema_arrow)
        classes = class_names(table.schema_arrow)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS):
            for row in python_rows(pa.Table.from_batches([batch])):
                yield name_classes(row, classes)


_AUDIOBENCH_COLUMNS = {"context": "audio", "instruction": "text", "answer": "text"}


def is_audiobench(file: Path) -> bool:
    """Whether a Parquet file has AudioBench's three columns."""
    return set(pq.read_schema(file).names) >= _AUDIOBENCH_COLUMNS.keys()


def read_audiobench(path: Path, defaults: Defaults, split: str | None = None) -> Iterator[Sample | BadSample]:
    """Read an AudioBench set: a Parquet file or a folder of them.

    The columns are plain values in some sets and dictionaries in others: `context` is the audio
    cell or `{audio: cell}`, `instruction` and `answer` are the text or `{text: ...}`. Other columns
    are left out.

    Raises:
        ValueError: a file lacks one of the three columns.
    """

    def fields_of(row: Fields) -> Fields:
        if missing := _AUDIOBENCH_COLUMNS.keys() - row.keys():
            raise ValueError(f"{path}: not AudioBench, it has no {', '.join(sorted(missing))}")
        return {column: _inner(row[column], key) for column, key in _AUDIOBENCH_COLUMNS.items()}

    return read_parquet(path, defaults, split, fields_of)


def _inner(value: Any, key: str) -> Any:
    return value[key] if isinstance(value, Mapping) and value.get(key) is not None else value
