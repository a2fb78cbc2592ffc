"""Shards of samples: WebDataset tar, Parquet, `datasets` Arrow, and manifests beside audio files.

Each reader module has `scan(shard, default_task)`, which walks a shard once for the index, and
`read(places)`, which fetches any samples in any order. Which files of a folder are its shards is decided here.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mowe_ray.data.child_process import ChildDied, ChildProcess
from mowe_ray.data.decode import headers_in_child
from mowe_ray.data.sample import BadSample, Sample, is_about_storage, valid_text
from mowe_ray.data.shards import manifest, tar
from mowe_ray.data.shards import parquet as table
from mowe_ray.data.shards.completion import NOTE, check_complete
from mowe_ray.data.shards.record import ROW_SCHEMA, Place, Row, broken_shard, rows_table
from mowe_ray.data.shards.storage import expand, open_file

__all__ = ["allowing", "field_names", "first_samples", "list_shards", "read_samples", "scan_shard"]

_READERS: dict[str, ModuleType] = {
    ".tar": tar,
    ".parquet": table,
    ".arrow": table,
    ".jsonl": manifest,
    ".tsv": manifest,
    ".json": manifest,
}
PACKED = (".tar", ".parquet", ".arrow")  # beside these, JSON files are notes about the corpus
SUFFIXES = (*PACKED, ".jsonl", ".tsv", ".json")
_COMPRESSED = re.compile(
    r"\.(?:tar|parquet|arrow|jsonl?|tsv)\.(?:gz|bz2|xz|zst|lz4)$|\.(?:tgz|tbz2|txz)$", re.IGNORECASE
)
# data-00000-of-00004.arrow of save_to_disk, NAME-train.arrow of the cache, train-00000-of-00002.parquet of the hub.
_SPLIT = re.compile(
    r"^(?:.*[-_])?(train|test|validation|valid|val|dev|eval)(?:-\d+(?:-of-\d+)?)?\.[a-z]+$", re.IGNORECASE
)
_CHUNK_ROWS = 1 << 16  # Python objects alive at a time while a long manifest is scanned
_PLACE_COLUMNS = [name for name in Place.__slots__ if name != "allow_paths"]
_ALLOW_PATHS = b"allow_paths"


def list_shards(path: str) -> list[str]:
    """List the shards of a folder (without sub-folders), glob, file or fsspec URL, by name.

    Hidden files and the `cache-*.arrow` of `datasets` are no shards.

    Raises:
        ValueError: when there is none, a folder mixes formats or splits, `prepare` has not finished it, or it is one
            of `datasets` that has to be written again first.
    """
    names, single = expand(path)
    if not single:
        _check_prepared(path, names)
    files = names if single else [name for name in names if not _is_ignored(_base(name))]
    named = [name for name in files if _base(name) == "dataset_dict.json"]
    if named:
        splits = ", ".join(f"'{path.rstrip('/')}/{split}'" for split in _read_json(named[0]).get("splits", []))
        raise ValueError(f"data path {path!r} is a DatasetDict: name one of its splits, {splits}")
    for suffixes in [(suffix,) for suffix in PACKED] + [(".jsonl", ".tsv"), (".json",)]:
        shards = [name for name in files if name.lower().endswith(suffixes)]
        others = {s for s in PACKED for name in files if name.lower().endswith(s)} - set(suffixes)
        if shards and others and suffixes[0] in PACKED:
            raise ValueError(
                f"data path {path!r} holds both {suffixes[0]} and {', '.join(sorted(others))}: "
                f"name one kind, as in '{path.rstrip('/')}/*{suffixes[0]}'"
            )
        if shards:
            if unnamed := [name for name in shards if valid_text(name) != name]:
                raise ValueError(f"data path {path!r} holds {unnamed[0]!r}, whose name is not Unicode: rename it")
            if suffixes == (".arrow",):
                shards = _saved_dataset(path, shards, single)
            if not single:
                _check_folder(path, files, shards)
            return shards
    kinds = "a file of another kind" if single else f"{len(files)} files, none"
    packed = [name for name in files if _COMPRESSED.search(name)]
    hint = f"; {_base(packed[0])} has to be unpacked first" if packed else ""
    raise ValueError(f"data path {path!r} holds {kinds} of {', '.join(SUFFIXES)}{hint}")


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _is_ignored(base: str) -> bool:
    return base.startswith(".") or base == NOTE or (base.startswith("cache-") and base.endswith(".arrow"))


def _check_prepared(path: str, names: list[str]) -> None:
    """Raise ValueError where `prepare` has not finished a folder, or one that is not a pattern lacks shards."""
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in names):
        if f"{folder}/{NOTE}" in names:
            check_complete(folder, names)
        elif _is_glob(path):
            check_complete(folder, None)


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _saved_dataset(path: str, shards: list[str], single: bool) -> list[str]:
    """Return those shards that the state.json beside them lists, which `save_to_disk` writes."""
    kept = []
    for folder in dict.fromkeys(shard.rpartition("/")[0] for shard in shards):
        beside = [shard for shard in shards if shard.rpartition("/")[0] == folder]
        try:
            state = _read_json(f"{folder}/state.json" if folder else "state.json")
        except FileNotFoundError:
            kept += beside
            continue
        if state.get("_indices_data_files"):
            raise ValueError(
                f"data path {path!r} is a selection or shuffle of a dataset, whose rows are listed apart from its "
                "data: call flatten_indices() before save_to_disk()"
            )
        listed = {str(file.get("filename")) for file in state.get("_data_files") or []}
        missing = listed - {_base(shard) for shard in beside}
        if missing and not single and not _is_glob(path):
            raise ValueError(f"data path {path!r} lacks {', '.join(sorted(missing))}, which its state.json names")
        kept += [shard for shard in beside if single or _base(shard) in listed or not listed]
    return kept


def _check_folder(path: str, files: list[str], shards: list[str]) -> None:
    """Raise ValueError where a folder holds several splits, or shards that would be passed over."""
    folder = path.rstrip("/")
    packed = [_base(name) for name in files if _COMPRESSED.search(name)]
    if packed:
        raise ValueError(
            f"data path {path!r} holds {packed[0]}, which has to be unpacked first; "
            f"to leave it out, name the others, as in '{folder}/*.{shards[0].rpartition('.')[2]}'"
        )
    splits = {match[1].lower() for name in shards if (match := _SPLIT.match(_base(name)))}
    if len(splits) > 1 and not _is_glob(path):
        suffix = shards[0].rpartition(".")[2]
        raise ValueError(
            f"data path {path!r} holds several splits, {', '.join(sorted(splits))}: "
            f"name one, as in '{folder}/*{sorted(splits)[0]}*.{suffix}', or all, as in '{folder}/*.{suffix}'"
        )


def _read_json(path: str) -> dict[str, Any]:
    """Return the content of a file that `datasets` writes; ValueError names it if it cannot be read."""
    try:
        with open_file(path) as file:
            content = json.load(file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        if is_about_storage(error):
            raise
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def scan_shard(
    shard: str, default_task: str | None, allow_paths: Sequence[str] = (), *, in_child: bool = False
) -> pa.Table:
    """Describe every sample of a shard, good or bad, as a table of `record.ROW_SCHEMA`.

    Args:
        allow_paths: what rows may open beside the folder of the shard: folders, URLs, and hosts.
        in_child: for a shard that has ended the process that scanned it. What does so again is a bad sample or, where
            it is no header of a clip, a broken shard.
    """
    if in_child:
        return _scan_in_child(shard, default_task, allow_paths)
    rows = _scan(shard, default_task, allow_paths)
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


def field_names(shard: str) -> list[str]:
    """Return the names of the fields of a shard's first sample, or of its columns; none if it cannot be read."""
    try:
        return list(_reader(shard).field_names(shard))
    except (OSError, ValueError, pa.ArrowException, tarfile.TarError):
        return []


