"""Shards of samples: WebDataset tar, Parquet, `datasets` Arrow, manifests beside audio files, and folders of these.

Each reader module has `scan(shard, reading, allow_paths)`, which walks a shard once for the index, and
`read(places)`, which fetches any samples in any order. Which files are the shards of a path: `listing.py`.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mowe_ray.data.child_process import ChildDied, ChildProcess
from mowe_ray.data.decode import headers_in_child
from mowe_ray.data.sample import BadSample, Sample, is_about_storage
from mowe_ray.data.shards import folder, manifest, members, tar, tarred
from mowe_ray.data.shards import parquet as table
from mowe_ray.data.shards.compressed import plain_name
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.listing import MANIFESTS, PACKED, SUFFIXES, exists, is_folder, list_shards
from mowe_ray.data.shards.record import ROW_SCHEMA, Place, Row, broken_shard, rows_table
from mowe_ray.data.shards.storage import fingerprint, fingerprints

__all__ = [
    "PACKED",
    "SUFFIXES",
    "first_entry",
    "first_samples",
    "list_shards",
    "read_samples",
    "scan_shard",
    "shard_versions",
    "with_options",
]

_READERS: dict[str, ModuleType] = {
    **dict.fromkeys(MANIFESTS, manifest),
    ".tar": tar,
    ".parquet": table,
    ".arrow": table,
}
_CHUNK_ROWS = 1 << 16  # Python objects alive at a time while a long manifest is scanned
_PLACE_COLUMNS = [name for name in Place.__slots__ if name not in ("allow_paths", "reading")]
_OPTIONS = b"options"
_ANY = Reading()


def scan_shard(
    shard: str, reading: Reading = _ANY, allow_paths: Sequence[str] = (), *, in_child: bool = False
) -> pa.Table:
    """Describe every sample of a shard, good or bad, as a table of `record.ROW_SCHEMA`.

    Args:
        shard: its path.
        reading: how its rows are read.
        allow_paths: what rows may open beside the folder of the shard: folders, URLs, and hosts.
        in_child: for a shard that has ended the process that scanned it. What does so again is a bad sample or, where
            it is no header of a clip, a broken shard.
    """
    if in_child:
        return _scan_in_child(shard, reading, allow_paths)
    rows = _scan(shard, reading, allow_paths)
    parts = [rows_table([])]
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        parts.append(rows_table(chunk))
    return pa.concat_tables(parts)


def _scan_in_child(shard: str, *arguments: Any) -> pa.Table:
    with ChildProcess() as child:
        try:
            rows = child.call(_scan_with_headers_apart, shard, *arguments)
        except ChildDied as death:
            return rows_table([broken_shard(shard, str(death))])
    named = pc.binary_join_element_wise(pa.scalar(shard), rows["detail"], ": ")
    details = pc.if_else(pc.equal(rows["cause"], "crashed"), named, rows["detail"])
    return rows.set_column(rows.schema.get_field_index("detail"), ROW_SCHEMA.field("detail"), details)


def _scan_with_headers_apart(shard: str, *arguments: Any) -> pa.Table:
    with headers_in_child():
        return scan_shard(shard, *arguments)


def first_entry(shard: str) -> Mapping[str, Any]:
    """Return the fields of a shard's first sample, for messages; none if it cannot be read."""
    try:
        manifest = tarred.manifest_of(shard, exists)
        found: Mapping[str, Any] = tarred.first_entry(manifest) if manifest else _reader(shard).first_entry(shard)
    except (OSError, ValueError, pa.ArrowException, tarfile.TarError):
        return {}
    return found


def _scan(shard: str, reading: Reading, allow_paths: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a shard; one that cannot be opened is a single bad row."""
    try:
        manifest = tarred.manifest_of(shard, exists)
        if manifest is not None:
            yield from tarred.scan(shard, manifest, reading)
        else:
            yield from _reader(shard).scan(shard, reading, allow_paths)
    except OSError as error:
        if is_about_storage(error):
            raise
        yield broken_shard(shard, str(error))


def first_samples(
    shard: str, reading: Reading, allow_paths: Sequence[str], at_most: int = 8
) -> list[Sample | BadSample]:
    """Read the first samples of a shard; none if it is empty."""
    rows = rows_table(list(islice(_scan(shard, reading, allow_paths), at_most)))
    bad = [BadSample(row["id"], shard, row["cause"], row["detail"]) for row in rows.to_pylist() if row["cause"]]
    good = rows.filter(pc.is_null(rows["cause"]))
    for column in ("shard", "source"):
        good = good.append_column(column, pa.array([shard] * len(good), pa.string()))
    return [*read_samples(with_options(good, allow_paths, {shard: reading})), *bad]


def shard_versions(shards: Sequence[str]) -> list[str]:
    """Sizes and times of change of shards and of what their samples need beside them."""
    names = [shard for shard in shards if not is_folder(shard)]
    files = dict(zip(names, fingerprints(names), strict=True))
    versions = []
    for shard in shards:
        manifest = tarred.manifest_of(shard, exists)
        own = folder.version(shard) if is_folder(shard) else files[shard]
        versions.append(own if manifest is None else f"{own}-{fingerprint(manifest)}")
    return versions


def with_options(rows: pa.Table, allow_paths: Sequence[str], readings: Mapping[str, Reading]) -> pa.Table:
    """Return rows that are read so, wherever and by whom.

    Args:
        rows: of an index.
        allow_paths: files that they may open.
        readings: how the rows of a source are read, by its name.
    """
    given = {name: reading.to_json() for name, reading in readings.items() if reading != _ANY}
    options = json.dumps({"allow_paths": list(allow_paths), "readings": given})
    return rows.replace_schema_metadata({**(rows.schema.metadata or {}), _OPTIONS: options})


def read_samples(rows: pa.Table) -> Iterator[Sample | BadSample]:
    """Fetch the samples of rows of `Index.table`, in their order."""
    options = json.loads((rows.schema.metadata or {}).get(_OPTIONS, "{}"))
    allow_paths = tuple(options.get("allow_paths", ()))
    readings = {name: Reading.of(values) for name, values in options.get("readings", {}).items()}
    places = [
        Place(**fields, allow_paths=allow_paths, reading=readings.get(fields["source"], _ANY))
        for fields in rows.select([name for name in _PLACE_COLUMNS if name in rows.column_names]).to_pylist()
    ]
    readers = [members if place.parts is not None else _reader(place.shard) for place in places]
    streams: dict[ModuleType, Iterator[Sample | BadSample]] = {
        reader: reader.read([p for p, r in zip(places, readers, strict=True) if r is reader]) for reader in set(readers)
    }
    for reader in readers:
        yield next(streams[reader])


def _reader(shard: str) -> ModuleType:
    return folder if is_folder(shard) else _READERS["." + plain_name(shard).rpartition(".")[2].lower()]
