"""AudioBench's Parquet files: `context` (audio), `instruction` and `answer`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mowe_ray.data.corpora.hf_parquet import Row, read_parquet
from mowe_ray.data.corpora.layout import Defaults
from mowe_ray.data.sample import BadSample, Sample

_INNER = {"context": "audio", "instruction": "text", "answer": "text"}


def is_audiobench(file: Path) -> bool:
    """Whether a Parquet file has AudioBench's three columns."""
    return set(pq.read_schema(file).names) >= _INNER.keys()


def read_audiobench(path: Path, defaults: Defaults, split: str | None = None) -> Iterator[Sample | BadSample]:
    """Read an AudioBench set: a Parquet file or a folder of them.

    The columns are plain values in some sets and dictionaries in others: `context` is the audio
    cell or `{audio: cell}`, `instruction` and `answer` are the text or `{text: ...}`. Other columns
    are left out.

    Raises:
        ValueError: a file lacks one of the three columns.
    """

    def fields_of(row: Row) -> Row:
        if missing := _INNER.keys() - row.keys():
            raise ValueError(f"{path}: not AudioBench, it has no {', '.join(sorted(missing))}")
        return {column: _inner(row[column], key) for column, key in _INNER.items()}

    return read_parquet(path, defaults, split, fields_of)


def _inner(value: Any, key: str) -> Any:
    return value[key] if isinstance(value, Mapping) and value.get(key) is not None else value