def _scan(shard: str, default_task: str | None, allow_paths: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a shard; one that cannot be opened is a single bad row."""
    try:
        yield from _reader(shard).scan(shard, default_task, allow_paths)
    except OSError as error:
        if is_about_storage(error):
            raise
        yield broken_shard(shard, str(error))


def first_samples(
    shard: str, default_task: str | None, allow_paths: Sequence[str], at_most: int = 8
) -> list[Sample | BadSample]:
    """Read the first samples of a shard; none if it is empty."""
    rows = rows_table(list(islice(_scan(shard, default_task, allow_paths), at_most)))
    bad = [BadSample(row["id"], shard, row["cause"], row["detail"]) for row in rows.to_pylist() if row["cause"]]
    good = rows.filter(pc.is_null(rows["cause"]))
    for column in ("shard", "source"):
        good = good.append_column(column, pa.array([shard] * len(good), pa.string()))
    return [*read_samples(allowing(good, allow_paths)), *bad]


def allowing(rows: pa.Table, allow_paths: Sequence[str]) -> pa.Table:
    """Return rows that may open files of `allow_paths`, wherever and by whom they are read."""
    return rows.replace_schema_metadata({**(rows.schema.metadata or {}), _ALLOW_PATHS: json.dumps(list(allow_paths))})


def read_samples(rows: pa.Table) -> Iterator[Sample | BadSample]:
    """Fetch the samples of rows of `Index.table`, in their order."""
    allow_paths = tuple(json.loads((rows.schema.metadata or {}).get(_ALLOW_PATHS, "[]")))
    places = [Place(**fields, allow_paths=allow_paths) for fields in rows.select(_PLACE_COLUMNS).to_pylist()]
    readers = [_reader(place.shard) for place in places]
    streams: dict[ModuleType, Iterator[Sample | BadSample]] = {
        reader: reader.read([p for p, r in zip(places, readers, strict=True) if r is reader]) for reader in set(readers)
    }
    for reader in readers:
        yield next(streams[reader])


def _reader(shard: str) -> ModuleType:
    return _READERS["." + shard.rpartition(".")[2].lower()]
