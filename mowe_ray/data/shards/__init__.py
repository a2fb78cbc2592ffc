"""Shards of samples: WebDataset tar, Parquet, `datasets` Arrow, and manifests beside audio files.

Each reader module has `scan(shard, default_task)`, which walks a shard once for the index, and
`read(places)`, which fetches any samples in any order.
"""

import tarfile
from collections.abc import Iterator
from itertools import islice
from types import ModuleType

import pyarrow as pa
import pyarrow.compute as pc

from mowe_ray.data.sample import BadSample, Sample, is_about_storage
from mowe_ray.data.shards import manifest, tar
from mowe_ray.data.shards import parquet as table
from mowe_ray.data.shards.listing import list_shards
from mowe_ray.data.shards.record import Place, Row, broken_shard, rows_table

__all__ = ["field_names", "first_samples", "list_shards", "read_samples", "scan_shard"]

_READERS: dict[str, ModuleType] = {
    ".tar": tar,
    ".parquet": table,
    ".arrow": table,
    ".jsonl": manifest,
    ".tsv": manifest,
    ".json": manifest,
}
_CHUNK_ROWS = 1 << 16  # Python objects alive at a time while a long manifest is scanned
_PLACE_COLUMNS = list(Place.__slots__)


def scan_shard(shard: str, default_task: str | None) -> pa.Table:
    """Describe every sample of a shard, good or bad, as a table of `record.ROW_SCHEMA`."""
    rows = _scan(shard, default_task)
    parts = [rows_table([])]
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        parts.append(rows_table(chunk))
    return pa.concat_tables(parts)


def field_names(shard: str) -> list[str]:
    """Return the names of the fields of a shard's first sample, or of its columns; none if it cannot be read."""
    try:
        return list(_reader(shard).field_names(shard))
    except (OSError, ValueError, pa.ArrowException, tarfile.TarError):
        return []


def _scan(shard: str, default_task: str | None) -> Iterator[Row]:
    """Yield the rows of a shard; one that cannot be opened is a single bad row."""
    try:
        yield from _reader(shard).scan(shard, default_task)
    except OSError as error:
        if is_about_storage(error):
            raise
        yield broken_shard(shard, str(error))


def first_samples(shard: str, default_task: str | None, at_most: int = 8) -> list[Sample | BadSample]:
    """Read the first samples of a shard; none if it is empty."""
    rows = rows_table(list(islice(_scan(shard, default_task), at_most)))
    bad = [BadSample(row["id"], shard, row["cause"], row["detail"]) for row in rows.to_pylist() if row["cause"]]
    good = rows.filter(pc.is_null(rows["cause"]))
    for column in ("shard", "source"):
        good = good.append_column(column, pa.array([shard] * len(good), pa.string()))
    return [*read_samples(good), *bad]


def read_samples(rows: pa.Table) -> Iterator[Sample | BadSample]:
    """Fetch the samples of rows of `Index.table`, in their order."""
    places = [Place(**fields) for fields in rows.select(_PLACE_COLUMNS).to_pylist()]
    readers = [_reader(place.shard) for place in places]
    streams: dict[ModuleType, Iterator[Sample | BadSample]] = {
        reader: reader.read([p for p, r in zip(places, readers, strict=True) if r is reader]) for reader in set(readers)
    }
    for reader in readers:
        yield next(streams[reader])


def _reader(shard: str) -> ModuleType:
    return _READERS["." + shard.rpartition(".")[2].lower()]
